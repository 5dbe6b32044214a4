"""A cloud that teaches edges, in one command: real processes on this machine, each edge under a shift of its own.

    python examples/cloud_fleet/run.py --data DATA --json fleet.json

Each edge serves a small network forward only and sends a tenth of what it sees; the cloud's larger network adapts to
that and teaches the small one by signed patches. Beside it stands what the edge would have had without a cloud.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from play import Alone, Plan, Taught, alone, taught
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from streams import Feed, feeds

from tta_edge.streams.measures import gap_recovered
from tta_runtime.atomic import write_atomic
from tta_runtime.bundle import Bundle
from tta_runtime.errors import TtaError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "safety"))  # its images, networks and commands

import data
from safety import HERE as SAFETY
from safety import Place, export, form, photographs

STUDENT, TEACHER = "resnet8_bn", "resnet26w32_bn"
METHODS = {STUDENT: "source,norm,tent,eta,roid,auto,distill", TEACHER: "source,distill"}
LOCAL = ("tent", "eta", "roid")
"""Methods that learn by gradient on the edge itself: the best of them on a stream stands for all."""
SHIFTS = "gaussian_noise:5,fog:5,contrast:5,pixelate:5"
MEANS = ("source", "local", "auto", "cloud", "cloud_batch1", "upload_ratio")
"""What is averaged over the edges."""
DATA = "TTA_SHARED_DATA"
"""Environment variable that names the directory of images and weights."""


def images() -> Path | None:
    """The directory of the environment, or one beside the repository; None where there is none."""
    given = os.environ.get(DATA)
    path = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    return path if path.is_dir() else None


def bundle(place: Place, model: str) -> Path:
    """The bundle of a network of examples/safety, built where it is missing.

    Raises:
        FileNotFoundError: there are no weights of it.
    """
    made = place.out / "bundles" / model
    if made.is_dir():
        return made
    weights = place.weights(model)
    if not weights.is_file():
        raise FileNotFoundError(f"there are no weights of {model}: train them with examples/safety/train.py")
    source = place.out / "source-cifar10.npz"
    if not source.is_file():
        x, y = data.cifar_train(place.data)
        data.write(source, x[: data.SOURCE_IMAGES], y[: data.SOURCE_IMAGES])
    made.parent.mkdir(parents=True, exist_ok=True)
    export(
        "build", f"{SAFETY / 'models.py'}:{model}", "--weights", weights, *form(model), "--id", model,
        "--methods", METHODS[model], "--source-images", source, "-o", made,
    )  # fmt: skip
    return made


def row(feed: Feed, without: Alone, cloud: Taught, single: Taught | None) -> dict[str, Any]:
    """One edge's figures; accuracies as fractions."""
    tried = {name: without.methods[name] for name in LOCAL if name in without.methods}
    best = max(tried, key=lambda name: tried[name]) if tried else None
    found: dict[str, Any] = {
        "source": without.source,
        "local": None if best is None else tried[best],
        "auto": without.methods["auto"],
        "cloud": float(np.mean(cloud.right)),
        "cloud_batch1": None if single is None else float(np.mean(single.right)),
    }
    clean = without.clean
    return {
        "edge": feed.edge,
        "shift": feed.shift,
        **found,
        "upload_ratio": cloud.upload_ratio,
        "bytes_up": cloud.bytes_up,
        "bytes_down": cloud.bytes_down,
        "clean": clean,
        "local_method": best,
        "locals": tried,
        "gap_recovered": {
            name: None if clean is None or value is None else gap_recovered(clean, without.source, value)
            for name, value in found.items()
            if name != "source"
        },
        "samples": len(feed.labels),
        "patches": cloud.patches,
        "serves": cloud.committed,
        "answers": cloud.answers,
        "lessons": cloud.lessons,
        "batch1": None
        if single is None
        else {"upload_ratio": single.upload_ratio, "patches": single.patches, "serves": single.committed},
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The middle and the slowest of a hundred; None where there are none."""
    if not values:
        return {"p50": None, "p99": None}
    return {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p99", 99))}


def hardware() -> str:
    """Processor and cores of this machine."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows for people."""
    made = Table("edge", "shift", title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in (
        "source",
        "local",
        "",
        "auto",
        "cloud",
        "gap",
        "one by one",
        "sent",
        "KiB up",
        "down",
        "patches",
    ):
        made.add_column(column, justify="left" if not column else "right")
    for each in rows:
        gap = each["gap_recovered"]["cloud"]
        made.add_row(
            each["edge"], each["shift"], _percent(each["source"]), _percent(each["local"]), each["local_method"] or "",
            _percent(each["auto"]), _percent(each["cloud"]), "-" if gap is None else f"{gap:.2f}",
            _percent(each["cloud_batch1"]), _percent(each["upload_ratio"]), f"{each['bytes_up'] / 1024:,.0f}",
            f"{each['bytes_down'] / 1024:,.0f}", str(each["patches"]),
        )  # fmt: skip
    if len(rows) > 1:
        source, local, auto, cloud, single, sent = (_percent(_mean(rows, name)) for name in MEANS)
        made.add_section()
        made.add_row("mean", "", source, local, "", auto, cloud, "", single, sent)
    return made


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [each[name] for each in rows]
    return None if None in values else float(np.mean(values))


def play(arguments: argparse.Namespace, student: Path, teacher: Path, console: Console) -> dict[str, Any]:
    """Everything that was asked for, as the JSON says it."""
    manifest = Bundle.open(student).manifest
    streams = arguments.stream or [f"npz:{Place(arguments.data, arguments.out).images(STUDENT)}"]
    shifts = arguments.shifts or (None if arguments.stream else SHIFTS)
    fed = feeds(
        streams, shifts, manifest, samples=arguments.samples, in_order=arguments.order, seed=arguments.seed
    )
    plan = Plan(
        arguments.mode, arguments.batch, arguments.upload, arguments.share, arguments.rate, arguments.seed
    )
    methods = ["auto", *(name for name in LOCAL if name in manifest.methods)]
    samples, began_s, seconds = sum(len(feed.labels) for feed in fed), time.monotonic(), {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as made:

        def folder(name: str) -> Path:
            seconds[name] = time.monotonic() - began_s
            (Path(made) / name).mkdir()
            return Path(made) / name

        def task(text: str) -> Any:
            bar = progress.add_task(text, total=samples)
            return lambda count: progress.advance(bar, count)

        without = alone(fed, student, methods, plan, folder("alone"), task("without a cloud"))
        words = f"with it, {plan.batch} at a time"
        cloud = taught(fed, student, teacher, plan, folder("cloud"), task(words))
        single: list[Taught] | list[None] = [None] * len(fed)
        if arguments.batch1:
            one = replace(plan, batch=1)
            single = taught(fed, student, teacher, one, folder("batch1"), task("with it, one at a time"))
    rows = [
        row(feed, own, many, one) for feed, own, many, one in zip(fed, without, cloud, single, strict=True)
    ]
    every = [size for each in cloud for size in each.patch_bytes]
    ends = [*list(seconds.values())[1:], time.monotonic() - began_s]
    return {
        "rows": rows,
        "publish_to_staged_ms": percentiles([value for each in cloud for value in each.staged_ms]),
        "patch_bytes": max(every, default=None),
        "mean": {key: _mean(rows, key) for key in MEANS},
        "mode": plan.mode,
        "order": arguments.order,
        "batch": plan.batch,
        "upload": plan.upload,
        "share": plan.share,
        "rate": plan.rate if plan.mode == "realtime" else None,
        "seed": plan.seed,
        "seconds": {name: end - begin for (name, begin), end in zip(seconds.items(), ends, strict=True)},
        "hardware": hardware(),
    }


def main() -> int:
    """Play, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--data", type=Path, default=images(), help=f"directory as ../safety/README.md describes it; ${DATA}"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out/cloud_fleet"), help="where bundles are made"
    )
    parser.add_argument(
        "--student", type=Path, help="bundle of the edges, with auto and distill, instead of one made"
    )
    parser.add_argument("--teacher", type=Path, help="bundle of the cloud, with distill, instead of one made")
    parser.add_argument(
        "--stream",
        action="append",
        help="npz:FILE with labels (repeatable): an edge for each; default: CIFAR-10",
    )
    parser.add_argument("--shifts", help=f"one for each edge, as NAME:SEVERITY,...; all:5; default: {SHIFTS}")
    parser.add_argument("--order", choices=["given", "sorted"], default="given", help="sorted: by label")
    parser.add_argument("--samples", type=int, default=5000, help="of each edge (5000)")
    parser.add_argument("--mode", choices=["lockstep", "realtime"], default="lockstep")
    parser.add_argument(
        "--rate", type=float, default=25.0, help="samples a second of an edge in real time (25)"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples that arrive together (64)")
    parser.add_argument(
        "--batch1", action=argparse.BooleanOptionalAction, default=True, help="also one at a time"
    )
    parser.add_argument("--upload", default="budgeted", help="filter of the edges (budgeted)")
    parser.add_argument("--share", type=float, default=0.1, help="of a stream that is sent (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wanted = [arguments.student, arguments.teacher, arguments.stream]
    if arguments.data is None and not all(wanted):
        parser.error(
            f"there are no images: give --data or set {DATA}, or give --student, --teacher and --stream"
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.data is not None:
            photographs(Place(arguments.data, arguments.out))
        student, teacher = (
            given or bundle(Place(arguments.data, arguments.out), model)
            for given, model in ((arguments.student, STUDENT), (arguments.teacher, TEACHER))
        )
        found = play(arguments, student, teacher, console)
    except FileNotFoundError as error:
        parser.error(str(error))
    except TtaError as error:
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return 1
    console.print(
        table(
            found["rows"],
            f"accuracy in %, {found['mode']}; gap: of the shift's loss, what the cloud regained",
        )
    )
    staged, size = found["publish_to_staged_ms"], found["patch_bytes"]
    if size is not None and staged["p50"] is not None:
        console.print(
            f"a patch has {size / 1024:.1f} KiB and was staged {staged['p50']:.0f} ms after it was made "
            f"(99 of 100 within {staged['p99']:.0f} ms)"
        )
    if arguments.json is not None:
        write_atomic(arguments.json, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
