"""Disks that fail, kill their process, or record; and a daemon on such a disk in a process of its own.

As a program (`python disks.py`) this file starts daemons: each line of stdin describes one, which runs in a fork of
this process, so that the imports are paid for once. Lines on stdout tell what happens to it, see `Crashing`.
"""

from __future__ import annotations

import base64
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from running import PATIENCE_S, process_environment
from tta_runtime import tensors
from tta_runtime.atomic import Disk

T = TypeVar("T")
CALLS = (
    "make_directory", "create", "write", "sync", "replace", "remove", "remove_directory", "sync_directory",
)  # fmt: skip
"""Every call of a `Disk`."""


class Watched(Disk):
    """Hands every call to `around`, which carries it out or not."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}

    def around(self, call: str, act: Callable[[], T], path: Path, *more: Any) -> T:
        """Carry out `call` by `act`; `more` is the target of `replace` or the bytes of `write`."""
        raise NotImplementedError

    def create(self, path: Path, mode: int) -> int:
        fd = self.around("create", lambda: Disk.create(self, path, mode), path)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        return self.around("write", lambda: Disk.write(self, fd, data), self._paths[fd], data, fd)

    def sync(self, fd: int) -> None:
        self.around("sync", lambda: Disk.sync(self, fd), self._paths[fd])

    def replace(self, source: Path, target: Path) -> None:
        self.around("replace", lambda: Disk.replace(self, source, target), source, target)

    def remove(self, path: Path) -> None:
        self.around("remove", lambda: Disk.remove(self, path), path)

    def make_directory(self, path: Path) -> None:
        self.around("make_directory", lambda: Disk.make_directory(self, path), path)

    def remove_directory(self, path: Path) -> None:
        self.around("remove_directory", lambda: Disk.remove_directory(self, path), path)

    def sync_directory(self, path: Path) -> None:
        self.around("sync_directory", lambda: Disk.sync_directory(self, path), path)


def every_call_is_watched() -> bool:
    """Whether the disks here know each call of `Disk`; a new one must be added to them."""
    own = {name for name in vars(Disk) if not name.startswith("_")}
    return own == set(CALLS) and own <= set(vars(Watched))


class Failing(Watched):
    """Fails the n-th call, or every call while it is broken.

    Args:
        nth: from 1; 0 for none.
        number: errno of the failure.
        calls: which calls count and fail.

    Attributes:
        broken: set while every call fails.
        failures: how many calls have failed.
        failed: set when one has.
    """

    def __init__(self, nth: int = 0, number: int = errno.EIO, calls: tuple[str, ...] = CALLS) -> None:
        super().__init__()
        self.broken = False
        self.failures = 0
        self.count = 0
        self.failed = threading.Event()
        self._nth = nth
        self._number = number
        self._calls = calls
        self._lock = threading.Lock()

    def around(self, call: str, act: Callable[[], T], path: Path, *more: Any) -> T:
        with self._lock:
            self.count += call in self._calls
            fails = call in self._calls and (self.broken or self.count == self._nth)
            self.failures += fails
        if not fails:
            return act()
        if call == "write":  # a full disk takes what it can
            data, fd = more
            os.write(fd, data[: len(data) // 2])
        self.failed.set()
        raise OSError(self._number, os.strerror(self._number), str(path))


@dataclass(frozen=True)
class Call:
    """One recorded call: its name, the path, and target, bytes or mark."""

    name: str
    path: str
    more: Any = None


class Recording(Watched):
    """Carries out every call except the syncs, which cost time, and writes it down.

    Attributes:
        calls: in their order; a test may append `Call("mark", ..)` of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def around(self, call: str, act: Callable[[], T], path: Path, *more: Any) -> T:
        kept = bytes(more[0]) if call == "write" else str(more[0]) if more else None
        made = act() if "sync" not in call else None
        self.calls.append(Call(call, str(path), kept))  # after it: what failed has not happened
        return made  # type: ignore[return-value]


