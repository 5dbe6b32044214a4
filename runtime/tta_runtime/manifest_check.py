"""Whether the parts of a manifest agree: clauses B6 to B9, B17 and B18 of docs/spec/bundle.md, without any I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

from .errors import (
    BundleError,
    GraphMismatch,
    LayoutMalformed,
    ManifestInconsistent,
    PathEscapes,
    WrongTask,
    did_you_mean,
)
from .manifest import (
    ANCHOR,
    FORWARD,
    MANIFEST,
    THETA,
    Graph,
    InputSpec,
    Manifest,
    MethodSpec,
    Port,
    TextSpec,
)
from .tensors import DTYPES

REBUILD = "Build the bundle again"
ROLES = ("serve", "step", "probe", "absorb")
INPUT_BINDS = ("batch", "theta", "state", "anchor", "hyper", "rand", "cache")
OUTPUT_BINDS = ("logits", "features", "theta", "state", "report", "cache")
TASKS = ("classification", "text")

MAX_ELEMENTS = 1 << 40
"""Bound for any product of dimensions, so that sizes computed from a manifest stay ordinary numbers."""
MAX_WINDOW = 4096
MAX_RAND = 1 << 24
MAX_PASSES = 1e6
MAX_CHUNK = 1 << 16
"""The tokens that wait for a chunk stand in the notes of a state file."""
MAX_HYPER = 3e38
"""A larger number is not a float32."""

BYTES = "bytes"
"""The tokenizer that needs no file."""

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


def check(manifest: Manifest) -> None:
    """Raise the error of the first clause that the manifest breaks.

    Raises:
        PathEscapes: a file name is not a plain name (B6).
        LayoutMalformed: the theta layout is not one contiguous, ordered vector (B7).
        ManifestInconsistent: names, ranges or references contradict each other (B8).
        GraphMismatch: a graph's ports do not fit the layout, the input or the method (B9).
    """
    _check_files(manifest)
    _check_layout(manifest)
    _check_head(manifest)
    _check_text(manifest)
    for key, graph in manifest.graphs.items():
        _check_graph(manifest, key, graph)
    for name, method in manifest.methods.items():
        _check_method(manifest, name, method)


def expect_task(manifest: Manifest, task: str) -> None:
    """Whether a bundle is for a task.

    Raises:
        WrongTask: it is for another one.
    """
    if manifest.task != task:
        raise WrongTask(
            f"bundle `{manifest.model_id}` is for the task `{manifest.task}`, `{task}` was asked for",
            "Use tta_runtime.TextModel, or the requests score, generate and absorb (tta-edge text)"
            if manifest.text is not None
            else "Use tta_runtime.Model, or the request predict",
        )


def expect_text(manifest: Manifest) -> TextSpec:
    """What a bundle says of its texts.

    Raises:
        WrongTask: it is for another task.
    """
    expect_task(manifest, "text")
    if manifest.text is None:  # B17 has excluded it where the bundle was opened
        raise WrongTask(f"bundle `{manifest.model_id}` does not describe its texts", REBUILD)
    return manifest.text


# ------------------------------------------------------------------------------------------ B6: file names


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        _need(
            bool(_FILE.fullmatch(name)) and name != MANIFEST,
            PathEscapes,
            f"files lists `{name}`, which is not a plain file name inside the bundle",
        )
        _need(
            bool(_HEX.fullmatch(entry.sha256)),
            ManifestInconsistent,
            f"files.{name} has sha256 `{entry.sha256[:80]}`, expected 64 hexadecimal digits",
        )
    graphs = manifest.graphs.values()
    plain = [graph.file for graph in graphs]
    tensorrt = [graph.tensorrt for graph in graphs if graph.tensorrt is not None]
    tokenizer = [] if manifest.text is None or manifest.text.tokenizer == BYTES else [manifest.text.tokenizer]
    for name in (THETA, ANCHOR, *plain, *tensorrt, *tokenizer):
        _need(name in manifest.files, ManifestInconsistent, f"`{name}` is used but not listed in files")


# ------------------------------------------------------------------------------------------ B7: theta layout


def _check_layout(manifest: Manifest) -> None:
    layout = manifest.theta
    position = trained = 0
    names: set[str] = set()
    for entry in layout.entries:
        size = _size(entry.shape, LayoutMalformed, f"theta entry `{entry.name}`")
        _need(
            entry.offset == position,
            LayoutMalformed,
            f"theta entry `{entry.name}` starts at {entry.offset}, the one before it ends at {position}",
        )
        _need(
            bool(entry.name) and entry.name not in names, LayoutMalformed, f"theta has `{entry.name}` twice"
        )
        _need(
            not entry.trained or trained == position,
            LayoutMalformed,
            f"trained theta entry `{entry.name}` comes after one that is not trained",
        )
        names.add(entry.name)
        position += size
        trained = position if entry.trained else trained
    _need(position > 0, LayoutMalformed, "theta has no entries")
    _need(
        position == layout.size,
        LayoutMalformed,
        f"theta.size is {layout.size}, the entries have {position} elements",
    )
    _need(
        trained == layout.trained,
        LayoutMalformed,
        f"theta.trained is {layout.trained}, the trained entries have {trained} elements",
    )
    _need(
        bool(_HEX.fullmatch(layout.digest)),
        LayoutMalformed,
        f"theta.digest is `{layout.digest[:80]}`, expected 64 hexadecimal digits",
    )


# -------------------------------------------------------------------------------------- B8: everything else


def _check_head(manifest: Manifest) -> None:
    task, classes = manifest.task, manifest.classes
    _need(
        task in TASKS,
        ManifestInconsistent,
        f"task is `{task}`, this version knows {' and '.join(TASKS)}",
    )
    _need(bool(manifest.model_id), ManifestInconsistent, "model_id is empty")
    _need(bool(manifest.adapter), ManifestInconsistent, "adapter is empty")
    _need(classes >= 1, ManifestInconsistent, f"classes is {classes}, at least 1 is needed")
    names = manifest.class_names
    _need(
        names is None or len(names) == classes,
        ManifestInconsistent,
        f"there are {len(names or [])} class names for {classes} classes",
    )
    spec = manifest.input
    _need(
        spec.low < spec.high,
        ManifestInconsistent,
        f"input.low {spec.low} is not below input.high {spec.high}",
    )
    if task == "classification":
        _check_images(spec)
    forward = manifest.graphs.get(FORWARD)
    _need(
        forward is not None and forward.role == "serve",
        ManifestInconsistent,
        "there is no serving graph `forward`",
    )
    _need(
        manifest.default_method in manifest.methods,
        ManifestInconsistent,
        f"default_method `{manifest.default_method}` is not a method"
        + did_you_mean(manifest.default_method, manifest.methods),
    )


def _check_images(spec: InputSpec) -> None:
    shape = spec.shape
    _need(
        spec.dtype in ("float32", "uint8"),
        ManifestInconsistent,
        f"input.dtype is `{spec.dtype}`, expected float32 or uint8",
    )
    _need(
        spec.layout in ("NCHW", "flat"),
        ManifestInconsistent,
        f"input.layout is `{spec.layout}`, expected NCHW or flat",
    )
    rank = 4 if spec.layout == "NCHW" else 2
    _need(
        len(shape) == rank and shape[0] == "batch" and "batch" not in shape[1:],
        ManifestInconsistent,
        f'input.shape is {shape}, expected {rank} dimensions with "batch" first',
    )
    _size([n for n in shape if isinstance(n, int)], ManifestInconsistent, "input.shape")


def _check_text(manifest: Manifest) -> None:
    spec, text, vocabulary = manifest.input, manifest.text, manifest.classes
    if manifest.task != "text" or text is None:
        _need(
            manifest.task != "text" and text is None,
            ManifestInconsistent,
            f"task is `{manifest.task}`, and `text` is {'missing' if text is None else 'given'}",
        )
        return
    given = (spec.dtype, spec.shape, spec.layout, spec.low, spec.high)
    expected = ("int64", [1, "tokens"], "tokens", 0.0, vocabulary - 1.0)
    _need(given == expected, ManifestInconsistent, f"input of a text is {given}, expected {expected}")
    _need(
        1 <= text.chunk < text.context and text.chunk <= MAX_CHUNK,
        ManifestInconsistent,
        f"text.chunk is {text.chunk} and text.context {text.context}, expected 1 <= chunk < context and chunk at "
        f"most {MAX_CHUNK}",
    )
    _need(
        len(text.cache) == 4 and text.cache[1] == 2,
        ManifestInconsistent,
        f"text.cache is {text.cache}, expected [layers, 2, kv_heads, head_width]",
    )
    _size([*text.cache, text.context], ManifestInconsistent, "text.cache")
    for name, token in (("begin", text.begin), ("end", text.end)):
        _need(
            token is None or token < vocabulary,
            ManifestInconsistent,
            f"text.{name} is {token}, the vocabulary has {vocabulary} tokens",
        )
    _need(
        text.tokenizer != BYTES or vocabulary >= 256,
        ManifestInconsistent,
        f"tokens are bytes, and the vocabulary has {vocabulary}",
    )


def _check_method(manifest: Manifest, name: str, method: MethodSpec) -> None:
    where = f"method `{name}`"
    _need(bool(_NAME.fullmatch(name)), ManifestInconsistent, f"{where}: the name is not of the form a-z0-9_-")
    _need(
        method.logits in ("before", "after"),
        ManifestInconsistent,
        f"{where}: logits is `{method.logits}`, expected before or after",
    )
    _need(
        method.min_batch >= 1 and (method.batch is None or method.batch >= method.min_batch),
        ManifestInconsistent,
        f"{where}: batch {method.batch} and min_batch {method.min_batch} contradict each other",
    )
    _need(
        method.rand <= MAX_RAND,
        ManifestInconsistent,
        f"{where}: rand is {method.rand}, the limit is {MAX_RAND}",
    )
    cost = (method.forwards, method.backwards)
    _need(
        cost == (None, None) or all(n is not None and 0 <= n <= MAX_PASSES for n in cost),
        ManifestInconsistent,
        f"{where}: forwards {method.forwards} and backwards {method.backwards}, expected both from 0 to "
        f"{MAX_PASSES:g} or neither",
    )
    _need(
        method.step is not None or cost in ((None, None), (0, 0)),
        ManifestInconsistent,
        f"{where}: there is no step to make {method.forwards} forwards and {method.backwards} backwards",
    )
    _distinct([s.name for s in method.state], f"{where}: state")
    _distinct([h.name for h in method.hyper], f"{where}: hyper")
    _distinct(method.report, f"{where}: report")
    for state in method.state:
        _size(state.shape, ManifestInconsistent, f"{where}: state `{state.name}`")
        _need(
            state.dtype in DTYPES and state.init in ("zeros", "ones", "theta"),
            ManifestInconsistent,
            f"{where}: state `{state.name}` has dtype `{state.dtype}` and init `{state.init}`",
        )
        _need(
            state.init != "theta" or (state.dtype == "float32" and state.shape == [manifest.theta.size]),
            ManifestInconsistent,
            f"{where}: state `{state.name}` starts as theta but is {state.dtype} {state.shape}",
        )
    for hyper in method.hyper:
        low = -math.inf if hyper.low is None else hyper.low
        high = math.inf if hyper.high is None else hyper.high
        _need(
            abs(hyper.default) <= MAX_HYPER and low <= hyper.default <= high,
            ManifestInconsistent,
            f"{where}: hyper `{hyper.name}` has default {hyper.default} outside of {low}..{high}",
        )
    kind, _, key = method.serve_vector.partition(":")
    vectors = [s.name for s in method.state if s.dtype == "float32" and s.shape == [manifest.theta.size]]
    _need(
        method.serve_vector == "theta" or (kind == "state" and key in vectors),
        ManifestInconsistent,
        f"{where}: serve_vector is `{method.serve_vector}`, expected theta or state:NAME of a float32 "
        f"[{manifest.theta.size}]",
    )
    stepping = "absorb" if manifest.task == "text" else "step"
    for graph_key, role in ((method.serve, "serve"), (method.step, stepping)):
        if graph_key is None:
            continue
        graph = manifest.graphs.get(graph_key)
        if graph is None or graph.role != role:
            raise ManifestInconsistent(
                f"{where}: there is no {role} graph `{graph_key}`" + did_you_mean(graph_key, manifest.graphs),
                REBUILD,
            )
        if manifest.text is None:
            _check_use(manifest, name, method, graph_key, graph)
        else:
            _need(
                method.serve_vector == "theta",
                ManifestInconsistent,
                f"{where}: serve_vector is `{method.serve_vector}`, theta serves a text",
            )
            _check_text_use(manifest, manifest.text, name, method, graph_key, graph)
    _need(
        method.window <= MAX_WINDOW,
        ManifestInconsistent,
        f"{where}: window is {method.window} samples, the limit is {MAX_WINDOW}",
    )
    _need(
        not method.window or manifest.takes_target(name),
        ManifestInconsistent,
        f"{where}: it has a window of {method.window} samples, but its step takes no target",
    )


# ------------------------------------------------------------------------------------------ B9: ports


def _check_graph(manifest: Manifest, key: str, graph: Graph) -> None:
    where = f"graph `{key}`"
    _need(
        graph.role in ROLES, ManifestInconsistent, f"{where}: role is `{graph.role}`, expected one of {ROLES}"
    )
    for side, ports, binds in (("input", graph.inputs, INPUT_BINDS), ("output", graph.outputs, OUTPUT_BINDS)):
        names = [p.name for p in ports]
        bound = [(p.bind, p.key) for p in ports]
        _need(
            len(set(names)) == len(names) and all(names),
            GraphMismatch,
            f"{where}: {side} names {names} repeat",
        )
        _need(
            len(set(bound)) == len(bound), GraphMismatch, f"{where}: two {side}s are bound to the same value"
        )
        for port in ports:
            _need(
                port.bind in binds and port.dtype in DTYPES,
                GraphMismatch,
                f"{where}: {side} `{port.name}` has bind `{port.bind}` and dtype `{port.dtype}`",
            )
            _need(
                (port.bind in ("batch", "state", "anchor")) == bool(port.key),
                GraphMismatch,
                f"{where}: {side} `{port.name}` is bound to {port.bind} with key `{port.key}`",
            )
            _size(
                [n for n in port.shape if isinstance(n, int)], GraphMismatch, f"{where}: {side} `{port.name}`"
            )
    if key == FORWARD:
        binds_used = {(p.bind, p.key) for p in graph.inputs}
        allowed = {("batch", "x"), ("theta", "")} | ({("cache", "")} if manifest.task == "text" else set())
        _need(
            binds_used <= allowed,
            GraphMismatch,
            f"{where} takes {sorted(b for b, _ in binds_used)}, it must need only {_names(allowed)}",
        )


def _check_use(manifest: Manifest, name: str, method: MethodSpec, key: str, graph: Graph) -> None:
    """Check a graph's ports against the method that uses it, where the sizes of all vectors are known."""
    where = f"graph `{key}` of method `{name}`"
    step = graph.role == "step"
    batch: int | str = method.batch if step and method.batch is not None else "batch"
    states = {s.name: (s.dtype, list[int | str](s.shape)) for s in method.state}
    expected: dict[tuple[str, str], tuple[str, list[int | str]]] = {
        ("batch", "x"): (manifest.input.dtype, [batch, *manifest.input.shape[1:]]),
        ("theta", ""): ("float32", [manifest.theta.size]),
        ("logits", ""): ("float32", [batch, manifest.classes]),
        **{("state", k): v for k, v in states.items()},
    }
    if step:
        expected |= {
            ("batch", "weight"): ("float32", [batch]),
            ("batch", "target"): ("float32", [batch, manifest.classes]),
            ("hyper", ""): ("float32", [len(method.hyper)]),
            ("rand", ""): ("float32", [method.rand]),
            ("report", ""): ("float32", [len(method.report)]),
        }
    free = (
        "anchor",
        "features",
    )  # anchors are checked against their file, features have no size in the manifest
    for port in (*graph.inputs, *graph.outputs):
        if port.bind in free:
            continue
        if (port.bind, port.key) not in expected:
            raise GraphMismatch(
                f"{where}: `{port.name}` is bound to {port.bind} `{port.key}`, unknown to the method",
                REBUILD,
            )
        dtype, shape = expected[port.bind, port.key]
        _need(
            port.dtype == dtype and _fits(port, shape),
            GraphMismatch,
            f"{where}: `{port.name}` is {port.dtype} {port.shape}, expected {dtype} {shape}",
        )
    outputs = {(p.bind, p.key) for p in graph.outputs}
    needed = {("logits", "")}
    if step:
        needed |= {("theta", ""), *(("state", k) for k in states)}
        needed |= {("report", "")} if method.report else set()
    allowed = needed | {("features", "")}
    _need(
        needed <= outputs <= allowed,
        GraphMismatch,
        f"{where} returns {_names(outputs)}, expected {_names(needed)}",
    )


