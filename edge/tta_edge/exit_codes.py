"""Which error ends a command in which exit status."""

from __future__ import annotations

from tta_edge.errors import (
    ClientError,
    ServiceError,
    SessionExists,
    SpoolDamaged,
    SpoolError,
    StartError,
    UnknownBundle,
    UnknownSession,
    UnknownStream,
)
from tta_runtime.errors import (
    BadField,
    BundleError,
    ConfigError,
    EngineError,
    InputError,
    KeyFileRefused,
    MethodError,
    PatchError,
    StateError,
    ThetaError,
    TtaError,
    WireError,
)
from tta_runtime.exit_codes import ExitCode, code_of

_BY_ERROR: tuple[tuple[type[TtaError], ExitCode], ...] = (
    (ConfigError, ExitCode.USAGE),
    (UnknownBundle, ExitCode.USAGE),
    (UnknownStream, ExitCode.USAGE),
    (UnknownSession, ExitCode.USAGE),
    (SessionExists, ExitCode.USAGE),
    (BadField, ExitCode.USAGE),
    (MethodError, ExitCode.USAGE),
    (BundleError, ExitCode.BAD_DATA),
    (InputError, ExitCode.BAD_DATA),
    (ThetaError, ExitCode.BAD_DATA),
    (StateError, ExitCode.BAD_DATA),
    (PatchError, ExitCode.BAD_DATA),
    (KeyFileRefused, ExitCode.USAGE),
    (EngineError, ExitCode.UNAVAILABLE),
    (SpoolDamaged, ExitCode.BAD_DATA),
    (SpoolError, ExitCode.UNAVAILABLE),
    (StartError, ExitCode.UNAVAILABLE),
    (ClientError, ExitCode.UNAVAILABLE),
    (ServiceError, ExitCode.UNAVAILABLE),
    (WireError, ExitCode.UNAVAILABLE),
)


def exit_code(error: TtaError) -> ExitCode:
    """The exit status of a command that ends with an error."""
    return code_of(error, _BY_ERROR, ExitCode.NEGATIVE)
