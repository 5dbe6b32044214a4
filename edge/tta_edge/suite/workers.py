"""Independent tasks in processes of their own. Nothing polls: a message, or the end of a process, wakes the waiter."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from tta_edge.suite.errors import WorkerLost
from tta_runtime.errors import TtaError

PROGRESS_SAMPLES = 256
"""A worker tells of its progress when so many samples are done."""
END_S = 5.0
"""A worker that was told to end is waited for so long, then killed."""

Tell = Callable[[int], None]
"""Told how many samples were done since the last call."""


class Actor(Protocol):
    """Does tasks, one after the other, in one process."""

    def do(self, task: Any, progress: Tell) -> Any:
        """The result of a task. Task and result cross a process border.

        Raises:
            TtaError: handed to whoever waits.
        """


def in_order(
    make: Callable[[], Actor], tasks: Iterable[Any], done: Callable[[Any], None], progress: Tell
) -> None:
    """All tasks in this process.

    Args:
        make: the actor.
        tasks: in order.
        done: takes each result.
        progress: of the samples.

    Raises:
        TtaError: what a task raises; those before it are done.
    """
    actor = make()
    for task in tasks:
        done(actor.do(task, progress))


def in_parallel(
    make: Callable[[], Actor],
    tasks: Iterable[Any],
    done: Callable[[Any], None],
    progress: Tell,
    *,
    jobs: int,
) -> None:
    """All tasks in worker processes, which are gone afterwards.

    Args:
        make: the actor; called in each worker, so it and what it holds cross a process border.
        tasks: handed out in order, each to the first worker that is free.
        done: takes each result, in this process.
        progress: of the samples, likewise.
        jobs: workers at most.

    Raises:
        TtaError: what a task raises; the others that ran are given up.
        WorkerLost: a worker ended without a word.
    """
    waiting = deque(tasks)
    # A forked child would inherit the locks of the engines' threads.
    context = multiprocessing.get_context("spawn")
    workers = [_Worker.start(context, make) for _ in range(min(jobs, len(waiting)))]
    try:
        for worker in workers:
            worker.connection.send(waiting.popleft())
            worker.busy = True
        while any(worker.busy for worker in workers):
            ready = wait([worker.connection for worker in workers if worker.busy])
            for worker in workers:
                if worker.connection in ready:
                    _take(worker, waiting, done, progress)
    finally:
        for worker in workers:
            worker.end()


def _take(worker: _Worker, waiting: deque[Any], done: Callable[[Any], None], progress: Tell) -> None:
    """One message of a worker."""
    try:
        kind, content = worker.connection.recv()
    except (EOFError, ConnectionError) as error:
        worker.process.join(END_S)
        raise WorkerLost(
            f"a worker ended with the status {worker.process.exitcode}",
            "Use fewer --jobs if memory ran out; with a --store what is done is kept",
        ) from error
    if kind == "failed":
        raise content
    if kind == "progress":
        progress(content)
        return
    done(content)
    worker.busy = bool(waiting)
    if waiting:
        worker.connection.send(waiting.popleft())


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection[Any, Any]
    busy: bool = field(default=False)

    @classmethod
    def start(cls, context: Any, make: Callable[[], Actor]) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, make), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def end(self) -> None:
        self.connection.close()
        if self.busy:  # in the middle of something nobody wants any more
            self.process.terminate()
        self.process.join(END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(connection: Connection[Any, Any], make: Callable[[], Actor]) -> None:
    """A worker's life: tasks until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process ends us
    gathered = 0

    def progress(samples: int) -> None:
        nonlocal gathered
        gathered += samples
        if gathered >= PROGRESS_SAMPLES:
            connection.send(("progress", gathered))
            gathered = 0

    try:
        actor = make()
        while True:
            result = actor.do(connection.recv(), progress)
            connection.send(("progress", gathered))
            gathered = 0
            connection.send(("done", result))
    except TtaError as error:
        connection.send(("failed", error))
    except (EOFError, ConnectionError):
        return
