"""From a patch that is made to the edges that have it on probation: one edge, and many at once; and what an edge costs.

The cloud is `tta-cloud serve` in a process of its own. An edge is what a daemon has of it: the link with its thread,
its keys, its encrypted socket, its spool and all verification; models, which no patch waits for until it is on
probation, are left out. One edge sends samples so that the cloud learns and publishes; rounds are short, the gate has
no say, and there are no canaries, so that what is measured is the way of a patch. It begins when the patch is signed:
its commit to the cloud's disk is part of it.

Example: python benchmarks/cloud_fleet_load.py --student BUNDLE --teacher BUNDLE --json cloud_fleet_load.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tta_cloud import control, ledger
from tta_cloud.control import LetEnrol
from tta_cloud.edges import hash_of, new_token
from tta_cloud.gate import held_out
from tta_cloud.identity import load
from tta_cloud.reading import read
from tta_edge.base import Base, own
from tta_edge.cloud import CloudLink
from tta_edge.config import Config
from tta_edge.enrol import enrol
from tta_edge.spool import Spool
from tta_edge.spool_file import Sample
from tta_edge.teaching import Progress, Report
from tta_runtime import theta as thetas
from tta_runtime.bundle import Bundle
from tta_runtime.enrolment import Ticket, encode_ticket
from tta_runtime.theta import Vector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cloud_fleet"))  # its processes

from processes import PATIENCE_S, Cloud, cloud

GROUP = "load"
NEW = 8
"""Samples of a round."""
SETTINGS = {
    "learner": {"new": NEW, "replay": 0, "rounds": 1},
    "gate": {"min_samples": 1_000_000_000},
    "rollout": {"canary_share": 1.0},
}
STEPS = (1, 10, 50)
"""Numbers of edges at which the cloud's memory is looked at."""


class Staged:
    """When each edge had each patch; for any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_s: dict[int, dict[int, float]] = {}

    def note(self, edge: int, seq: int) -> None:
        """Now."""
        with self._changed:
            self._at_s.setdefault(seq, {})[edge] = time.time()
            self._changed.notify_all()

    def wait(self, seq: int, edges: int) -> list[float]:
        """Seconds since 1970, of each of so many edges, once all of them have it.

        Raises:
            TimeoutError: they have not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._at_s.get(seq, ())) >= edges, PATIENCE_S):
                raise TimeoutError(f"{len(self._at_s.get(seq, ()))} of {edges} edges have patch {seq}")
            return list(self._at_s[seq].values())


class Edge:
    """One edge's link; whatever it is offered it takes at once.

    Args:
        number: of the edge.
        service: the cloud.
        bundle: that it would serve.
        folder: its state directory.
        staged: is told of patches.
    """

    def __init__(self, number: int, service: Cloud, bundle: Bundle, folder: Path, staged: Staged) -> None:
        self._number, self._bundle, self._staged = number, bundle, staged
        self._base = own(bundle)
        secret = new_token()
        expires_ms = int((time.time() + 3600) * 1000)
        control.leave(service.store, LetEnrol(hash_of(secret), folder.name, GROUP, expires_ms))
        key = load(service.store).curve_public
        made = enrol(
            encode_ticket(Ticket(door=service.door, server_key=key, secret=secret, name=folder.name)), folder
        )
        self.link = CloudLink(
            made, bundle, "cloud", lambda: self._base, self._offer,
            Spool(folder / "spool", max_samples=10_000, max_bytes=1 << 28, tell=lambda event: None),
            max_distance=Config().max_distance,
        )  # fmt: skip
        self.link.start()

    def _offer(self, epoch: int, seq: int, theta: Vector, report: Report) -> None:
        self._staged.note(self._number, seq)
        report(Progress(epoch, seq, "staged", "", "", self._digest()))
        self._base = Base(epoch, seq, theta, epoch, seq)
        report(Progress(epoch, seq, "committed", "", "", self._digest()))

    def _digest(self) -> str:
        return thetas.digest(self._bundle.manifest.theta, self._base.theta)

    def online(self) -> bool:
        """Whether the cloud has let it in."""
        return self.link.info(seen=0, chosen=0).phase == "online"


