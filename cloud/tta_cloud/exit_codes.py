"""What the exit status of every command means, and which error ends in which."""

from __future__ import annotations

from enum import IntEnum

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
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.UNAVAILABLE)
