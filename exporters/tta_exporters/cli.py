"""tta-export: build, check and describe bundles."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tta_exporters import arguments
from tta_exporters.commands_attack import attack
from tta_exporters.commands_text import build_text, train_stream
from tta_exporters.commands_warm_up import warm_up
from tta_runtime.errors import TtaError

EPILOG = (
    "Exit codes: 0 done; 1 a check failed or a warm-up diverged; 2 wrong usage or option; "
    "4 the model, weights or bundle is refused; 3 a package is missing; 130 interrupted."
)
CHECK_FAILED, USAGE, MISSING, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130
_EXIT_CODES = {
    "option": USAGE,
    "output-exists": USAGE,
    "output-unwritable": USAGE,
    "extra-missing": MISSING,
    "engine-missing": MISSING,
    "check-failed": CHECK_FAILED,
    "parity": CHECK_FAILED,
    "diverged": CHECK_FAILED,
    "interrupted": INTERRUPTED,
}
"""By the error's code; what is not listed is REFUSED."""

app = typer.Typer(
    help="Compile a trained model and adaptation methods into a bundle that runs without PyTorch.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors become one line of cause and fix and a documented exit code."""
    try:
        app(args=arguments, prog_name="tta-export")
    except ImportError as error:
        _fail(
            "missing",
            f"{error.name or error} is not installed. Run `pip install 'tta-runtime[export]'`",
            MISSING,
        )
    except TtaError as error:
        _fail(error.code, str(error), _EXIT_CODES.get(error.code, REFUSED))
    except KeyboardInterrupt:
        _fail("interrupted", "interrupted, nothing was written", INTERRUPTED)


def _fail(code: str, message: str, status: int) -> None:
    # One line, whatever the parts of the message that come from files and libraries hold.
    typer.echo(f"error ({code}): {' '.join(message.split())}", err=True)
    sys.exit(status)


@app.command(epilog=EPILOG)
def build(
    source: arguments.Source,
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle directory to make.")],
    input_shape: arguments.InputShape,
    classes: arguments.Classes,
    weights: arguments.Weights = None,
    methods: Annotated[str, typer.Option(help="Comma list of names, or FILE.py:Class for your own.")] = (
        "source,norm,tent"
    ),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.OPTION=VALUE, e.g. tent.lr=0.001. Repeatable.")
    ] = None,
    adapter: arguments.Adapter = "norm",
    adapter_set: arguments.AdapterSet = None,
    adapter_weights: Annotated[
        Path | None, typer.Option(help="Where the adapter starts: what `tta-export warm-up` made.")
    ] = None,
    include: arguments.Include = None,
    exclude: arguments.Exclude = None,
    dtype: arguments.Dtype = "float32",
    value_range: arguments.Range = None,
    mean: arguments.Mean = "",
    std: arguments.Std = "",
    raw_range: arguments.RawRange = False,
    head: arguments.Head = None,
    class_names: Annotated[str | None, typer.Option(help="Comma list of class names.")] = None,
    model_id: Annotated[
        str | None, typer.Option("--id", help="Name of the model (default: from SOURCE).")
    ] = None,
    default_method: Annotated[str | None, typer.Option(help="Method served by default.")] = None,
    source_images: Annotated[
        Path | None,
        typer.Option(help="npz with x (uint8 images): unlabelled source images for methods that need them."),
    ] = None,
    parity_steps: Annotated[
        int, typer.Option("--parity", min=0, help="Compare with eager torch over N steps; 0 skips.")
    ] = 3,
    tensorrt: Annotated[
        bool,
        typer.Option("--tensorrt", help="Also write each graph for TensorRT, and have its builder take it."),
    ] = False,
    targets: arguments.Targets = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Compile a model and methods into a bundle.

    Example: tta-export build models.py:resnet8 --weights w.safetensors --input 3x32x32 --classes 10 -o bundle
    """
    from tta_exporters.adapter_file import read_adapter
    from tta_exporters.build import MAX_SOURCE_IMAGES, BuildOptions
    from tta_exporters.build import build as build_bundle
    from tta_exporters.check import example_batch
    from tta_exporters.parity import eager, parity, reference
    from tta_exporters.source_images import load_source_images
    from tta_exporters.sources import load_network
    from tta_runtime import Model

    capabilities = arguments.capabilities(tensorrt, targets)
    origin = source.rstrip("/").rsplit("/", 1)[-1]
    users = arguments.users_input(input_shape, dtype, value_range, mean, std, raw_range)
    network = load_network(source, weights)
    start = read_adapter(adapter_weights, adapter, network) if adapter_weights else None
    options = BuildOptions(
        model_id=model_id or origin.rsplit(":", 1)[-1],
        input=users,
        classes=classes,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        settings=arguments.method_settings(settings or []),
        adapter=adapter,
        adapter_settings=arguments.adapter_settings(adapter_set or []),
        adapter_weights=start.tensors if start else None,
        include=include or ["*"],
        exclude=exclude or [],
        class_names=[name.strip() for name in class_names.split(",")] if class_names else None,
        head=head,
        default_method=default_method,
        source_images=load_source_images(source_images, users, MAX_SOURCE_IMAGES) if source_images else None,
        tensorrt=capabilities,
        provenance={
            "source": origin,
            "weights": weights.name if weights else "none",
            **(start.provenance if start else {}),
        },
    )
    console = Console(stderr=True)
    with console.status("building") as status:

        def tell(line: str) -> None:
            status.update(line)
            console.print(f"  {line}", style="dim", highlight=False, markup=False)

        built = build_bundle(network, options, out, progress=tell)
        worst: dict[str, dict[str, object]] = {}
        try:
            for name, method in built.methods.items() if parity_steps else ():
                tell(f"{name}: parity with torch in float64 over {parity_steps} steps")
                size = max(8, method.spec.min_batch)
                batches = [example_batch(built.manifest.input, size, seed) for seed in range(parity_steps)]
                oracle, yardstick = reference(network, options, name), eager(network, options, name)
                report = parity(Model.open(out, method=name), oracle, batches, yardstick)
                worst[name] = {"output": report.worst.output, "error": report.worst.median}
                report.require()
        except BaseException:
            # What does not compute what it should, or was not compared to the end, must not lie about as if it did.
            shutil.rmtree(out)
            raise
    size = sum(entry.bytes for entry in built.manifest.files.values())
    if as_json:
        _print_json({"bundle": str(out), "bytes": size, "theta": built.manifest.theta.size, "parity": worst})
        return
    Console().print(
        f"{out}: {size / 1e6:.1f} MB, adapter {adapter}, theta {built.manifest.theta.size} values "
        f"({built.manifest.theta.trained} trained), methods {', '.join(built.methods)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for name, entry in worst.items():
        Console().print(
            f"  {name}: worst deviation {entry['error']:.1e} in {entry['output']}",
            highlight=False,
            markup=False,
        )


@app.command(epilog=EPILOG)
def check(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    tensorrt: Annotated[
        bool,
        typer.Option("--tensorrt", help="Also build every graph with TensorRT-RTX (no GPU needed)."),
    ] = False,
    targets: arguments.Targets = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Check a bundle's files and run every graph; exit 0 only if all pass.

    Example: tta-export check bundle --tensorrt --json result.json
    """
    from tta_exporters.check import check_bundle

    console = Console()
    results = []
    with Console(stderr=True).status("checking"):
        for result in check_bundle(bundle, tensorrt=arguments.capabilities(tensorrt, targets)):
            results.append(result)
            mark = "[green]ok[/green]  " if result.ok else "[red]FAIL[/red]"
            line = f" {result.graph:14s} {result.check:16s} {result.detail}"
            console.print(mark + escape(line), highlight=False, soft_wrap=True)
    ok = all(result.ok for result in results)
    if json_file is not None:
        _write(
            json_file, json.dumps({"ok": ok, "checks": [result.as_dict() for result in results]}, indent=2)
        )
    if not ok:
        raise typer.Exit(CHECK_FAILED)


@app.command(epilog=EPILOG)
def info(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    theta: Annotated[bool, typer.Option("--theta", help="List theta tensor by tensor.")] = False,
) -> None:
    """Describe a bundle: model, input, theta, methods with their settings, graphs.

    Example: tta-export info bundle --theta
    """
    import msgspec

    from tta_runtime import Bundle

    manifest = Bundle.open(bundle).manifest
    if as_json:
        _print_json(msgspec.to_builtins(manifest))
        return
    console = Console()
    spec = manifest.input
    console.print(
        f"[bold]{escape(manifest.model_id)}[/bold]  {spec.dtype} {escape(str(spec.shape))} "
        f"in {spec.low:g}..{spec.high:g}, "
        f"{manifest.classes} classes\nadapter {escape(manifest.adapter)}, "
        f"theta {manifest.theta.size} values, {manifest.theta.trained} trained, "
        f"digest {manifest.theta.digest[:12]}"
    )
    table = Table("method", "what it does", "settings", "report")
    for name, method in manifest.methods.items():
        hyper = "\n".join(f"{entry.name}={entry.default:g}" for entry in method.hyper)
        title = f"{name} (default)" if name == manifest.default_method else name
        table.add_row(*map(escape, (title, method.doc, hyper, "\n".join(method.report))))
    console.print(table)
    if theta:
        listing = Table("tensor", "shape", "kind", "trained", "offset")
        for entry in manifest.theta.entries:
            trained = "yes" if entry.trained else ""
            row = (entry.name, str(entry.shape), entry.kind, trained, str(entry.offset))
            listing.add_row(*map(escape, row))
        console.print(listing)


app.command("warm-up", epilog=EPILOG)(warm_up)
app.command(epilog=EPILOG)(attack)
app.command("train-stream", epilog=EPILOG)(train_stream)
app.command("build-text", epilog=EPILOG)(build_text)


def _write(path: Path, text: str) -> None:
    from tta_exporters.errors import OptionError

    try:
        path.write_text(text)
    except OSError as error:
        raise OptionError(
            f"--json {path} cannot be written: {error.strerror}", "Choose another file"
        ) from error


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


logging.getLogger("tta_exporters").addHandler(logging.NullHandler())

if __name__ == "__main__":
    main()