class Load:
    """A cloud and a growing number of edges.

    Args:
        service: the cloud.
        bundle: of the edges.
        folder: of their state.
    """

    def __init__(self, service: Cloud, bundle: Bundle, folder: Path) -> None:
        self._service, self._bundle, self._folder = service, bundle, folder
        self._staged = Staged()
        self._draw = np.random.default_rng(0)
        self._seq = 0
        self.edges: list[Edge] = []

    def grow(self, count: int) -> None:
        """So many edges in all, online and with the newest patch."""
        while len(self.edges) < count:
            number = len(self.edges)
            self.edges.append(
                Edge(number, self._service, self._bundle, self._folder / f"edge-{number}", self._staged)
            )
        _until(lambda: all(edge.online() for edge in self.edges), "all edges are online")
        if self._seq:
            self._staged.wait(self._seq, count)

    def publish(self) -> list[float]:
        """Let the cloud make one patch; milliseconds until each edge has staged it."""
        self._seq += 1
        while self._learnable() < self._seq * NEW:
            self._teach()
        at_s = self._staged.wait(self._seq, len(self.edges))
        newest = read(self._service.store, lambda db: ledger.entries(db, GROUP, 1))
        return [1000 * each - newest[0].created_ms for each in at_s]

    def _learnable(self) -> int:
        """Samples that the cloud has and that are not held out; each lot of them makes a round."""
        query = "SELECT number FROM samples WHERE grp = ?"
        numbers = read(self._service.store, lambda db: db.execute(query, (GROUP,)).fetchall())
        return sum(not held_out(number) for (number,) in numbers)

    def _teach(self) -> None:
        """Send one sample, and wait until it is acknowledged."""
        link, spec = self.edges[0].link, self._bundle.manifest.input
        shape = [length for length in spec.shape[1:] if isinstance(length, int)]
        x = self._draw.uniform(spec.low, spec.high, shape).astype(spec.dtype)
        sent = link.info(seen=0, chosen=0).sent
        link.send([Sample.of(x, stream="load", taken_ms=int(time.time() * 1000), seq=0, entropy=1.0)])
        _until(lambda: link.info(seen=0, chosen=0).sent > sent, "a sample is acknowledged")

    def close(self) -> None:
        """End all links."""
        for edge in self.edges:
            edge.link.close()


def _until(seen: Callable[[], bool], what: str) -> None:
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while not seen():
        if time.monotonic() > end_s:
            raise TimeoutError(f"it is not so that {what}")
        pause.wait(0.002)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def figures(values: Sequence[float]) -> dict[str, float]:
    """The middle, the slowest of a hundred, the slowest."""
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(max(values), 1)}


def measure(student: Path, teacher: Path, edges: int, patches: int, folder: Path) -> dict[str, object]:
    """Everything, as the JSON says it."""
    with ExitStack() as stack:
        service = stack.enter_context(cloud(student, teacher, folder / "cloud", SETTINGS))
        load_ = Load(service, Bundle.open(student), folder)
        stack.callback(load_.close)
        before = resident_bytes(service.process.pid)
        load_.grow(1)
        load_.publish()  # the first one also opens the group
        one = [load_.publish()[0] for _ in range(patches)]
        memory: dict[int, int] = {}
        for count in sorted({step for step in STEPS if step < edges} | {edges}):
            load_.grow(count)
            memory[count] = resident_bytes(service.process.pid)
        rounds = [load_.publish() for _ in range(patches)]
    last = max(memory)
    return {
        "patches": patches,
        "edges": edges,
        "one_ms": figures(one),
        "many_ms": figures([value for each in rounds for value in each]),
        "all_staged_ms": figures([max(each) for each in rounds]),
        "first_to_last_ms": figures([max(each) - min(each) for each in rounds]),
        "cloud_rss_bytes": {"none": before, **{str(count): found for count, found in memory.items()}},
        "bytes_per_edge": round((memory[last] - memory[1]) / (last - 1)) if last > 1 else None,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, required=True, help="bundle with distill")
    parser.add_argument("--teacher", type=Path, required=True, help="bundle with distill")
    parser.add_argument("--edges", type=int, default=50)
    parser.add_argument("--patches", type=int, default=100, help="published to one edge, and to all")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tta-bench-") as folder:
        found = measure(
            arguments.student, arguments.teacher, arguments.edges, arguments.patches, Path(folder)
        )
    print(json.dumps(found, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