class Unsynced(Disk):
    """The real disk without the cost of syncing, for tests in which no power is lost."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        path.stat()  # a directory that is not there is an error all the same


# --- what a power cut may leave -----------------------------------------------------------------------------

Tree = dict[str, bytes | None]
"""Relative path -> content, or None for a directory."""


@dataclass
class _File:
    durable: bytes = b""
    pending: list[bytes] = field(default_factory=list)

    def contents(self) -> list[bytes]:
        """Everything that may be found: nothing of what was not synced, all, each part, half of it, zeros."""
        if not self.pending:
            return [self.durable]
        whole = b"".join(self.pending)
        found = {self.durable, self.durable + whole, self.durable + bytes(len(whole))}
        for i, part in enumerate(self.pending):
            before = self.durable + b"".join(self.pending[:i])
            found |= {before, before + part[: len(part) // 2], before + part[:-1]}
        return sorted(found)


Node = "_File | _Directory"


@dataclass
class _Directory:
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def live(self) -> dict[str, Any]:
        return self.after(self.pending)

    def after(self, changes: Any) -> dict[str, Any]:
        entries = dict(self.durable)
        for change in changes:
            for name, node in change.items():
                entries.pop(name, None)
                if node is not None:
                    entries[name] = node
        return entries

    def entries(self) -> list[dict[str, Any]]:
        """What may be found: each change that was not synced is there or not, independently of the others."""
        if len(self.pending) > 10:
            raise OverflowError("too many directory changes wait for a sync")
        return [
            self.after(itertools.compress(self.pending, kept))
            for kept in itertools.product((False, True), repeat=len(self.pending))
        ]


class PowerLoss:
    """A file system that follows recorded calls and tells what a power cut would leave at this moment.

    Only what POSIX promises is relied on: synced content is there, synced directory entries are there, a rename is
    whole or has not happened. Everything else may be there, in part, or not, in any combination; a rename from one
    directory to another may be seen in one of them only.

    Args:
        root: the directory in which everything happens; it exists and is durable.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _Directory()

    def apply(self, call: Call) -> None:
        """Follow one call; `Call("spoil", path, bytes)` is somebody who changes a file's content."""
        if call.name == "mark":
            return
        if call.name == "sync_directory":
            directory = self._find(call.path)
            if directory is not None:
                directory.durable, directory.pending = directory.live(), []
            return
        parent, name = self._parent(call.path)
        entry = parent.live().get(name)
        if call.name == "make_directory":
            parent.pending.append({name: _Directory()})
        elif call.name == "create":
            parent.pending.append({name: _File()})
        elif call.name == "write":
            entry.pending.append(call.more)
        elif call.name == "spoil":
            entry.durable, entry.pending = call.more, []
        elif call.name == "sync":
            entry.durable, entry.pending = entry.durable + b"".join(entry.pending), []
        elif call.name in ("remove", "remove_directory"):
            parent.pending.append({name: None})
        else:
            other, new = self._parent(call.more)
            if other is parent:
                parent.pending.append({name: None, new: entry})
            else:
                parent.pending.append({name: None})
                other.pending.append({new: entry})

    def trees(self) -> Iterator[Tree]:
        """Every tree that may be found after a power cut now."""
        seen = set()
        for tree in self._trees(self._top, ""):
            key = tuple(sorted((path, content) for path, content in tree.items() if content is not None))
            names = tuple(sorted(tree))
            if (names, key) not in seen:
                seen.add((names, key))
                yield tree

    def _trees(self, node: Any, path: str) -> Iterator[Tree]:
        if isinstance(node, _File):
            yield from ({path: content} for content in node.contents())
            return
        for entries in node.entries():
            parts = [
                list(self._trees(child, f"{path}/{name}" if path else name))
                for name, child in sorted(entries.items())
            ]
            for combination in itertools.product(*parts):
                tree: Tree = {path: None} if path else {}
                for part in combination:
                    tree |= part
                yield tree

    def _find(self, path: str) -> _Directory | None:
        """A directory inside the root; None for those around it."""
        place = Path(path)
        if place != self._root and self._root not in place.parents:
            return None
        node: Any = self._top
        for part in place.relative_to(self._root).parts:
            node = node.live()[part]
        assert isinstance(node, _Directory)
        return node

    def _parent(self, path: str) -> tuple[_Directory, str]:
        directory = self._find(str(Path(path).parent))
        assert directory is not None
        return directory, Path(path).name


