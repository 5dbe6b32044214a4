"""What an acknowledged sample costs the cloud: one commit for each against commits that are shared.

Both are interleaved in one process, on the same file system, and the medians compared. Singly: the caller waits for
each sample's fsync before it hands in the next one. In groups: samples are handed in as they come, as from many edges,
and those that come within the linger time share an fsync.

Example: python benchmarks/cloud_store.py --json cloud_store.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from tta_cloud import samples
from tta_cloud.operations import Outcome
from tta_cloud.records import Sample
from tta_cloud.store import Store, StoreOptions
from tta_cloud.writer import GroupCommit

EDGE = "0" * 40
SHAPES = {"32x32": (3, 32, 32), "224x224": (3, 224, 224)}


def main() -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma list of " + ", ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=512, help="samples of one round")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds; the median is reported")
    parser.add_argument(
        "--directory", type=Path, help="where the store is made; without it a temporary directory"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.shapes.split(","):
        rows.append(measure(name, arguments.rows, arguments.repeats, arguments.directory))
        print(format_row(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "repeats": arguments.repeats}, indent=2) + "\n")


def measure(name: str, count: int, repeats: int, directory: Path | None) -> dict[str, object]:
    """Medians of samples per second, and of how long one waits for its acknowledgement."""
    x = np.random.default_rng(0).integers(0, 256, SHAPES[name], dtype=np.uint8).tobytes()
    rates: dict[str, list[float]] = {"single": [], "group": []}
    waits_ms: dict[str, list[float]] = {"single": [], "group": []}
    with tempfile.TemporaryDirectory(prefix="tta-bench-", dir=directory) as work:
        for number in range(repeats):
            for kind, linger_s in (("single", 0.0), ("group", GroupCommit.linger_s)):
                options = StoreOptions(commit=GroupCommit(linger_s=linger_s, max_waiting=count))
                store = Store(Path(work) / f"{kind}-{number}", lambda _: None, options=options)
                made = [made_sample(f"{number:016x}{at:016x}", SHAPES[name], x) for at in range(count)]
                play = singly if kind == "single" else together
                began_s = time.perf_counter()
                waits_ms[kind] += play(store, made)
                rates[kind].append(count / (time.perf_counter() - began_s))
                store.close()
    row: dict[str, object] = {"shape": name, "bytes": len(x), "samples": count}
    for kind in rates:
        row[f"{kind}_per_s"] = round(statistics.median(rates[kind]), 1)
        row[f"{kind}_wait_ms"] = round(statistics.median(waits_ms[kind]), 2)
    row["ratio"] = round(statistics.median(rates["group"]) / statistics.median(rates["single"]), 2)
    return row


def made_sample(key: str, shape: tuple[int, ...], x: bytes) -> Sample:
    """A sample of random pixels."""
    return Sample(
        key=key, edge=EDGE, group="bench", stream="cam", taken_ms=0, seq=1, entropy=1.0, encoding="raw",
        dtype="uint8", shape=shape, x=x,
    )  # fmt: skip


def singly(store: Store, made: list[Sample]) -> list[float]:
    """Hand in each after the one before is durable; gives the milliseconds that each took."""
    waits_ms = []
    for sample in made:
        began_s = time.perf_counter()
        if store.call(samples.insert(sample, received_ms=0)) != "stored":
            raise SystemExit("a sample was not stored")
        waits_ms.append(1e3 * (time.perf_counter() - began_s))
    return waits_ms


def together(store: Store, made: list[Sample]) -> list[float]:
    """Hand in all, then wait for the last; gives the milliseconds that each took."""
    waits_ms: list[float] = []
    ended = threading.Event()

    def hand_in(sample: Sample) -> None:
        began_s = time.perf_counter()

        def done(outcome: Outcome[samples.Inserted]) -> None:
            if outcome.error is None:
                waits_ms.append(1e3 * (time.perf_counter() - began_s))
            if outcome.error is not None or len(waits_ms) == len(made):
                ended.set()

        store.submit(samples.insert(sample, received_ms=0), done)

    for sample in made:
        hand_in(sample)
    ended.wait()
    if len(waits_ms) < len(made):
        raise SystemExit("a sample was not stored")
    return waits_ms


def format_row(row: dict[str, object]) -> str:
    """One line for people."""
    return (
        f"{row['shape']:8} {row['bytes']} bytes: singly {row['single_per_s']} samples/s ({row['single_wait_ms']} ms), "
        f"in groups {row['group_per_s']} samples/s ({row['group_wait_ms']} ms), ratio {row['ratio']}"
    )


if __name__ == "__main__":
    main()
