"""A daemon under everything at once, for minutes: does it lose a request, leak memory or leak descriptors?

Eight clients in processes of their own send without a pause, each to a stream of its own, while steps run in the
background, streams are saved to a state directory, the bundle is replaced each minute (by another build of the same
source, or by itself, in turn) and a hostile client sends garbage, half messages, wrong shapes and goes away.

The result: requests, well-formed ones that failed (must be none), resident memory and descriptors of the daemon
each ten seconds, and how fast both grow after the first minute.

Example: python benchmarks/soak.py --minutes 10 --json soak.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 8
EACH_S = 10.0
WARM_S = 60.0
START_S = 60.0
RETRIES = 100  # of a request that is answered `busy`, which is an answer and no failure


def main() -> None:
    """Parses arguments and runs; also the entry of the children."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--reload-s", type=float, default=60.0, help="between two reloads")
    parser.add_argument("--model", choices=("resnet20", "digits"), default="resnet20")
    parser.add_argument("--batch", type=int, default=4, help="samples of a request")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "ENDPOINT", "NUMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, endpoint, number = arguments.child
        (hostile if kind == "hostile" else client)(endpoint, int(number), arguments.batch)
        return
    with tempfile.TemporaryDirectory(prefix="tta-soak-") as work:
        result = run(arguments, Path(work))
    print(
        f"{result['requests']} requests in {result['minutes']:.1f} minutes, {result['failed']} failed, "
        f"{result['steps']} steps, {result['reloads']} reloads; resident {result['rss_mb'][0]:.0f} MB at first, "
        f"{result['rss_mb'][-1]:.0f} MB at the end, {result['rss_slope_mb_per_min']:+.2f} MB a minute after the first; "
        f"descriptors {result['descriptors'][0]} to {result['descriptors'][-1]}"
    )
    for error in result["errors"][:5]:
        print("failed:", error)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if result["failed"] else 0)


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole soak."""
    from tta_edge.client import Client
    from tta_edge.errors import ReloadUnderWay

    variants = bundles(arguments.model, work)
    link = work / "current"
    link.symlink_to(variants[0])
    seen: list[tuple[float, float, int]] = []
    loads: list[bool] = []
    with ExitStack() as stack:
        process, endpoint = stack.enter_context(daemon(link, work / "state"))
        children = [
            stack.enter_context(child("client", endpoint, number, arguments.batch))
            for number in range(CLIENTS)
        ]
        stack.enter_context(child("hostile", endpoint, 0, arguments.batch))
        operator = stack.enter_context(Client(endpoint, timeout_s=START_S))
        began_s, ending = time.monotonic(), threading.Event()
        ticks, turns = itertools.count(1), itertools.cycle((1, 1, 0, 0))  # another build, itself, and back
        reload_s = arguments.reload_s
        while (now_s := time.monotonic() - began_s) < 60 * arguments.minutes:
            if now_s >= reload_s:
                reload_s += arguments.reload_s
                point(link, variants[next(turns)])
                try:
                    loads.append(operator.reload().changed)
                except ReloadUnderWay:
                    loads.append(False)
            seen.append((now_s, resident_mb(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))))
            ending.wait(max(0.0, began_s + EACH_S * next(ticks) - time.monotonic()))
        answers = [finish(each) for each in children]
        status = operator.status()
    late = [each for each in seen if each[0] >= WARM_S] or seen
    return {
        "minutes": (time.monotonic() - began_s) / 60,
        "model": arguments.model,
        "batch": arguments.batch,
        "requests": sum(answer["ok"] for answer in answers),
        "busy": sum(answer["busy"] for answer in answers),
        "failed": sum(len(answer["errors"]) for answer in answers),
        "errors": [error for answer in answers for error in answer["errors"]],
        "refused": status.requests.failures,
        "steps": sum(stream.steps for stream in status.streams),
        "events": {key: count for stream in status.streams for key, count in stream.events.items()},
        "reloads": len(loads),
        "changed": sum(loads),
        "at_s": [round(each[0], 1) for each in seen],
        "rss_mb": [round(each[1], 1) for each in seen],
        "descriptors": [each[2] for each in seen],
        "rss_slope_mb_per_min": slope([each[0] / 60 for each in late], [each[1] for each in late]),
        "descriptor_slope_per_min": slope([each[0] / 60 for each in late], [each[2] for each in late]),
        "host": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
    }


def bundles(model: str, work: Path) -> list[Path]:
    """Two builds of one source: the second differs in what its manifest says of itself."""
    from tta_runtime import bundle as bundle_files
    from tta_runtime import manifest as manifests

    first, second = work / "first", work / "second"
    if model == "digits":
        from tta_edge.builtin import builtin_bundle

        shutil.copytree(builtin_bundle(), first)
    else:
        from tta_exporters.build import BuildOptions, InputOptions, build
        from tta_exporters.sources import load_network

        options = BuildOptions(model, InputOptions((3, 32, 32)), 10, ["source", "tent"])
        build(load_network(f"{ROOT}/examples/cifar10/models.py:{model}"), options, first)
    shutil.copytree(first, second)
    form = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").unlink()
    form["provenance"] = {**form["provenance"], "made_by": "another build"}
    bundle_files.seal(second, manifests.decode(json.dumps(form).encode()))
    return [first, second]


def point(link: Path, target: Path) -> None:
    """Let the link stand for another directory, in one go."""
    new = link.with_suffix(".new")
    new.symlink_to(target)
    os.replace(new, link)


@contextmanager
def daemon(bundle: Path, state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tta-edge serve` in a process of its own; gives it and its endpoint."""
    command = [
        sys.executable, "-m", "tta_edge", "serve", str(bundle), "--bind", "tcp://127.0.0.1:0", "--http", "off",
        "--method", "tent", "--policy", "always", "--state-dir", str(state), "--log-level", "error",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.startswith("ready ")), "")
        if not line:
            raise RuntimeError("the daemon did not start")
        threading.Thread(
            target=lambda: [print(line, end="") for line in process.stderr or ()], daemon=True
        ).start()
        yield process, line.split()[1]
    finally:
        process.terminate()
        process.wait(START_S)


