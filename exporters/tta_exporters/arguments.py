"""The words of the command line: options that several commands share, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tta_exporters.errors import OptionError, OutputExists, OutputUnwritable

if TYPE_CHECKING:
    from tta_exporters.build import InputOptions
    from tta_runtime.plan_build import Capability

Source = Annotated[
    str,
    typer.Argument(help="FILE.py:factory, timm:NAME, torchvision:NAME or hf:DIR. A file is executed."),
]
InputShape = Annotated[str, typer.Option("--input", help="Shape without the batch, e.g. 3x32x32.")]
Classes = Annotated[int, typer.Option(min=2, help="Number of classes.")]
Weights = Annotated[Path | None, typer.Option(help="safetensors, or a torch state dict (weights only).")]
Include = Annotated[list[str] | None, typer.Option(help="Pattern of modules that are adapted. Repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Pattern of modules to leave out. Repeatable.")]
Dtype = Annotated[str, typer.Option(help="What users send: float32 or uint8.")]
Range = Annotated[
    str | None, typer.Option("--range", help="Range users send, LOW:HIGH (default 0:1; uint8: 0:255).")
]
Mean = Annotated[str, typer.Option(help="Per-channel mean in units of 0..1, e.g. .485,.456,.406.")]
Std = Annotated[str, typer.Option(help="Per-channel standard deviation, likewise.")]
RawRange = Annotated[bool, typer.Option(help="The network takes LOW..HIGH itself: do not scale to 0..1.")]
Head = Annotated[str | None, typer.Option(help="Path of the classifier module (default: last Linear).")]
Adapter = Annotated[str, typer.Option(help="What theta is: norm, lora, vida, side or full.")]
AdapterSet = Annotated[
    list[str] | None,
    typer.Option("--adapter-set", help="OPTION=VALUE of the adapter, e.g. rank=8. Repeatable."),
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--tensorrt-targets",
        help="Compute capabilities that --tensorrt builds for, a comma list.",
        show_default="8.6,8.9,12.0",  # tensorrt.TARGETS, which to import would make --help slow
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def capabilities(tensorrt: bool, targets: str | None) -> tuple[Capability, ...]:
    """What --tensorrt and --tensorrt-targets say together, of what the installed builder knows; none without the first.

    Raises:
        ExtraMissing: there is no builder.
        OptionError: it does not know one of them, or they are named without --tensorrt.
    """
    if not tensorrt:
        if targets is not None:
            raise OptionError(
                "--tensorrt-targets is given without --tensorrt", "Add --tensorrt, or leave it out"
            )
        return ()
    from tta_exporters.tensorrt import TARGETS, load_builder, parse_targets

    builder = load_builder()
    return TARGETS if targets is None else parse_targets(targets, builder)


def check_place(out: Path) -> None:
    """Refuse early what could only fail after the work is done.

    Raises:
        OutputExists: there is something at the path.
        OutputUnwritable: there is no such directory.
    """
    if out.exists():
        raise OutputExists(f"{out} exists", "Remove it or choose another -o")
    if not out.parent.is_dir():
        raise OutputUnwritable(f"there is no directory {out.parent}", "Make it or choose another -o")


def users_input(
    input_shape: str, dtype: str, value_range: str | None, mean: str, std: str, raw_range: bool
) -> InputOptions:
    """What the options about the input say together.

    Raises:
        OptionError: one of them cannot be read, or they do not fit each other.
    """
    from tta_exporters.build import InputOptions
    from tta_exporters.preprocess import Preprocess

    low, high = numbers(value_range or ("0:255" if dtype == "uint8" else "0:1"), ":", "--range", count=2)
    means, stds = numbers(mean, ",", "--mean"), numbers(std, ",", "--std")
    return InputOptions(shape(input_shape), dtype, Preprocess(low, high, means, stds, scale=not raw_range))


def shape(text: str) -> tuple[int, ...]:
    """Lengths joined by x.

    Raises:
        OptionError: something else.
    """
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"--input is {text!r}", "Write lengths joined by x, e.g. 3x32x32")
    return tuple(int(part) for part in parts)


def numbers(text: str, separator: str, name: str, count: int | None = None) -> list[float]:
    """Numbers joined by a separator; ``name`` of the option and the ``count`` expected serve messages.

    Raises:
        OptionError: something else, or another count.
    """
    try:
        values = [float(part) for part in text.split(separator)] if text else []
    except ValueError as error:
        raise OptionError(f"{name} is {text!r}", f"Write numbers joined by {separator!r}") from error
    if count is not None and len(values) != count:
        raise OptionError(
            f"{name} has {len(values)} numbers, expected {count}", f"Write for example 0{separator}1"
        )
    return values


def method_settings(entries: list[str]) -> dict[str, dict[str, str | float | bool]]:
    """METHOD.OPTION=VALUE, by method and option.

    Raises:
        OptionError: an entry of another form.
    """
    settings: dict[str, dict[str, str | float | bool]] = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        method, dot, option = key.partition(".")
        if not (separator and dot and method and option and value):
            raise OptionError(f"--set {entry!r}", "Write METHOD.OPTION=VALUE, e.g. tent.lr=0.001")
        settings.setdefault(method, {})[option] = value
    return settings


def adapter_settings(entries: list[str]) -> dict[str, str | float | bool]:
    """OPTION=VALUE, by option.

    Raises:
        OptionError: an entry of another form.
    """
    settings: dict[str, str | float | bool] = {}
    for entry in entries:
        option, _, value = entry.partition("=")
        if not (option and value):
            raise OptionError(f"--adapter-set {entry!r}", "Write OPTION=VALUE, e.g. rank=8")
        settings[option] = value
    return settings


def numbers_by_name(entries: list[str]) -> dict[str, float]:
    """OPTION=NUMBER, by option.

    Raises:
        OptionError: an entry of another form.
    """
    found: dict[str, float] = {}
    for entry in entries:
        option, _, value = entry.partition("=")
        try:
            found[option] = float(value)
        except ValueError:
            option = ""
        if not option:
            raise OptionError(f"--set {entry!r}", "Write OPTION=NUMBER, e.g. rank=8")
    return found
