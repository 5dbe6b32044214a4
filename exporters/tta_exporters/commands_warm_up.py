"""tta-export warm-up: trains an adapter on labelled source data before deployment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tta_exporters import arguments
from tta_exporters.progress import training_bar


def warm_up(
    source: arguments.Source,
    data: Annotated[Path, typer.Option(help="npz with x (uint8 images, or float32) and y (classes from 0).")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="File to make (safetensors), for `--adapter-weights`.")
    ],
    input_shape: arguments.InputShape,
    classes: arguments.Classes,
    weights: arguments.Weights = None,
    adapter: arguments.Adapter = "lora",
    adapter_set: arguments.AdapterSet = None,
    include: arguments.Include = None,
    exclude: arguments.Exclude = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the first step; it falls to 0.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
    held_out: Annotated[
        float, typer.Option(help="Share of the data to judge by instead of training on it.")
    ] = 0.1,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    dtype: arguments.Dtype = "float32",
    value_range: arguments.Range = None,
    mean: arguments.Mean = "",
    std: arguments.Std = "",
    raw_range: arguments.RawRange = False,
    head: arguments.Head = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Train an adapter on labelled source data, the network frozen; run it again to resume.

    Example: tta-export warm-up models.py:vit --weights w.safetensors --adapter vida --data source.npz
    --input 3x32x32 --classes 10 -o vida.safetensors
    """
    from tta_exporters.adapter_file import digest, write_adapter
    from tta_exporters.build import BuildOptions, prepare
    from tta_exporters.labelled import load_labelled
    from tta_exporters.sources import load_network
    from tta_exporters.warm_up import WarmUpOptions
    from tta_exporters.warm_up import warm_up as train

    how = WarmUpOptions(epochs, batch, lr, seed, held_out, checkpoint_every)
    users = arguments.users_input(input_shape, dtype, value_range, mean, std, raw_range)
    arguments.check_place(out)
    network = load_network(source, weights)
    options = BuildOptions(
        model_id="warm-up",
        input=users,
        classes=classes,
        methods=["source"],
        adapter=adapter,
        adapter_settings=arguments.adapter_settings(adapter_set or []),
        include=include or ["*"],
        exclude=exclude or [],
        head=head,
    )
    prepared = prepare(network, options)[0]
    labelled = load_labelled(data, users, classes)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    with training_bar("warming up", checkpoint) as tell:
        result = train(prepared, network, labelled, how, checkpoint, tell)
    facts: dict[str, object] = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "steps": result.steps,
        "samples": len(labelled),
        "data": labelled.digest(),
    }
    write_adapter(out, result.tensors, adapter, network, facts)
    checkpoint.unlink(missing_ok=True)
    printed = {
        "file": str(out),
        "adapter": adapter,
        "values": prepared.trained,
        "digest": digest(result.tensors),
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "before": {"loss": result.before.loss, "accuracy": result.before.accuracy},
        "after": {"loss": result.after.loss, "accuracy": result.after.accuracy},
    }
    if as_json:
        sys.stdout.write(json.dumps(printed, indent=2) + "\n")
        return
    judged = (
        f", held-out accuracy {100 * result.before.accuracy:.1f} -> {100 * (result.after.accuracy or 0):.1f} %"
        if result.before.accuracy is not None
        else ""
    )
    Console().print(
        f"{out}: adapter {adapter}, {prepared.trained} values, {result.steps} steps{judged}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
