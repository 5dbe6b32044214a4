"""Building a bundle: one network, one adapter, several methods; graphs, weights, theta and manifest in a directory."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tta_adapters.base import Batch, Calibrated, Method, MethodSpec, State, init_state
from tta_adapters.methods import UnknownMethodError, make_method
from tta_adapters.network import NetworkAdapter, TensorsDoNotFit
from tta_adapters.options import OptionValue, UnknownOptionError
from tta_adapters.select import SelectionError
from tta_adapters.shelf import UnknownAdapterError, make_adapter
from tta_exporters.errors import (
    NetworkRefused,
    OptionError,
    WeightsDoNotFit,
    in_one_line,
)
from tta_exporters.finite import check_finite
from tta_exporters.graphs import write_graph
from tta_exporters.preprocess import Preprocess
from tta_exporters.sources import load_attribute
from tta_exporters.staging import check_free, staged
from tta_exporters.tensorrt import build_plan, load_builder, rewrite
from tta_exporters.trace import BATCH, EXAMPLE_BATCH, Argument
from tta_exporters.weights import WeightsWriter
from tta_runtime import __version__, bundle, manifest
from tta_runtime.plan_build import Capability
from tta_runtime.theta import make_layout

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

CALIBRATION_BATCH = 64  # the scale of a Fisher estimate belongs to the batch that it was made with
MAX_SOURCE_IMAGES = 2048


@dataclass(frozen=True)
class InputOptions:
    """What the user sends.

    Attributes:
        shape: without the batch, e.g. (3, 32, 32).
        dtype: "float32" or "uint8".
        preprocess: from there to what the network was trained on.

    Raises:
        OptionError: an unknown dtype, a range that uint8 does not have, as many means as there are no channels.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "uint8"):
            raise OptionError(f"the dtype of the input is {self.dtype!r}", "Choose float32 or uint8")
        if not self.shape or any(length < 1 for length in self.shape):
            raise OptionError(f"the shape of the input is {list(self.shape)}", "Give lengths from 1")
        low, high = self.preprocess.low, self.preprocess.high
        if self.dtype == "uint8" and not (low >= 0 and high <= 255):
            raise OptionError(
                f"uint8 does not have the range {low:g}..{high:g}", "Give a range within 0..255"
            )
        for name, values in (("mean", self.preprocess.mean), ("std", self.preprocess.std)):
            if len(values) not in (0, 1, self.shape[0]):
                raise OptionError(
                    f"{name} has {len(values)} numbers, the input has {self.shape[0]} channels",
                    "Give one for each channel",
                )

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """[batch, *shape] of the declared dtype, uniform over low..high."""
        generator = torch.Generator().manual_seed(seed)
        low, high = self.preprocess.low, self.preprocess.high
        x = low + (high - low) * torch.rand([batch, *self.shape], generator=generator)
        return x.to(torch.uint8) if self.dtype == "uint8" else x


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        model_id: a name for people.
        input: see :class:`InputOptions`.
        classes: length of the logits.
        methods: names, or "FILE.py:Class" for one of the user's own (the file is executed); the first that trains
            or moves statistics, and needs no teacher for it, becomes the default.
        settings: options by method name and option name.
        adapter: what theta is, a key of ``tta_adapters.ADAPTERS``.
        adapter_settings: its options by name.
        adapter_weights: values of its trained tensors by name, e.g. from a warm-up; or None for its own start.
        include: patterns of modules that are adapted.
        exclude: patterns to leave out.
        class_names: for people, or None.
        head: path of the classifier module, or None for the last Linear.
        default_method: or None for the rule above.
        source_images: [n, *input.shape] as users send them, unlabelled, for methods that need facts of the source
            (eata); or None.
        tensorrt: compute capabilities; with any, each graph gets a variant for TensorRT, whose builder must take it for
            all of them.
        provenance: facts recorded in the manifest.
    """

    model_id: str
    input: InputOptions
    classes: int
    methods: Sequence[str]
    settings: Mapping[str, Mapping[str, OptionValue]] = field(default_factory=dict)
    adapter: str = "norm"
    adapter_settings: Mapping[str, OptionValue] = field(default_factory=dict)
    adapter_weights: Mapping[str, Tensor] | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    head: str | None = None
    default_method: str | None = None
    source_images: Tensor | None = None
    tensorrt: Sequence[Capability] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """A bundle just built, with the torch side it was compiled from (the oracle of a parity check)."""

    path: Path
    manifest: manifest.Manifest
    adapter: NetworkAdapter
    methods: Mapping[str, Method]
    options: BuildOptions


def prepare(network: nn.Module, options: BuildOptions) -> tuple[NetworkAdapter, dict[str, Method]]:
    """The adapter and the methods of a build, checked against the network.

    Raises:
        NetworkRefused: nothing that the adapter adapts, logits of another shape than [batch, classes], weights that
            are not finite.
        WeightsDoNotFit: the adapter's weights have other names or shapes than its tensors.
        OptionError: an unknown adapter or method, an option or a number of names that does not fit.
    """
    if not options.methods:
        raise OptionError("no method is named", "Name one, e.g. source")
    if options.class_names is not None and len(options.class_names) != options.classes:
        raise OptionError(
            f"{len(options.class_names)} class names for {options.classes} classes", "Give one for each class"
        )
    try:
        adapter = make_adapter(
            options.adapter,
            network,
            options.adapter_settings,
            include=options.include,
            exclude=options.exclude,
            preprocess=options.input.preprocess,
            head=options.head,
            classes=options.classes,
            input_range=(options.input.preprocess.low, options.input.preprocess.high),
            input_shape=options.input.shape,
        )
        if options.adapter_weights is not None:
            adapter.start_from(options.adapter_weights)
        check_finite({**dict(adapter.module.named_parameters()), **adapter.unpack(adapter.source_theta())})
        _check_logits(adapter, options)
        strangers = sorted(set(options.settings) - {settings_key(entry) for entry in options.methods})
        if strangers:
            raise OptionError(
                f"settings for {', '.join(strangers)}, which is not built",
                f"Methods are {', '.join(options.methods)}",
            )
    except SelectionError as error:
        raise NetworkRefused(
            str(error), "Check --include, --exclude and --head; see docs/export.md for what is adapted"
        ) from error
    except (UnknownAdapterError, UnknownOptionError) as error:
        raise OptionError(str(error), "See docs/adapters.md for adapters and their options") from error
    except TensorsDoNotFit as error:
        raise WeightsDoNotFit(
            f"the adapter's weights: {error}",
            "Give the same --adapter, --adapter-set, --include and --exclude as to the warm-up",
        ) from error
    methods: dict[str, Method] = {}
    try:
        for entry in options.methods:
            name, method = _method(entry, adapter, options)
            if name in methods:
                raise OptionError(
                    f"two of the methods are named {name}", "Name each once, or rename your own"
                )
            if isinstance(method, Calibrated):
                _calibrate(name, method, options)
            methods[name] = method
    except SelectionError as error:
        raise OptionError(str(error), "A network without BatchNorm takes --methods source,tent") from error
    except (UnknownMethodError, UnknownOptionError) as error:
        raise OptionError(str(error), "See docs/methods.md for methods and their options") from error
    if options.default_method is not None and options.default_method not in methods:
        raise OptionError(
            f"the default method is {options.default_method!r}, which is not built",
            f"Methods are {', '.join(methods)}",
        )
    return adapter, methods


def _calibrate(name: str, method: Calibrated, options: BuildOptions) -> None:
    images = options.source_images
    if images is None:
        raise OptionError(
            f"method {name} needs unlabelled images of the source",
            "Give about 500 with --source-images FILE.npz",
        )
    if list(images.shape[1:]) != list(options.input.shape):
        raise OptionError(
            f"the source images are {list(images.shape[1:])}, the input is {list(options.input.shape)}",
            "Give images of the input's shape",
        )
    method.calibrate(torch.split(images[:MAX_SOURCE_IMAGES], CALIBRATION_BATCH))


def settings_key(entry: str) -> str:
    """Under which name ``BuildOptions.settings`` holds a method's options: "tent", or "Soft" for "my.py:Soft"."""
    return entry.rpartition(":")[2]