def plant(tree: Tree, root: Path) -> None:
    """Make a tree on the disk."""
    root.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


# --- a daemon that tells what it does to the disk, in a process of its own -------------------------------------


class Telling(Watched):
    """Prints a line before and after each call, and kills the process at one of them.

    Args:
        root: paths are told relative to it.
        arm: as long as this file does not exist, calls are not counted.
        kill_at: number of the call, from 1, counted from then on; 0 for none.
        when: `before` the call, `after` it, or `half` of what it would write.
    """

    def __init__(self, root: Path, arm: Path, kill_at: int = 0, when: str = "before") -> None:
        super().__init__()
        self._root = root
        self._arm = arm
        self._kill_at = kill_at
        self._when = when
        self._count = 0

    def around(self, call: str, act: Callable[[], T], path: Path, *more: Any) -> T:
        armed = self._arm.exists()
        self._count += armed
        line = {"call": call, "path": self._name(path), "armed": armed}
        if call == "replace":
            line |= {"target": self._name(more[0]), "holds": _held(path)}
        say(line | {"when": "before"})
        hit = armed and self._count == self._kill_at
        if hit and self._when == "half" and call == "write":
            os.write(more[1], more[0][: len(more[0]) // 2])
        if hit and self._when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            made = act()
            say(line | {"when": "after"})
        except OSError:
            say(line | {"when": "failed"})
            if not hit:
                raise
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self._root)


def _held(path: Path) -> dict[str, object]:
    """What a file that is about to be renamed holds: of a state file its generation, steps and theta."""
    data = path.read_bytes()
    try:
        arrays, metadata = tensors.decode(data)
    except tensors.TensorsMalformed:
        return {"text": data.decode(errors="replace")[:200]}
    theta = base64.b64encode(arrays["theta"].tobytes()).decode()
    return {"generation": int(metadata["generation"]), "steps": int(metadata.get("steps", 0)), "theta": theta}


def say(line: dict[str, object]) -> None:
    """One line of JSON in one write: a killed process has written it or not."""
    os.write(1, json.dumps(line).encode() + b"\n")


def serve(form: dict[str, Any]) -> None:
    """Run the daemon that a line of stdin describes."""
    from tta_edge.config import Config
    from tta_edge.service import Server

    config = Config(**form["config"])
    assert config.state_dir is not None
    disk = Telling(
        Path(config.state_dir), Path(form["arm"]), form.get("kill_at", 0), form.get("when", "before")
    )
    server = Server(config, disk=disk, on_ready=lambda endpoint: say({"ready": endpoint}))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()


def main() -> None:
    """Fork a daemon for each line of stdin, one at a time."""
    import onnxruntime  # noqa: F401 - paid for once

    import tta_edge.service  # noqa: F401

    say({"begun": os.getpid()})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say({"pid": os.getpid()})
            status = 1
            try:
                serve(json.loads(line))
                status = 0
            except Exception:
                traceback.print_exc()
                raise
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        say({"exit": os.waitstatus_to_exitcode(status)})


class Crashing:
    """Starts daemons on a `Telling` disk, one after the other, by one forking process.

    Args:
        config: of all of them.
        arm: see `Telling`.

    Attributes:
        said: the lines of the present daemon.
        forked_s: when it was started, its imports already done.
    """

    def __init__(self, config: dict[str, object], arm: Path) -> None:
        self.said: list[dict[str, Any]] = []
        self._config = {"bind": "tcp://127.0.0.1:0", "http": "off", "threads": 1, **config}
        self._arm = arm
        environment = process_environment(OPENBLAS_NUM_THREADS="1")
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._pid = 0
        self.forked_s = 0.0

    def start(self, kill_at: int = 0, when: str = "before") -> str:
        """Start a daemon; gives its endpoint when it is ready."""
        self.launch(kill_at, when)
        line = self.wait_for("ready", "exit")
        assert "ready" in line, "the daemon does not start"
        return str(line["ready"])

    def launch(self, kill_at: int = 0, when: str = "before") -> None:
        """Start a daemon and do not wait for it."""
        self.said = []
        form = {"config": self._config, "arm": str(self._arm), "kill_at": kill_at, "when": when}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(form) + "\n")
        self.process.stdin.flush()
        self._pid = self.wait_for("pid")["pid"]
        self.forked_s = time.perf_counter()

    def wait_for(self, *keys: str) -> dict[str, Any]:
        """The next line that has one of the keys."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line: dict[str, Any] = json.loads(text)
            self.said.append(line)
            if any(key in line for key in keys):
                return line
        raise AssertionError("the process that starts daemons has ended")

    def signal(self, number: int) -> None:
        """Send a signal to the daemon."""
        os.kill(self._pid, number)

    def kill(self) -> None:
        """kill -9, if it still runs."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def ended(self) -> int:
        """Wait until the daemon has ended; its exit status, or minus the signal that ended it."""
        return int(self.wait_for("exit")["exit"])

    def calls(self) -> list[str]:
        """The armed calls of the present daemon."""
        return [each["call"] for each in self.said if each.get("when") == "before" and each["armed"]]

    def __enter__(self) -> Crashing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemon, if it runs, and the process that starts them."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.poll() is None and self._pid and not any("exit" in line for line in self.said):
            self.kill()
        self.process.wait(PATIENCE_S)


