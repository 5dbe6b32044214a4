"""What failure tests compare before and after: the bytes below a directory, and what a model has learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tta_runtime import Model

_LARGE = 256 << 20  # beyond it, size and time must do


def files(path: Path) -> dict[str, str]:
    """Kind and content of everything below the directory, by relative name."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            found[str(file.relative_to(path))] = f"link {file.readlink()}"
        elif file.is_file() and file.stat().st_size > _LARGE:
            found[str(file.relative_to(path))] = f"{file.stat().st_size} bytes, {file.stat().st_mtime_ns}"
        elif file.is_file():
            found[str(file.relative_to(path))] = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            found[str(file.relative_to(path))] = "directory or special"
    return found


def learnt(model: Model) -> tuple[object, ...]:
    """Theta, state, steps, seed and hyper of a model, bit for bit."""
    state = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in model.state.items()}
    return model.theta.tobytes(), model.digest, state, model.steps, model.seed, model.hyper


def snapshot(path: Path, model: Model | None = None) -> tuple[object, ...]:
    """Files and theta."""
    return files(path), learnt(model) if model else None


@contextmanager
def unchanged(path: Path, model: Model | None = None) -> Iterator[None]:
    """Fail unless files and theta are the same at the end of the block."""
    before = snapshot(path, model)
    yield
    assert snapshot(path, model) == before
