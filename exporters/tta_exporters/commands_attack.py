"""tta-export attack: makes a stream with malicious samples, to measure what a guard is worth."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tta_exporters import arguments

if TYPE_CHECKING:
    from tta_exporters.attack import Attacked


def attack(
    source: arguments.Source,
    images: Annotated[Path, typer.Option(help="npz with x (uint8 images) and y (classes from 0).")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="npz to make, for `tta-edge evaluate --suite --malicious`.")
    ],
    input_shape: arguments.InputShape,
    classes: arguments.Classes,
    weights: arguments.Weights = None,
    share: Annotated[float, typer.Option(help="Of each batch that is the attacker's.")] = 0.2,
    batch: Annotated[int, typer.Option(help="Samples that arrive together.")] = 64,
    epsilon: Annotated[
        float, typer.Option(help="Largest change of a pixel, as a share of the range; 1: any.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Of gradient ascent.")] = 20,
    route: Annotated[
        str | None,
        typer.Option(
            help="What the attack works through: statistics (of the batch) or step (of entropy minimisation); "
            "default: statistics where the network has BatchNorm.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Only the first so many images.", show_default=False)
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order, and of which samples are the attacker's.")
    ] = 0,
    dtype: arguments.Dtype = "float32",
    value_range: arguments.Range = None,
    mean: arguments.Mean = "",
    std: arguments.Std = "",
    raw_range: arguments.RawRange = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Make a stream in which malicious samples, a share of every batch, work against the honest ones.

    The attacker knows the network, the labels and the batch. Use it to measure guards on your own models.

    Example: tta-export attack models.py:resnet8 --weights w.safetensors --images test.npz --input 3x32x32
    --classes 10 --share 0.2 -o malicious-20.npz
    """
    from tta_exporters.attack import AttackOptions, Route
    from tta_exporters.attack import attack as make
    from tta_exporters.labelled import Labelled, load_labelled
    from tta_exporters.sources import load_network

    options = AttackOptions(share, batch, epsilon, steps, seed, cast("Route | None", route))
    users = arguments.users_input(input_shape, dtype, value_range, mean, std, raw_range)
    arguments.check_place(out)
    data = load_labelled(images, users, classes)
    data = Labelled(data.x[:limit], data.y[:limit], data.options)
    network = load_network(source, weights)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("batches", total=None)
        made = make(network, data, options, lambda done, total: bar.update(task, completed=done, total=total))
    write_stream(out, made, batch)
    printed = {
        "file": str(out),
        "samples": len(made.y),
        "malicious": int(made.malicious.sum()),
        "batch": batch,
        "epsilon": epsilon,
        "steps": steps,
        "seed": seed,
        "route": made.route,
        "honest_error_before": made.before,
        "honest_error_after": made.after,
    }
    if as_json:
        sys.stdout.write(json.dumps(printed, indent=2) + "\n")
        return
    Console().print(
        f"{out}: {len(made.y)} samples, {int(made.malicious.sum())} malicious; honest error under the {made.route} of "
        f"the batch {100 * made.before:.1f} -> {100 * made.after:.1f} %",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def write_stream(out: Path, made: Attacked, batch: int) -> None:
    """The stream as an npz file (x, y, malicious, batch), whole or not at all.

    Raises:
        OutputUnwritable: the system refuses.
    """
    import numpy as np

    from tta_exporters.errors import OutputUnwritable
    from tta_runtime.atomic import write_atomic

    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=made.x, y=made.y, malicious=made.malicious, batch=np.int64(batch))
    try:
        write_atomic(out, buffer.getvalue())
    except OSError as error:
        raise OutputUnwritable(f"cannot write {out}: {error.strerror}", "Choose another -o") from error
