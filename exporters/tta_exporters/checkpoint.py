"""The file that lets a training run go on: its tensors, and which run and which step they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tta_exporters.adapter_file import read_tensors, write_tensors
from tta_exporters.errors import CheckpointMismatch, SourceError


def write_checkpoint(file: Path, kind: str, mark: str, tensors: Mapping[str, Tensor], step: int) -> None:
    """Writes a checkpoint atomically.

    Args:
        file: where to.
        kind: of the run, e.g. "tta-warm-up".
        mark: what the run that takes it up must agree on.
        tensors: everything that the next step follows from, by name.
        step: how many are done.

    Raises:
        OutputUnwritable: it cannot be written there.
    """
    write_tensors(file, tensors, {"format": kind, "fingerprint": mark, "step": str(step)})


def read_checkpoint(
    file: Path, kind: str, mark: str, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Tensors and step of a checkpoint of this very run.

    Args:
        file: what :func:`write_checkpoint` wrote.
        kind: as it was written.
        mark: likewise.
        wanted: tensors of the names and shapes that the run has.

    Raises:
        CheckpointMismatch: it cannot be read, belongs to another run, or holds other tensors.
    """
    fix = f"Give the same options and data, or remove {file} to begin anew"
    try:
        tensors, facts = read_tensors(file)
    except SourceError as error:
        raise CheckpointMismatch(f"{error.cause}", fix) from error
    if facts.get("format") != kind or facts.get("fingerprint") != mark:
        raise CheckpointMismatch(
            f"{file.name} belongs to another run ({facts.get('fingerprint', 'none')[:12]}, this is {mark[:12]})",
            fix,
        )
    if {name: value.shape for name, value in tensors.items()} != {
        name: value.shape for name, value in wanted.items()
    } or not facts.get("step", "").isdecimal():
        raise CheckpointMismatch(f"{file.name} holds other arrays than a run writes", fix)
    return tensors, int(facts["step"])
