"""Which TensorRT is installed. `tensorrt` and `tensorrt_rtx` have the same interface; they know different GPUs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import GpuUnsupported, LibraryMissing, LibraryUnsuitable

FLAVOURS = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 4)}
"""Module -> oldest version that has what is used here. The first one that loads is taken: it knows more GPUs."""
RTX = "tensorrt_rtx"
OLDEST_CAPABILITY = (7, 5)
"""Of the GPUs that TensorRT 10 knows."""


@dataclass(frozen=True)
class TrtLibrary:
    """A TensorRT that was loaded.

    Attributes:
        module: what was imported.
        flavour: its name, a key of `FLAVOURS`.
        version: as it says.
    """

    module: Any
    flavour: str
    version: str

    @property
    def name(self) -> str:
        """For people: "tensorrt 10.13.3.9" or "tensorrt-rtx 1.7.1.116"."""
        return f"{self.flavour.replace('_', '-')} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, whose builder needs no GPU and must not be given a timing cache."""
        return self.flavour == RTX

    def check_capability(self, capability: tuple[int, int], gpu: str) -> None:
        """Whether it builds for GPUs of a compute capability.

        Args:
            capability: e.g. (8, 9).
            gpu: its name, for the message.

        Raises:
            GpuUnsupported: it does not.
        """
        major, minor = capability
        if self.is_rtx:
            known = self.capabilities()
            fits = capability in known
            text = ", ".join(f"{a}.{b}" for a, b in known)
        else:
            fits, text = capability >= OLDEST_CAPABILITY, "{}.{} and later".format(*OLDEST_CAPABILITY)
        if not fits:
            other = "`pip install tensorrt`" if self.is_rtx else "an older TensorRT"
            raise GpuUnsupported(
                f"{gpu} has compute capability {major}.{minor}, {self.name} knows {text}",
                f"Install {other}, or choose engine `cuda` or `cpu`",
            )

    def capabilities(self) -> list[tuple[int, int]]:
        """The compute capabilities that the builder of TensorRT for RTX can be told."""
        names = self.module.ComputeCapability.__members__
        found = [re.fullmatch(r"SM(\d+)(\d)", name) for name in names]
        return sorted((int(match[1]), int(match[2])) for match in found if match)


def load(
    flavours: Sequence[str] = tuple(FLAVOURS), find: Callable[[str], Any] = importlib.import_module
) -> TrtLibrary:
    """The first TensorRT that can be loaded.

    Args:
        flavours: modules to try, in this order.
        find: imports a module by its name.

    Raises:
        LibraryMissing: none of them is installed, or their libraries cannot be loaded.
        LibraryUnsuitable: what is installed is too old.
    """
    missing, old = [], []
    for flavour in flavours:
        try:
            module = find(flavour)
        except (ImportError, OSError, RuntimeError) as error:  # a library missing below, or one too many
            missing.append(f"{flavour}: {' '.join(str(error).split())}")
            continue
        version = str(getattr(module, "__version__", "0"))
        if _numbers(version) < FLAVOURS[flavour]:
            least = ".".join(map(str, FLAVOURS[flavour]))
            old.append(f"{flavour} is {version}, needed is {least} or later")
            continue
        return TrtLibrary(module, flavour, version)
    if old:
        raise LibraryUnsuitable("; ".join(old), "Run `pip install --upgrade` for that package")
    raise LibraryMissing(
        f"no TensorRT can be loaded ({'; '.join(missing)})",
        "Run `tta-edge doctor`, which says which package fits this machine",
    )


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
