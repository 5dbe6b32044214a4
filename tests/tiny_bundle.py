"""A small real bundle, written by hand with onnx.helper: no torch, no exporter, built in milliseconds.

A linear softmax classifier on 8 numbers with 3 classes. theta is `scale` and `bias` (trained) and `mean` (a
statistic) of its input normalisation:

    h = (x - mean) * scale + bias        logits = h @ W + b        (W, b frozen, in weights.bin)

Methods: `source` (serves only), `tent` (entropy minimisation with its backward pass written out, SGD with
momentum, running mean), `teacher` (a noisy student and its moving average, which serves; uses rand and an
anchor). `reference_tent` is the same step in numpy, written from the formulas.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tta_runtime import bundle, theta
from tta_runtime.manifest import (
    Graph,
    HyperSpec,
    InputSpec,
    Manifest,
    MethodSpec,
    Port,
    StateSpec,
)

D, C = 8, 3
P = 3 * D
F32 = np.float32
_OPSET = [helper.make_opsetid("", 18)]


def weights() -> tuple[NDArray[F32], NDArray[F32]]:
    """W [D, C] and b [C]: class k looks at the inputs k, k + 3, k + 6."""
    w = np.zeros((D, C), F32)
    w[np.arange(D), np.arange(D) % C] = 1.5
    return w, np.array([0.1, 0.0, -0.1], F32)


def samples(n: int, *, seed: int = 0, shift: float = 0.0) -> tuple[NDArray[F32], NDArray[np.int64]]:
    """x [n, D] float32 and labels y [n]: clusters of the classes; `shift` moves and scales the inputs."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    x = 2.0 * (np.arange(D)[None, :] % C == y[:, None]) + rng.normal(0, 0.6, (n, D))
    return (x * (1 - 0.5 * shift) + shift).astype(F32), y


def build(path: Path, *, dtype: str = "float32", fixed_batch: int | None = None) -> Manifest:
    """Write the bundle into the new directory `path`.

    Args:
        path: the directory to make.
        dtype: "float32", or "uint8" for inputs in 0..255 that the graphs scale to 0..1 themselves.
        fixed_batch: compile the step of tent for this many samples.
    """
    path.mkdir(parents=True)
    w, b = weights()
    (path / "weights.bin").write_bytes(w.tobytes() + b.tobytes())
    ones, zeros = np.ones(D, F32), np.zeros(D, F32)
    layout, vector = theta.make_layout(
        [
            ("norm.mean", zeros + F32(0.5), "mean", False),
            ("norm.scale", ones, "weight", True),
            ("norm.bias", zeros, "bias", True),
        ]
    )
    bundle.write_tensors(path / "theta.safetensors", theta.unpack(layout, vector))
    bundle.write_tensors(path / "anchor.safetensors", {"center": np.full(P, 0.25, F32)})

    n: int | str = fixed_batch or "batch"
    x = Port(name="x", dtype=dtype, shape=["batch", D], bind="batch", key="x")
    th = Port(name="theta", dtype="float32", shape=[P], bind="theta")
    logits = Port(name="logits", dtype="float32", shape=["batch", C], bind="logits")
    features = Port(name="features", dtype="float32", shape=["batch", D], bind="features")
    forward = Graph(file="forward.onnx", role="serve", inputs=[x, th], outputs=[logits, features])
    tent = Graph(
        file="step.tent.onnx",
        role="step",
        inputs=[
            Port(name="x", dtype=dtype, shape=[n, D], bind="batch", key="x"),
            Port(name="weight", dtype="float32", shape=[n], bind="batch", key="weight"),
            th,
            Port(name="state.momentum", dtype="float32", shape=[2 * D], bind="state", key="momentum"),
            Port(name="hyper", dtype="float32", shape=[3], bind="hyper"),
        ],
        outputs=[
            Port(name="logits", dtype="float32", shape=[n, C], bind="logits"),
            Port(name="theta_out", dtype="float32", shape=[P], bind="theta"),
            Port(name="state_out.momentum", dtype="float32", shape=[2 * D], bind="state", key="momentum"),
            Port(name="report", dtype="float32", shape=[4], bind="report"),
        ],
    )
    teacher = Graph(
        file="step.teacher.onnx",
        role="step",
        inputs=[
            x,
            th,
            Port(name="state.average", dtype="float32", shape=[P], bind="state", key="average"),
            Port(name="state.count", dtype="int64", shape=[1], bind="state", key="count"),
            Port(name="anchor.center", dtype="float32", shape=[P], bind="anchor", key="center"),
            Port(name="rand", dtype="float32", shape=[P], bind="rand"),
        ],
        outputs=[
            logits,
            Port(name="theta_out", dtype="float32", shape=[P], bind="theta"),
            Port(name="state_out.average", dtype="float32", shape=[P], bind="state", key="average"),
            Port(name="state_out.count", dtype="int64", shape=[1], bind="state", key="count"),
            Port(name="report", dtype="float32", shape=[1], bind="report"),
        ],
    )
    save_graph(path, forward, forward_nodes(dtype), ("h",))
    save_graph(path, tent, [*forward_nodes(dtype), *_TENT])
    save_graph(path, teacher, [*forward_nodes(dtype), *_TEACHER])
    manifest = Manifest(
        model_id="tiny",
        input=InputSpec(
            dtype=dtype, shape=["batch", D], low=0.0, high=255.0 if dtype == "uint8" else 1.0, layout="flat"
        ),
        classes=C,
        class_names=["a", "b", "c"],
        adapter="norm",
        theta=layout,
        graphs={"forward": forward, "step.tent": tent, "step.teacher": teacher},
        methods={
            "source": MethodSpec(doc="The frozen model.", step=None, logits="before"),
            "tent": MethodSpec(
                doc="Entropy minimisation.",
                step="step.tent",
                logits="before",
                state=[StateSpec(name="momentum", dtype="float32", shape=[2 * D], init="zeros")],
                hyper=[
                    HyperSpec(name="lr", default=0.05, doc="Learning rate.", low=0.0),
                    HyperSpec(name="momentum", default=0.9, low=0.0, high=1.0),
                    HyperSpec(name="alpha", default=0.1, doc="Weight of the batch mean.", low=0.0, high=1.0),
                ],
                report=["loss", "entropy", "accepted", "update_norm"],
                batch=fixed_batch,
                min_batch=2,
                forwards=1.0,
                backwards=1.0,
            ),
            "teacher": MethodSpec(
                doc="A noisy student and its average.",
                step="step.teacher",
                serve_vector="state:average",
                logits="after",
                state=[
                    StateSpec(name="average", dtype="float32", shape=[P], init="theta"),
                    StateSpec(name="count", dtype="int64", shape=[1], init="zeros"),
                ],
                report=["noise"],
                rand=P,
            ),
        },
        default_method="tent",
        provenance={"made_by": "tests/tiny_bundle.py"},
    )
    return bundle.seal(path, manifest)