def _check_text_use(
    manifest: Manifest, text: TextSpec, name: str, method: MethodSpec, key: str, graph: Graph
) -> None:
    """The same for text: a pass takes and gives the cache, an absorb graph makes theta of a chunk and a state."""
    where = f"graph `{key}` of method `{name}`"
    size = manifest.theta.size
    layers, two, heads, width = text.cache
    states = {("state", s.name): (s.dtype, list[int | str](s.shape)) for s in method.state}
    inputs: dict[tuple[str, str], tuple[str, list[int | str]]]
    outputs: dict[tuple[str, str], tuple[str, list[int | str]]]
    if graph.role == "serve":
        inputs = {
            ("batch", "x"): ("int64", [1, "tokens"]),
            ("theta", ""): ("float32", [size]),
            ("cache", ""): ("float32", [layers, two, 1, heads, "past", width]),
        }
        outputs = {
            ("logits", ""): ("float32", [1, "tokens", manifest.classes]),
            ("cache", ""): ("float32", [layers, two, 1, heads, "total", width]),
        }
    else:
        inputs = {("batch", "x"): ("int64", [1, text.chunk]), **states}
        outputs = {
            ("theta", ""): ("float32", [size]),
            **states,
            ("report", ""): ("float32", [len(method.report)]),
        }
    for side, ports, expected in (("takes", graph.inputs, inputs), ("returns", graph.outputs, outputs)):
        found = {(p.bind, p.key): p for p in ports}
        _need(
            found.keys() == expected.keys(),
            GraphMismatch,
            f"{where} {side} {_names(found)}, expected {_names(expected)}",
        )
        for bound, (dtype, shape) in expected.items():
            port = found[bound]
            _need(
                port.dtype == dtype and _fits(port, shape),
                GraphMismatch,
                f"{where}: `{port.name}` is {port.dtype} {port.shape}, expected {dtype} {shape}",
            )


def _fits(port: Port, shape: list[int | str]) -> bool:
    return len(port.shape) == len(shape) and all(
        a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(port.shape, shape, strict=True)
    )


# ------------------------------------------------------------------------------------------ helpers


def _need(condition: bool, error: type[BundleError], cause: str) -> None:
    if not condition:
        raise error(cause, REBUILD)


def _names(bound: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(f"{bind} {key}".strip() for bind, key in bound)


def _distinct(names: Collection[str], where: str) -> None:
    _need(
        len(set(names)) == len(names) and all(names),
        ManifestInconsistent,
        f"{where} names {list(names)} are empty or repeat",
    )


def _size(shape: Iterable[int], error: type[BundleError], where: str) -> int:
    """Number of elements; refuses dimensions below 1 and products that no machine holds."""
    size = 1
    for n in shape:
        _need(n >= 1, error, f"{where} has a dimension of {n}")
        size *= n
        _need(size <= MAX_ELEMENTS, error, f"{where} has more than {MAX_ELEMENTS} elements")
    return size
