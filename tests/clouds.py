"""Clouds as processes that can be killed, and edges that note what the link has told them.

As a program (`python clouds.py`) this file starts clouds: each line of stdin describes one, which runs the command
`tta-cloud serve` in a fork of this process, so that the imports are paid for once.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np

from networks import SIZE
from running import PATIENCE_S, process_environment
from serving import until
from tta_cloud import control, edges, identity
from tta_edge.base import Base, own
from tta_edge.cloud import CloudLink
from tta_edge.enrol import enrol, load
from tta_edge.spool import Spool
from tta_edge.spool_file import Sample
from tta_edge.teaching import Progress
from tta_edge.uplink_events import Acknowledged, Event, GivenUp, HeadCame, PatchCame
from tta_edge.uplink_options import UplinkOptions
from tta_runtime import sealed as seals
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.enrolment import Ticket, encode_ticket

FAR_MS = 2**52
EAGER = UplinkOptions(
    answer_s=0.5,
    max_answer_s=2.0,
    ping_s=0.5,
    connect_s=1.0,
    wait_s=0.05,
    max_wait_s=0.2,
    refetch_s=0.5,
    patch_bytes=32 << 10,
    slow_bytes_per_s=256 << 10,
)
"""A link that notices a dead line within 2 s and comes back within 0.2 s."""


# --- the program ------------------------------------------------------------------------------------


def say(**line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def serve(form: dict[str, Any]) -> None:
    """The command; or the same service with a clock that is off by as much as a file says, or one that dies."""
    if form["clock"] is None and form["die"] is None:
        from tta_cloud.cli import main

        main(["serve", *form["arguments"]])
        return
    from tta_cloud.config import resolve
    from tta_cloud.start import start

    if form["die"] is not None:
        _die_at(*form["die"])
    off = form["clock"]
    server = start(
        resolve(flags=form["flags"], environment={}, file=Path(form["file"])),
        clock_s=time.time if off is None else lambda: time.time() + float(Path(off).read_text()),
    )
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.on_ready = lambda: print(f"ready {server.endpoint} {server.door}", file=sys.stderr, flush=True)
    server.run()


POINTS = ("before-commit", "after-commit", "before-ledger", "after-ledger", "after-push")
"""Where a service can be made to die: around the commit of whatever waits; between what a learner has learned and
its round in the store; between the ledger and the first head; and after a head that names a patch, before the ledger
says that it is published.
"""


def _die_at(point: str, nth: int) -> None:
    """Let the service of this process end by SIGKILL when it comes to a point for the n-th time."""
    import functools

    import tta_cloud.publishing
    import tta_cloud.service
    import tta_cloud.start

    left = [nth]
    pushed = threading.Event()

    def reach(found: str) -> None:
        left[0] -= found == point
        if found == point and left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def commit(name: str) -> None:
        if name == "commit.before" and pushed.is_set():
            threading.Event().wait(0.2)  # until the head is with the edge
            reach("after-push")
        reach({"commit.before": "before-commit", "commit.after": "after-commit"}.get(name, ""))

    class Dying(tta_cloud.service.CloudServer):
        def _learned(self, published: Any) -> None:
            reach("after-ledger")
            super()._learned(published)

        def _begin(self, published: Any) -> None:
            super()._begin(published)
            pushed.set()

    make_patch = tta_cloud.publishing.make_patch

    def made(*arguments: Any, **named: Any) -> Any:
        reach("before-ledger")
        return make_patch(*arguments, **named)

    tta_cloud.publishing.make_patch = made
    tta_cloud.service.Store = functools.partial(tta_cloud.service.Store, fail_point=commit)  # type: ignore[misc, assignment]
    tta_cloud.start.CloudServer = Dying  # type: ignore[misc]


def run_program() -> None:
    import onnxruntime  # noqa: F401 - paid for once

    import tta_cloud.start  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                serve(json.loads(line))
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                os._exit(status)
        say(pid=child)
        _, status = os.waitpid(child, 0)
        say(exit=os.waitstatus_to_exitcode(status))


# --- a cloud ----------------------------------------------------------------------------------------


class Program:
    """This file as a program, which starts services one after the other; a context.

    Attributes:
        log: what they have written to stderr, line by line.
        ready: set while one is ready.
        endpoint: where it listens.
        door: where edges enrol with it.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.ready = threading.Event()
        self.endpoint = self.door = ""
        self._said: queue.SimpleQueue[dict[str, int]] = queue.SimpleQueue()
        environment = process_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for read, pipe in ((self._read_said, self._process.stdout), (self._read_log, self._process.stderr)):
            threading.Thread(target=read, args=(pipe,), daemon=True).start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)

    def launch(self, form: dict[str, object]) -> int:
        """Start a service and do not wait until it is ready; its process."""
        self.ready.clear()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(form) + "\n")
        self._process.stdin.flush()
        return self._said.get(timeout=PATIENCE_S)["pid"]

    def ended(self) -> int:
        """Wait until the service has ended; its status."""
        return self._said.get(timeout=PATIENCE_S)["exit"]

    def _read_said(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._said.put(json.loads(line))

    def _read_log(self, pipe: IO[str]) -> None:
        for line in pipe:
            self.log.append(line.rstrip("\n"))
            found = re.match(r"ready (\S+) (\S+)", line)
            if found:
                self.endpoint, self.door = found[1], found[2]
                self.ready.set()


class Cloud:
    """One store and the services that hold it, one after the other; a context.

    Args:
        program: starts them.
        store: its directory, made with keys if need be.
        bundle: student and teacher.
        settings: more lines of the configuration file.
        clock: file with the seconds by which the service's clock is off; None for the command with a true clock.

    Attributes:
        endpoint: where edges connect; the same for all services.
        door: where they enrol.
        pid: of the present one.
    """

    def __init__(
        self, program: Program, store: Path, bundle: Path, settings: str = "", *, clock: Path | None = None
    ) -> None:
        self.program = program
        self.store = store
        if not store.exists():
            identity.create(store)
        self.endpoint = self.door = "tcp://127.0.0.1:0"
        self.pid = 0
        self._log_from = len(program.log)
        self._bundle = bundle
        self._clock = clock
        self._file = store / "cloud.toml"
        self._file.write_text(
            "head_every_s = 0.2\n"
            + settings
            + ("" if "[learner]" in settings else "[learner]\nnew = 8\nreplay = 8\nrounds = 1\n")
        )

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, die: tuple[str, int] | None = None) -> None:
        """Start a service and wait until it is ready; see `launch`."""
        self.launch(die)
        assert self.program.ready.wait(PATIENCE_S), self.log[-20:]
        self.endpoint, self.door = self.program.endpoint, self.program.door

    def launch(self, die: tuple[str, int] | None = None) -> None:
        """Start a service and do not wait for it; it dies when it comes to one of `POINTS` for the n-th time."""
        assert not self.pid
        flags = {
            "student": str(self._bundle), "teacher": str(self._bundle), "store": str(self.store),
            "bind": self.endpoint, "enroll_bind": self.door,
        }  # fmt: skip
        arguments = ["--config", str(self._file)]
        for key, value in flags.items():
            arguments += [f"--{key.replace('_', '-')}", value]
        form = {
            "arguments": arguments, "flags": flags, "file": str(self._file),
            "clock": None if self._clock is None else str(self._clock),
            "die": die,
        }  # fmt: skip
        self.pid = self.program.launch(form)

    def send(self, number: int) -> None:
        """Send the service a signal."""
        os.kill(self.pid, number)

    def kill(self) -> int:
        """kill -9 of the whole service, and wait for its end; its status."""
        return self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        if not self.pid:
            return 0
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self.ended()

    def ended(self) -> int:
        """Wait until the service has ended by itself; its status."""
        status = self.program.ended()
        self.pid = 0
        return status

    @property
    def log(self) -> list[str]:
        """What its services have written."""
        return self.program.log[self._log_from :]

    @property
    def data(self) -> Path:
        """Where its database is."""
        return self.store / "data"

    def rss(self) -> int:
        """Resident bytes of the service."""
        return _memory(self.pid, "VmRSS")

    def peak(self) -> int:
        """The most resident bytes that the service had."""
        return _memory(self.pid, "VmHWM")

    def enrol(self, state_dir: Path, name: str = "camera", group: str = "yard") -> None:
        """Enrol an edge with a service that runs."""
        secret = f"{name}-secret-of-some-length"
        control.leave(self.store, control.LetEnrol(edges.hash_of(secret), name, group, FAR_MS))
        key = identity.load(self.store).curve_public
        enrol(encode_ticket(Ticket(door=self.door, server_key=key, secret=secret, name=name)), state_dir)