def _method(entry: str, adapter: NetworkAdapter, options: BuildOptions) -> tuple[str, Method]:
    file, separator, name = entry.rpartition(":")
    constructor = cast("Callable[..., Method]", load_attribute(Path(file), name)) if separator else name
    try:
        method = make_method(constructor, adapter, options.settings.get(name))
        spec = method.spec
    except (SelectionError, UnknownMethodError, UnknownOptionError):
        raise
    except Exception as error:
        # A method of the user's own may raise anything, or not be one at all.
        raise OptionError(
            f"method {entry} cannot be made: {in_one_line(error)}", "Try tta_adapters.check_method on it"
        ) from error
    for hyper in spec.hyper:
        low = -math.inf if hyper.low is None else hyper.low
        high = math.inf if hyper.high is None else hyper.high
        if not low <= hyper.default <= high or not math.isfinite(hyper.default):
            raise OptionError(
                f"{name}.{hyper.name} is {hyper.default:g}, it goes from {low:g} to {high:g}",
                "Give a value in this range",
            )
    return spec.name, method


def build(network: nn.Module, options: BuildOptions, out: Path, *, progress: Progress = logger.info) -> Built:
    """Compiles a network and its methods into a bundle directory.

    The directory appears complete or not at all: everything is written beside it and renamed at the end.

    Args:
        network: [batch, *input.shape] -> logits [batch, classes]; left as it is.
        options: what to build.
        out: the directory to make; it must not exist or be empty.
        progress: told what is being done, one line each.

    Raises:
        OutputExists: ``out`` holds something.
        OutputUnwritable: the directory cannot be made there.
        NetworkRefused, OptionError, TraceFailed, OperatorNotSupported: see each.
        ExtraMissing, CheckFailed: TensorRT's builder is wanted and not installed, or refuses a graph.
    """
    check_free(out)
    if options.tensorrt:
        load_builder()  # before minutes of tracing
    adapter, methods = prepare(network, options)
    with staged(out) as work:
        sealed = _write(adapter, methods, options, work, progress)
    return Built(out, sealed, adapter, methods, options)


