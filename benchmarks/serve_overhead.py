"""What the daemon adds to an engine run, and what a step in the background adds to an answer.

Round trip: clients in processes of their own ask one daemon in a process of its own, each as soon as it has its
answer. Bare: the serve graph in a process of its own, with as many threads as the daemon gives it. Rounds of all
configurations are interleaved, quantiles taken of each round, and the medians over the rounds reported. On a host
that does other work as well look at the tenth percentiles, which other programs disturb least. Weights are random
(an answer costs the same).

Adapting: policy `always`, so that a step runs all the time where samples suffice, and `budget` with its default.
Off: the same daemon with adaptation switched off.

Example: python benchmarks/serve_overhead.py --json serve_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 32)
CLIENTS = (1, 8)
POLICIES = ("always", "budget")
START_S = 60.0
# Noise collapses and drifts: what is measured is time, with steps that go on.
ADAPTING = (
    "--method", "tent", "--threads", str(os.cpu_count() or 1),
    "--min-diversity", "0", "--reset-every-steps", "0", "--max-distance", "1e9",
)  # fmt: skip


def main() -> None:
    """Parses arguments and runs; also the entry of the children."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement in a round")
    parser.add_argument("--models", default="resnet20,digits", help="comma list")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "WHERE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="tta-serve-") as work:
        for name in arguments.models.split(","):
            bundle = bundle_of(name, Path(work))
            rows += measure(name, bundle, rounds=arguments.rounds, seconds=arguments.seconds)
    result = {
        "rows": rows,
        "worst_added_ms": max(row["added_ms"] for row in rows if row["clients"] == 1 and not row["adapting"]),
        "worst_added_p10_ms": max(
            row["added_p10_ms"] for row in rows if row["clients"] == 1 and not row["adapting"]
        ),
        "worst_p99_ratio": max(row["p99_ratio"] for row in rows if row["p99_ratio"] is not None),
        "rounds": arguments.rounds,
        "host": {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]},
    }
    for row in rows:
        print(format_row(row))
    print(
        f"at most {result['worst_added_ms']:.2f} ms added to the median answer of one client, "
        f"{result['worst_added_p10_ms']:.2f} to the tenth percentile; "
        f"p99 while adapting at most {result['worst_p99_ratio']:.2f}x; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def bundle_of(name: str, work: Path) -> Path:
    """ResNet-20 with source and tent, or the built-in digits."""
    if name == "digits":
        from tta_edge.builtin import builtin_bundle

        return builtin_bundle()
    from tta_exporters.build import BuildOptions, InputOptions, build
    from tta_exporters.sources import load_network

    options = BuildOptions(name, InputOptions((3, 32, 32)), 10, ["source", "tent"])
    build(load_network(f"{ROOT}/examples/cifar10/models.py:{name}"), options, work / name)
    return work / name


# --- measuring --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        batch: samples of a request.
        clients: that ask at once, each for a stream of its own.
        policy: of the daemon.
        adapting: whether it adapts.
    """

    batch: int
    clients: int
    policy: str
    adapting: bool


def cases() -> list[Case]:
    """All rows; with adaptation off the policy makes no difference."""
    return [
        Case(batch, clients, policy, adapting)
        for batch in BATCHES
        for clients in CLIENTS
        for policy, adapting in (("always", False), *((policy, True) for policy in POLICIES))
    ]


def measure(name: str, bundle: Path, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Interleaved rounds of all cases on one bundle."""
    threads = os.cpu_count() or 1
    serve_threads = max(1, threads - max(1, threads // 2))  # as tta_edge.hosting.divide has it
    bare: dict[int, list[tuple[float, float]]] = {batch: [] for batch in BATCHES}
    seen: dict[Case, list[dict[str, float]]] = {case: [] for case in cases()}
    with ExitStack() as stack:
        engine = stack.enter_context(Child("engine", f"{bundle}:{serve_threads}"))
        daemons = {
            policy: stack.enter_context(daemon(bundle, "--policy", policy, *ADAPTING)) for policy in POLICIES
        }
        workers = {
            policy: [stack.enter_context(Child("client", daemons[policy])) for _ in range(max(CLIENTS))]
            for policy in POLICIES
        }
        for turn in range(rounds + 1):  # the first one warms up
            for batch in BATCHES:
                times = sorted(engine.ask(batch=batch, seconds=seconds / 2)["ms"])
                bare[batch].append((quantile(times, 0.5), quantile(times, 0.1)))
            for case, found in seen.items():
                found.append(one(workers[case.policy], case, seconds if turn else seconds / 3))
    rows: list[dict[str, Any]] = []
    for case, found in seen.items():
        middle = {key: statistics.median(each[key] for each in found[1:]) for key in found[0]}
        bare_ms, bare_p10_ms = (
            statistics.median(values) for values in zip(*bare[case.batch][1:], strict=True)
        )
        off = seen[Case(case.batch, case.clients, "always", False)]
        ratios = [mine["p99_ms"] / other["p99_ms"] for mine, other in zip(found[1:], off[1:], strict=True)]
        rows.append(
            {
                "model": name, "batch": case.batch, "clients": case.clients, "adapting": case.adapting,
                "policy": case.policy, "bare_ms": bare_ms, **middle, "added_ms": middle["p50_ms"] - bare_ms,
                "bare_p10_ms": bare_p10_ms, "added_p10_ms": middle["p10_ms"] - bare_p10_ms,
                "p99_ratio": statistics.median(ratios) if case.adapting else None,
                "serve_threads": serve_threads, "step_threads": max(1, threads // 2),
            }
        )  # fmt: skip
    return rows


def one(workers: list[Child], case: Case, seconds: float) -> dict[str, float]:
    """One measurement of one case."""
    workers[0].ask(adapt=case.adapting)
    used = workers[: case.clients]
    for number, worker in enumerate(used):
        worker.tell(batch=case.batch, seconds=seconds, stream=f"s{number}")
    answers = [worker.hear() for worker in used]
    workers[0].ask(adapt=False)  # what still waits for a step must not disturb the next case
    times = sorted(ms for answer in answers for ms in answer["ms"])
    return {
        "p10_ms": quantile(times, 0.1),
        "p50_ms": quantile(times, 0.5),
        "p99_ms": quantile(times, 0.99),
        "requests_per_s": len(times) / seconds,
        "steps_per_s": answers[0]["steps"] / seconds,
    }


def quantile(ordered: list[float], q: float) -> float:
    """Nearest rank, of values in order."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


@contextmanager
def daemon(bundle: Path, *options: str) -> Iterator[str]:
    """`tta-edge serve` in a process of its own, with further options; gives its endpoint."""
    command = [
        sys.executable, "-m", "tta_edge", "serve", str(bundle), "--bind", "tcp://127.0.0.1:0", "--http", "off",
        "--log-level", "warning", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.startswith("ready ")), "")
        if not line:
            raise RuntimeError("the daemon did not start")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(START_S)


# --- children: one process each, one JSON line in, one out ------------------------------------------


class Child:
    """A process that measures when it is told to.

    Args:
        kind: `engine` or `client`.
        where: bundle and threads, or endpoint.
    """

    def __init__(self, kind: str, where: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", kind, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait(START_S)

    def tell(self, **command: object) -> None:
        """Begin something."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()

    def hear(self) -> dict[str, Any]:
        """What came of it."""
        answer: dict[str, Any] = json.loads(self._pipe(self._process.stdout).readline())
        return answer

    def ask(self, **command: object) -> dict[str, Any]:
        """Do something and say what came of it."""
        self.tell(**command)
        return self.hear()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def child(kind: str, where: str) -> None:
    """The life of a child."""
    answer = Engine(where).answer if kind == "engine" else Asking(where).answer
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


class Engine:
    """The bare engine."""

    def __init__(self, where: str) -> None:
        from tta_runtime import Bundle, EngineOptions, OrtEngine

        path, _, threads = where.rpartition(":")
        self._bundle = Bundle.open(path)
        self._engine = OrtEngine(self._bundle, "forward", EngineOptions(threads=int(threads)))

    def answer(self, batch: int, seconds: float) -> dict[str, Any]:
        """Milliseconds of each run."""
        x = noise(self._bundle.manifest.input.shape, self._bundle.manifest.input.dtype, batch)
        feed = {
            port.name: x if port.bind == "batch" else self._bundle.theta0 for port in self._engine.spec.inputs
        }
        return {"ms": timed(lambda: self._engine.run(feed), seconds)}


class Asking:
    """One client."""

    def __init__(self, endpoint: str) -> None:
        from tta_edge.client import Client

        self._client = Client(endpoint, timeout_s=START_S)

    def answer(
        self, adapt: bool | None = None, batch: int = 1, seconds: float = 0.0, stream: str = ""
    ) -> dict[str, Any]:
        """Switch adaptation; or milliseconds of each request, and the steps meanwhile."""
        if adapt is not None:
            return {"on": self._client.adapt(adapt).on}
        told = self._client.info().input
        x = noise(told.shape, told.dtype, batch)
        before = self._steps()
        times = timed(lambda: self._client.predict(x, stream=stream), seconds)
        return {"ms": times, "steps": self._steps() - before}

    def _steps(self) -> int:
        return sum(stream.steps for stream in self._client.status().streams)


def noise(shape: list[Any], dtype: str, batch: int) -> np.ndarray:
    """A batch of random values."""
    return np.random.default_rng(0).random((batch, *shape[1:])).astype(dtype)


def timed(run: Any, seconds: float) -> list[float]:
    """Milliseconds of each call, for so long."""
    times = []
    end_s = time.perf_counter() + seconds
    while (start_s := time.perf_counter()) < end_s:
        run()
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def format_row(row: dict[str, Any]) -> str:
    """One line for people."""
    adapting = f"{row['policy']}, {row['steps_per_s']:.1f} steps/s" if row["adapting"] else "off"
    ratio = f"{row['p99_ratio']:.2f}x of off" if row["p99_ratio"] is not None else ""
    return (
        f"{row['model']:9s} batch {row['batch']:2d}, {row['clients']} clients, adapting {adapting:20s}: "
        f"bare {row['bare_ms']:6.2f} ms, p50 {row['p50_ms']:7.2f}, p99 {row['p99_ms']:7.2f} {ratio:14s} "
        f"p10 {row['bare_p10_ms']:.2f} and {row['p10_ms']:.2f} "
        f"{row['requests_per_s']:6.0f} requests/s"
    )


if __name__ == "__main__":
    main()
