"""What the exit status of every command means, and which error ends in which."""

from __future__ import annotations

from enum import IntEnum

from tta_edge.errors import (
    ClientError,
    ServiceError,
    SpoolDamaged,
    SpoolError,
    StartError,
    UnknownBundle,
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


class ExitCode(IntEnum):
    """Exit status of a command; 0 and 2 are also what the command line parser itself uses."""

    OK = 0
    NEGATIVE = 1
    USAGE = 2
    UNAVAILABLE = 3
    BAD_DATA = 4
    INTERRUPTED = 130


HELP = (
    "Exit codes: 0 ok, 1 a check failed or the result is negative, 2 usage or configuration error, "
    "3 cannot reach, bind or serve, 4 bad bundle or data, 130 interrupted."
)

_BY_ERROR: tuple[tuple[type[TtaError], ExitCode], ...] = (
    (ConfigError, ExitCode.USAGE),
    (UnknownBundle, ExitCode.USAGE),
    (UnknownStream, ExitCode.USAGE),
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
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.NEGATIVE)