def reference_tent(
    x: NDArray[F32],
    weight: NDArray[F32],
    vector: NDArray[F32],
    momentum: NDArray[F32],
    lr: float = 0.05,
    mu: float = 0.9,
    alpha: float = 0.1,
) -> tuple[NDArray[F32], NDArray[F32], NDArray[F32]]:
    """logits, theta' and momentum' of one tent step, in float64 from the formulas."""
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    scale, bias, mean = vector.astype(np.float64).reshape(3, D)
    w, b = (a.astype(np.float64) for a in weights())
    z = ((x64 - mean) * scale + bias) @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1, keepdims=True)
    share = (w64 / max(w64.sum(), 1e-6))[:, None]
    dz = -p * (np.log(p) + h) * share  # d entropy / d z_k = -p_k (log p_k + H)
    dh = dz @ w.T
    gradient = np.concatenate([(dh * (x64 - mean)).sum(0), dh.sum(0)])
    new = mu * momentum + gradient
    taken = w64.sum() > 0
    mean_out = (1 - alpha) * mean + alpha * (share * x64).sum(0) if taken else mean
    return z.astype(F32), np.concatenate([vector[: 2 * D] - lr * new, mean_out]).astype(F32), new.astype(F32)


def _n(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def forward_nodes(dtype: str) -> list[onnx.NodeProto]:
    scaled = [_n("Cast", "x", "x_cast", to=TensorProto.FLOAT), _n("Div", "x_cast c.255", "x_f")]
    return [
        *(scaled if dtype == "uint8" else [_n("Identity", "x", "x_f")]),
        _n("Split", "theta", "scale bias mean", num_outputs=3),
        _n("Sub", "x_f mean", "centred"),
        _n("Mul", "centred scale", "scaled"),
        _n("Add", "scaled bias", "h"),
        _n("MatMul", "h W", "hw"),
        _n("Add", "hw b", "logits"),
    ]


_TENT = [
    _n("LogSoftmax", "logits", "logp", axis=-1),
    _n("Exp", "logp", "p"),
    _n("Mul", "p logp", "plogp"),
    _n("ReduceSum", "plogp c.axis1", "neg_entropy", keepdims=1),  # -H, [batch, 1]
    _n("ReduceSum", "weight", "wsum", keepdims=0),
    _n("Max", "wsum c.eps", "wsafe"),
    _n("Unsqueeze", "weight c.axis1", "wcol"),
    _n("Div", "wcol wsafe", "share"),
    _n("Sub", "neg_entropy logp", "minus_logp_h"),  # -(log p + H)
    _n("Mul", "p minus_logp_h", "dz_each"),
    _n("Mul", "dz_each share", "dz"),
    _n("Transpose", "W", "WT", perm=[1, 0]),
    _n("MatMul", "dz WT", "dh"),
    _n("Mul", "dh centred", "dscale_each"),
    _n("ReduceSum", "dscale_each c.axis0", "dscale", keepdims=0),
    _n("ReduceSum", "dh c.axis0", "dbias", keepdims=0),
    _n("Concat", "dscale dbias", "gradient", axis=0),
    _n("Split", "hyper", "lr mu alpha", num_outputs=3),
    _n("Mul", "mu state.momentum", "kept"),
    _n("Add", "kept gradient", "state_out.momentum"),
    _n("Mul", "lr state_out.momentum", "update"),
    _n("Slice", "theta c.zero c.trained", "trained"),
    _n("Sub", "trained update", "trained_out"),
    _n("Mul", "x_f share", "x_share"),
    _n("ReduceSum", "x_share c.axis0", "batch_mean", keepdims=0),
    _n("Sub", "batch_mean mean", "drift"),
    _n("Mul", "alpha drift", "ema"),
    _n("Greater", "wsum c.fzero", "taken"),
    _n("Where", "taken ema c.fzero", "ema_taken"),
    _n("Add", "mean ema_taken", "mean_out"),
    _n("Concat", "trained_out mean_out", "theta_out", axis=0),
    _n("Neg", "neg_entropy", "entropy_each"),
    _n("Mul", "entropy_each share", "loss_each"),
    _n("ReduceSum", "loss_each", "loss", keepdims=0),
    _n("ReduceMean", "entropy_each", "entropy", keepdims=0),
    _n("Greater", "weight c.fzero", "accepted_each"),
    _n("Cast", "accepted_each", "accepted_f", to=TensorProto.FLOAT),
    _n("ReduceMean", "accepted_f", "accepted", keepdims=0),
    _n("ReduceL2", "update", "update_norm", keepdims=0),
    *[
        _n("Unsqueeze", f"{name} c.axis0", f"r.{name}")
        for name in ("loss", "entropy", "accepted", "update_norm")
    ],
    _n("Concat", "r.loss r.entropy r.accepted r.update_norm", "report", axis=0),
]

_TEACHER = [
    _n("Sub", "rand c.half", "noise"),
    _n("Mul", "noise anchor.center", "noise_scaled"),
    _n("Add", "theta noise_scaled", "theta_out"),
    _n("Mul", "state.average c.half", "half_average"),
    _n("Mul", "theta_out c.half", "half_theta"),
    _n("Add", "half_average half_theta", "state_out.average"),
    _n("Add", "state.count c.one", "state_out.count"),
    _n("ReduceL2", "noise_scaled c.axis0", "report", keepdims=1),
]

_CONSTANTS = {
    "c.255": np.array(255, F32),
    "c.axis0": np.array([0], np.int64),
    "c.axis1": np.array([1], np.int64),
    "c.zero": np.array([0], np.int64),
    "c.one": np.array([1], np.int64),
    "c.trained": np.array([2 * D], np.int64),
    "c.eps": np.array(1e-6, F32),
    "c.fzero": np.array(0, F32),
    "c.half": np.array(0.5, F32),
}


def _external(name: str, shape: list[int], offset: int, location: str = "weights.bin") -> onnx.TensorProto:
    """A float32 tensor whose values lie in the shared file."""
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save_graph(
    path: Path,
    graph: Graph,
    nodes: list[onnx.NodeProto],
    features: tuple[str, ...] = (),
    location: str = "weights.bin",
) -> None:
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
    values = [
        [helper.make_tensor_value_info(p.name, types[p.dtype], p.shape) for p in ports]
        for ports in (graph.inputs, graph.outputs)
    ]
    nodes = nodes + [_n("Identity", name, "features") for name in features]
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(v, k) for k, v in _CONSTANTS.items() if k in used]
    external = [_external("W", [D, C], 0, location), _external("b", [C], 4 * D * C, location)]
    proto = helper.make_graph(nodes, graph.file, *values, initializer=constants + external)
    model = helper.make_model(proto, opset_imports=_OPSET, ir_version=10)
    (path / graph.file).write_bytes(model.SerializeToString())
