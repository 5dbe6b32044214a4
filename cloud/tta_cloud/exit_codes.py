"""Which error ends a command in which exit status."""

from __future__ import annotations

from tta_cloud.errors import NothingToDo, NotPinnable, Refused, UnknownEdge, UnknownGroup, UnknownPatch
from tta_runtime.errors import (
    BundleError,
    ConfigError,
    KeyFileRefused,
    PatchError,
    StateError,
    ThetaError,
    TtaError,
)
from tta_runtime.exit_codes import ExitCode, code_of

_BY_ERROR: tuple[tuple[type[TtaError], ExitCode], ...] = (
    (ConfigError, ExitCode.USAGE),
    (KeyFileRefused, ExitCode.USAGE),
    (UnknownEdge, ExitCode.USAGE),
    (UnknownGroup, ExitCode.USAGE),
    (UnknownPatch, ExitCode.USAGE),
    (Refused, ExitCode.NEGATIVE),
    (NotPinnable, ExitCode.NEGATIVE),
    (NothingToDo, ExitCode.NEGATIVE),
    (BundleError, ExitCode.BAD_DATA),
    (StateError, ExitCode.BAD_DATA),
    (PatchError, ExitCode.BAD_DATA),
    (ThetaError, ExitCode.BAD_DATA),
)


def exit_code(error: TtaError) -> ExitCode:
    """The exit status of a command that ends with an error."""
    return code_of(error, _BY_ERROR, ExitCode.UNAVAILABLE)
