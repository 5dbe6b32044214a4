"""A directory that appears complete or not at all: written beside its place, renamed at the end."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tta_exporters.errors import OutputExists, OutputUnwritable


def check_free(out: Path) -> None:
    """Refuses a place that holds something, before any work is done.

    Raises:
        OutputExists: ``out`` is a file or a directory that is not empty.
    """
    target = out.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExists(f"{out} exists and is not empty", "Remove it or choose another -o")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``out`` if the block ends without an error and else vanishes.

    Raises:
        OutputExists: see :func:`check_free`.
        OutputUnwritable: nothing can be made there.
    """
    check_free(out)
    target = out.resolve()
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputUnwritable(f"{out} cannot be made: {error.strerror}", "Choose another -o") from error
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
