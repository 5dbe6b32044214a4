"""What the exit status of a command means, for the commands of both services."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from tta_runtime.errors import TtaError


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


def code_of(
    error: TtaError, by_error: Iterable[tuple[type[TtaError], ExitCode]], otherwise: ExitCode
) -> ExitCode:
    """The exit status of a command that ends with an error.

    Args:
        error: that ended it.
        by_error: kinds of errors and their codes; the first that fits counts.
        otherwise: where none fits.
    """
    return next((code for kind, code in by_error if isinstance(error, kind)), otherwise)