def _memory(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def point(state_dir: Path, endpoint: str) -> None:
    """Let an enrolled edge find its cloud at another address: a relay's."""
    path = state_dir / "cloud" / "link.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "endpoint": endpoint, "check": ""}))


# --- an edge ----------------------------------------------------------------------------------------


class Kept(Spool):
    """A spool that notes the keys of what was handed in."""

    def __init__(self, directory: Path, **more: Any) -> None:
        self.keys: list[str] = []
        super().__init__(directory, **more)

    def append_many(self, samples: Sequence[Sample]) -> list[str]:
        made = super().append_many(samples)
        self.keys += made
        return made


class Edge(CloudLink):
    """The link of an edge that commits every patch at once, and notes everything; a context.

    Args:
        state_dir: where it is enrolled.
        bundle: that it serves.
        base: to begin with.
        verdict: on every patch.
        options: of the link.
        more: of `CloudLink`.

    Attributes:
        acknowledged: key -> whether it was stored, and why not.
        twice: keys that were acknowledged a second time.
        given_up: keys.
        patches: (epoch, seq) -> digest of the signed body and payload, of every patch that came.
        staged: (epoch, seq) of those that were offered, in order.
        base: what it serves.
        dates: of the heads that came.
    """

    def __init__(
        self,
        state_dir: Path,
        bundle: Bundle,
        *,
        base: Base | None = None,
        verdict: Literal["committed", "refused", "staged"] = "committed",
        options: UplinkOptions | None = EAGER,
        endpoint: str = "",
        spool: Kept | None = None,
        **more: Any,
    ) -> None:
        self.acknowledged: dict[str, tuple[bool, str]] = {}
        self.twice: list[str] = []
        self.given_up: list[str] = []
        self.patches: dict[tuple[int, int], str] = {}
        self.staged: list[tuple[int, int]] = []
        self.dates: list[int] = []
        self.base = base or own(bundle)
        self.verdict = verdict
        self.kept = spool or Kept(state_dir / "spool")
        self._layout = bundle.manifest.theta
        found = load(state_dir)
        if endpoint:
            found = replace(found, link=msgspec.structs.replace(found.link, endpoint=endpoint))
        super().__init__(
            found, bundle, "cloud", lambda: self.base, self._stage, self.kept, max_distance=1e9,
            options=options, **more,
        )  # fmt: skip

    def __enter__(self) -> Edge:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def phase(self) -> str:
        """How far the link is."""
        return self.info(seen=0, chosen=0).phase

    @property
    def problem(self) -> str:
        """What stands in its way."""
        return self.info(seen=0, chosen=0).problem

    def link_head(self) -> str:
        """Epoch and number of the newest patch that it has been told of."""
        return self.info(seen=0, chosen=0).head

    def take(self, count: int, seed: int) -> None:
        """Hand in samples whose content follows from the seed."""
        draw = np.random.default_rng(seed)
        self.send(
            [
                Sample.of(
                    draw.random((3, SIZE, SIZE), dtype=np.float32), stream="s", taken_ms=int(time.time() * 1000),
                    seq=self.base.seq, entropy=0.5,
                )
                for _ in range(count)
            ]
        )  # fmt: skip

    def present_now(self) -> None:
        """Say in the next hello what it serves now."""
        self._calls.put(lambda: self._uplink.present(self._hello()))

    def settled(self, count: int) -> None:
        """Wait until so many samples were handed in and each is acknowledged."""
        look(lambda: (len(self.kept.keys) >= count and not len(self.kept), len(self.kept)), lambda f: f[0])

    def _do(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Acknowledged):
                if event.key in self.acknowledged:
                    self.twice.append(event.key)
                self.acknowledged[event.key] = event.stored, event.reason
            elif isinstance(event, GivenUp) and event.key:
                self.given_up.append(event.key)
            elif isinstance(event, HeadCame):
                self.dates.append(msgspec.msgpack.decode(seals.decode(event.sealed).body)["issued_s"])
            elif isinstance(event, PatchCame):
                self._note(event.sealed, bytes(event.payload))
        super()._do(events)

    def _note(self, sealed: bytes, payload: bytes) -> None:
        body = seals.decode(sealed).body
        order = msgspec.msgpack.decode(body)
        name, found = (order["epoch"], order["seq"]), content(body, payload)
        assert self.patches.setdefault(name, found) == found, f"{name} came with another content"

    def _stage(self, epoch: int, seq: int, theta: Any, report: Callable[[Progress], None]) -> None:
        self.staged.append((epoch, seq))
        verdict = self.verdict
        if verdict == "committed":
            self.base = Base(epoch, seq, theta, epoch, seq)
        elif verdict == "refused":
            self.base = replace(self.base, seen_epoch=epoch, seen_seq=seq)
        digest = thetas.digest(self._layout, np.asarray(self.base.theta))
        report(Progress(epoch, seq, "staged", "", "", digest))
        if verdict != "staged":
            why = "collapse" if verdict == "refused" else ""
            report(Progress(epoch, seq, verdict, why, "", digest))


def content(body: bytes, payload: bytes) -> str:
    """What makes two patches the same."""
    return hashlib.sha256(body + payload).hexdigest()


def look(see: Callable[[], Any], good: Callable[[Any], bool] = bool) -> Any:
    """`until`, for what costs no round trip: the processor is left to the others meanwhile."""
    pause = threading.Event()
    return until(lambda: (pause.wait(0.01), see())[1], good)


if __name__ == "__main__":
    run_program()
    os._exit(0)  # taking down the imports would take seconds
