"""The built-in bundle and its test images: what `serve`, `stream digits` and `demo` use when told nothing
else.
"""

from __future__ import annotations

from pathlib import Path

from tta_edge.streams.errors import BuiltinMissing

_DIGITS = Path(__file__).resolve().parent / "digits"


def builtin_bundle() -> Path:
    """The directory of the built-in bundle: a small BatchNorm network for 8x8 digits.

    Raises:
        BuiltinMissing: this installation lacks it.
    """
    return _present(_DIGITS / "bundle")


def builtin_digits() -> Path:
    """The npz file of its 899 test images: x uint8 [899, 8, 8, 1], y [899].

    Raises:
        BuiltinMissing: this installation lacks it.
    """
    return _present(_DIGITS / "test.npz")


def _present(path: Path) -> Path:
    if not path.exists():
        raise BuiltinMissing(
            f"{path} is missing",
            "Install the package again; in a checkout run examples/train_digits/build.sh",
        )
    return path