# --- what must be there after a kill -------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A committed slot: its file's name, generation, steps and theta."""

    name: str
    generation: int
    steps: int
    theta: bytes


class History:
    """What is on the disk, from the lines that daemons have said about it.

    Attributes:
        slots: (bundle, stream) -> slot file -> what it holds.
        switch: whether adaptation is on.
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[str, str], dict[str, Slot]] = {}
        self.switch = True
        self._begun: dict[str, Any] | None = None

    def follow(self, lines: list[dict[str, Any]]) -> None:
        """Take what one daemon said, to its end."""
        self._begun = None
        for line in lines:
            if line.get("when") == "before":
                self._begun = line
            elif line.get("when") == "after":
                self._begun = None
                self._apply(line)
            elif line.get("when") == "failed":
                self._begun = None

    def outcomes(self) -> list[History]:
        """What may be found after the kill: as followed, or with the call that was under way."""
        if self._begun is None:
            return [self]
        other = History()
        other.slots = {key: dict(slots) for key, slots in self.slots.items()}
        other.switch = self.switch
        other._apply(self._begun)
        return [self, other]

    def newest(self, key: tuple[str, str]) -> Slot | None:
        """The slot that must be served; None for the source."""
        return max(self.slots.get(key, {}).values(), key=lambda slot: slot.generation, default=None)

    def _apply(self, line: dict[str, Any]) -> None:
        target = Path(line.get("target", line["path"]))
        if target.name == "switch.json" and line["call"] == "replace":
            self.switch = json.loads(line["holds"]["text"])["adapt"]
        if not target.name.endswith(".state") or target.parts[0] != "streams":
            return
        slots = self.slots.setdefault((target.parts[1], target.parts[2]), {})
        if line["call"] == "remove":
            slots.pop(target.name, None)
        elif line["call"] == "replace":
            holds = line["holds"]
            theta = base64.b64decode(holds["theta"])
            slots[target.name] = Slot(target.name, holds["generation"], holds["steps"], theta)


if __name__ == "__main__":
    main()