@contextmanager
def child(kind: str, endpoint: str, number: int, batch: int) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, endpoint, str(number), "--batch", str(batch)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(START_S)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Tell a client to end; what it has counted."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def resident_mb(pid: int) -> float:
    """Resident megabytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0


# --- children ---------------------------------------------------------------------------------------


def told_to_end(stdin: IO[str]) -> threading.Event:
    """Set when the parent closes the pipe."""
    ending = threading.Event()
    threading.Thread(target=lambda: (stdin.read(), ending.set()), daemon=True).start()
    return ending


def client(endpoint: str, number: int, batch: int) -> None:
    """Well-formed requests without a pause; prints what came of them."""
    from tta_edge.client import Client
    from tta_edge.errors import Busy
    from tta_runtime.errors import TtaError

    ending, rng = told_to_end(sys.stdin), np.random.default_rng(number)
    ok = busy = 0
    errors: list[str] = []
    with Client(endpoint, timeout_s=START_S) as asking:
        spec = asking.info().input
        x = rng.random((batch, *map(int, spec.shape[1:]))).astype(spec.dtype)
        while not ending.is_set():
            for attempt in range(RETRIES):
                try:
                    answer = asking.predict(x, stream=f"s{number}", compare=ok % 16 == 0)
                except Busy as refusal:
                    busy += 1
                    ending.wait(refusal.retry_after_s or 0.01)
                    if attempt == RETRIES - 1:
                        errors.append(repr(refusal))
                except TtaError as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    break
                else:
                    if answer.logits.shape[0] != batch or not np.isfinite(answer.logits).all():
                        errors.append(f"logits {answer.logits.shape}")
                    ok += 1
                    break
    print(json.dumps({"ok": ok, "busy": busy, "errors": errors}), flush=True)


def hostile(endpoint: str, number: int, batch: int) -> None:
    """Everything but a well-formed request, until it is killed."""
    import zmq

    from tta_edge import wire

    ending, dice = told_to_end(sys.stdin), random.Random(number)
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    wrong = np.zeros((batch, 7), np.float64)
    whole = wire.encode(wire.Predict(id=1, stream="hostile", x=wire.declare(wrong)), {"x": wrong})
    context = zmq.Context()
    while not ending.is_set():
        kind = dice.randrange(5)
        if kind == 0:
            with socket.create_connection((host, int(port)), timeout=START_S) as raw:
                raw.sendall(dice.randbytes(dice.randrange(1, 5000)))
            continue
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0 if kind == 1 else 200
        dealer.connect(endpoint)
        if kind == 1:
            dealer.send(whole[0], zmq.SNDMORE)  # half a message, then nothing
        elif kind == 2:
            dealer.send_multipart(whole)  # a shape that the bundle does not take
        elif kind == 3:
            dealer.send_multipart([dice.randbytes(dice.randrange(200)) for _ in range(dice.randrange(1, 9))])
        else:
            dealer.send_multipart([*whole[:2], dice.randbytes(100_000)])  # not what was declared
        dealer.poll(dice.randrange(200))
        dealer.close()


if __name__ == "__main__":
    main()
