"""The bar of a long training run on a terminal, and how an interrupt ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tta_exporters.errors import Interrupted


@contextmanager
def training_bar(doing: str, checkpoint: Path) -> Iterator[Callable[[int, int, float], None]]:
    """Shows a run on stderr while the block trains.

    Args:
        doing: shown before the first step.
        checkpoint: what an interrupted run leaves.

    Yields:
        To be told (step, all steps, loss) after each step.

    Raises:
        Interrupted: instead of KeyboardInterrupt; says how to go on.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)

        def tell(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, description=f"loss {loss:.3f}")

        try:
            yield tell
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped, {checkpoint} holds how far it came", "Run the same command to go on"
            ) from error