def _check_logits(adapter: NetworkAdapter, options: BuildOptions) -> None:
    x = options.input.example(EXAMPLE_BATCH)
    try:
        with torch.no_grad():
            theta = adapter.source_theta().to(adapter.dtype)
            logits = adapter.forward(adapter.unpack(theta), x).logits
    except Exception as error:
        # The network's own code may raise anything.
        raise NetworkRefused(
            f"the network fails on an input of shape {list(x.shape)}: {in_one_line(error)}",
            "Check --input against what the network takes",
        ) from error
    if not isinstance(logits, Tensor) or list(logits.shape) != [EXAMPLE_BATCH, options.classes]:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkRefused(
            f"the network returns {found}, expected logits [{EXAMPLE_BATCH}, {options.classes}]",
            "Check --classes; the network must return one tensor of logits",
        )
    if not bool(torch.isfinite(logits).all()):
        preprocess = options.input.preprocess
        raise NetworkRefused(
            f"the logits are not finite on noise in {preprocess.low:g}..{preprocess.high:g}",
            "Check --range, --mean and --std against what the network was trained with",
        )


def _write(
    adapter: NetworkAdapter,
    methods: Mapping[str, Method],
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> manifest.Manifest:
    graphs: dict[str, manifest.Graph] = {}
    with WeightsWriter(work) as weights:
        progress("forward: tracing and lowering")
        graphs[manifest.FORWARD] = _forward_graph(adapter, options, work, weights)
        for name, method in methods.items():
            if method.spec.steps:
                progress(f"step.{name}: tracing and lowering")
                graphs[f"step.{name}"] = _step_graph(name, adapter, method, options, work, weights)
    for key, graph in graphs.items() if options.tensorrt else ():
        progress(f"{key}: building for TensorRT")
        build_plan(work, key, graph, options.tensorrt)
    progress("theta, anchor, manifest")
    source = adapter.source_theta().numpy()
    layout, vector = make_layout(
        [
            (
                entry.name,
                source[entry.offset : entry.offset + entry.size].reshape(entry.shape),
                entry.kind,
                entry.trained,
            )
            for entry in adapter.tensors
        ]
    )
    bundle.write_tensors(
        work / manifest.THETA,
        {
            entry.name: np.ascontiguousarray(
                vector[entry.offset : entry.offset + entry.size].reshape(entry.shape)
            )
            for entry in adapter.tensors
        },
    )
    bundle.write_tensors(work / manifest.ANCHOR, _anchors(methods))
    unsealed = manifest.Manifest(
        model_id=options.model_id,
        input=manifest.InputSpec(
            dtype=options.input.dtype,
            shape=["batch", *options.input.shape],
            low=options.input.preprocess.low,
            high=options.input.preprocess.high,
            layout="NCHW" if len(options.input.shape) == 3 else "flat",
        ),
        classes=options.classes,
        class_names=list(options.class_names) if options.class_names is not None else None,
        adapter=adapter.name,
        theta=layout,
        graphs=graphs,
        methods={name: _describe(name, method.spec) for name, method in methods.items()},
        default_method=options.default_method or _default(methods),
        provenance={
            "tta-runtime": __version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "python": platform.python_version(),
            **{f"adapter.{key}": str(value) for key, value in options.adapter_settings.items()},
            **options.provenance,
        },
    )
    return bundle.seal(work, unsealed)


def _anchors(methods: Mapping[str, Method]) -> dict[str, np.ndarray]:
    """The anchors of all methods together; methods that name the same fact share it."""
    anchors: dict[str, np.ndarray] = {}
    for name, method in methods.items():
        for key, value in method.anchor().items():
            array = value.detach().to(torch.float32).contiguous().numpy()
            if key in anchors and not np.array_equal(anchors[key], array):
                raise OptionError(
                    f"method {name} has another anchor {key!r} than the method before it",
                    "Put the method's name before the key of a fact that is its own",
                )
            anchors[key] = array
    return anchors


def _default(methods: Mapping[str, Method]) -> str:
    """The method that is served unless another is named: the one that decides for itself, or one that trains alone."""
    specs = {name: method.spec for name, method in methods.items()}
    deciding = [name for name, spec in specs.items() if spec.window]
    training = [name for name, spec in specs.items() if spec.trains and not spec.target]
    return next(iter((*deciding, *training, *methods)))


def _describe(name: str, spec: MethodSpec) -> manifest.MethodSpec:
    return manifest.MethodSpec(
        doc=spec.doc,
        step=f"step.{name}" if spec.steps else None,
        logits=spec.logits,
        serve_vector=spec.serve_vector,
        state=[
            manifest.StateSpec(name=entry.name, dtype="float32", shape=list(entry.shape), init=entry.init)
            for entry in spec.state
        ],
        hyper=[
            manifest.HyperSpec(
                name=entry.name, default=entry.default, doc=entry.doc, low=entry.low, high=entry.high
            )
            for entry in spec.hyper
        ],
        report=list(spec.report),
        min_batch=spec.min_batch,
        rand=spec.rand,
        window=spec.window,
        forwards=spec.forwards,
        backwards=spec.backwards,
    )


def _forward_graph(
    adapter: NetworkAdapter, options: BuildOptions, work: Path, weights: WeightsWriter
) -> manifest.Graph:
    def forward(x: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = adapter.forward(adapter.unpack(theta), x)
        return out.logits, out.features

    arguments = [
        Argument("x", options.input.example(EXAMPLE_BATCH), BATCH),
        Argument("theta", adapter.source_theta()),
    ]
    binds = [("batch", "x"), ("theta", ""), ("logits", ""), ("features", "")]
    compiled = write_graph(
        manifest.FORWARD,
        "serve",
        forward,
        arguments,
        ["logits", "features"],
        binds,
        adapter.module,
        work,
        weights,
    )
    return _with_tensorrt(compiled, work) if options.tensorrt else compiled


def _step_graph(
    name: str,
    adapter: NetworkAdapter,
    method: Method,
    options: BuildOptions,
    work: Path,
    weights: WeightsWriter,
) -> manifest.Graph:
    source = adapter.source_theta()
    state = init_state(method.spec, source)
    anchor = method.anchor()
    example = torch.randn([EXAMPLE_BATCH, options.classes], generator=torch.Generator().manual_seed(0))
    targets = [("target", "batch", "target", example, True)] if method.spec.target else []
    inputs: list[tuple[str, str, str, Tensor, bool]] = [
        ("x", "batch", "x", options.input.example(EXAMPLE_BATCH), True),
        ("weight", "batch", "weight", torch.ones(EXAMPLE_BATCH), True),
        *targets,
        ("theta", "theta", "", source, False),
        *((f"state.{key}", "state", key, value, False) for key, value in state.items()),
        *((f"anchor.{key}", "anchor", key, value, False) for key, value in anchor.items()),
        ("hyper", "hyper", "", method.spec.default_hyper(), False),
        ("rand", "rand", "", torch.rand(method.spec.rand), False),
    ]
    inputs = [entry for entry in inputs if entry[3].numel() > 0]
    outputs = [
        ("logits", "logits", ""),
        ("theta_out", "theta", ""),
        *((f"state_out.{key}", "state", key) for key in state),
        ("report", "report", ""),
    ]
    empty = torch.zeros(0)

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        given: dict[tuple[str, str], Tensor] = {
            (bind, key): value for (_, bind, key, _, _), value in zip(inputs, values, strict=True)
        }
        given_state: State = {key: given["state", key] for key in state}
        out = method.step(
            Batch(given["batch", "x"], given["batch", "weight"], given.get(("batch", "target"))),
            given["theta", ""],
            given_state,
            {key: given["anchor", key] for key in anchor},
            given.get(("hyper", ""), empty),
            given.get(("rand", ""), empty),
        )
        return (out.logits, out.theta, *(out.state[key] for key in state), out.report)

    compiled = write_graph(
        f"step.{name}",
        "step",
        step,
        [Argument(entry, example, BATCH if dynamic else {}) for entry, _, _, example, dynamic in inputs],
        [entry for entry, _, _ in outputs],
        [*((bind, key) for _, bind, key, _, _ in inputs), *((bind, key) for _, bind, key in outputs)],
        adapter.module,
        work,
        weights,
    )
    return _with_tensorrt(compiled, work) if options.tensorrt else compiled


def _with_tensorrt(graph: manifest.Graph, work: Path) -> manifest.Graph:
    """The graph with its variant for TensorRT written beside it."""
    file = f"{graph.file.removesuffix('.onnx')}.tensorrt.onnx"
    model = ir.load(work / graph.file)
    rewrite(model)
    ir.save(model, work / file)
    return msgspec.structs.replace(graph, tensorrt=file)
