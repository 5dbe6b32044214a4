"""Checks of a bundle on this machine: it opens, its graphs run where they should, its method suits the batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge import hosting
from tta_edge.config import BundleConfig, Config
from tta_edge.doctor_text import check_text
from tta_edge.wire import InputInfo
from tta_runtime import Bundle, InputSpec, Manifest, Model
from tta_runtime.checks import Check, fail, ok, warn
from tta_runtime.errors import TtaError

STATISTICS = frozenset({"mean", "var"})
"""Kinds of tensors in theta that stand for BatchNorm's running statistics."""
FEW_SAMPLES = 16
"""Statistics of smaller batches are noisy; published figures fall from there on."""


def check_bundle(
    name: str, wanted: BundleConfig, config: Config, batch: int
) -> tuple[list[Check], Manifest | None]:
    """Every check of one bundle; those that need what has failed are left out.

    Args:
        name: in the daemon.
        wanted: its directory and method.
        config: threads, hyper-parameters and policy.
        batch: samples of a request, as the user expects them.

    Returns:
        The checks, and the manifest if the bundle could be opened.
    """
    try:
        bundle = Bundle.open(wanted.path)
    except TtaError as error:
        return [fail(f"bundle {name}", f"{error.code}: {error.cause}", error.fix)], None
    manifest = bundle.manifest
    said = f"{manifest.model_id} at {wanted.path}, all hashes right, {bundle.digest[:12]}"
    checks = [ok(f"bundle {name}", said)]
    try:
        host = hosting.load(name, wanted, config)
    except TtaError as error:
        return [*checks, fail(f"engine {name}", f"{error.code}: {error.cause}", error.fix)], manifest
    checks.append(engine(name, host))
    if host.text is not None:
        return [*checks, *check_text(name, host.text, config)], manifest
    model = host.model(config)
    size = model.spec.window or model.spec.batch or max(batch, model.spec.min_batch)
    x = noise(manifest.input, size, np.random.default_rng(config.seed))
    return [*checks, *runs(name, model, x), batches(name, manifest, host.method, config, batch)], manifest


def engine(name: str, host: hosting.Host) -> Check:
    """What really runs each graph: a session that fell back to another provider was refused when it was loaded."""
    text = ", ".join(f"{graph} runs on {provider}" for graph, provider in host.engines.providers.items())
    if host.fallbacks:
        reasons = "; ".join(f"{each.graph} not on {each.wanted}: {each.reason}" for each in host.fallbacks)
        return warn(
            f"engine {name}",
            f"{text} ({reasons})",
            "See the checks above, or set engine to what shall run them",
        )
    return ok(f"engine {name}", text)


def noise(spec: InputSpec | InputInfo, batch: int, rng: np.random.Generator) -> NDArray[Any]:
    """A batch of uniform noise of the dtype, shape and range that a bundle takes; free dimensions are 32."""
    shape = [batch, *(32 if isinstance(size, str) else size for size in spec.shape[1:])]
    return rng.uniform(spec.low, spec.high, shape).astype(spec.dtype)


def sample_bytes(spec: InputSpec) -> int:
    """Bytes of one sample; free dimensions are 32."""
    return noise(spec, 1, np.random.default_rng(0)).nbytes


def runs(name: str, model: Model, x: NDArray[Any]) -> list[Check]:
    """One forward and one step, timed when warm, with finite outputs."""
    checks = []
    for kind in ("forward",) if model.spec.step is None else ("forward", "step"):
        check = f"{kind} {name}"
        try:
            run = _runner(kind, model, x)
            run()
            began_s = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - began_s
        except TtaError as error:
            checks.append(fail(check, f"{error.code}: {error.cause}", error.fix))
            continue
        arrays = (
            [result.logits] if kind == "forward" else [result.logits, result.theta, *result.state.values()]
        )
        if all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            checks.append(ok(check, f"{seconds * 1e3:.1f} ms for {len(x)} samples, all outputs finite"))
        else:
            checks.append(
                fail(check, f"NaN or Inf from noise in {model.manifest.input.low:g}..{model.manifest.input.high:g}",
                     "Build the bundle again and run tta-export check on it")
            )  # fmt: skip
    return checks


def _runner(kind: str, model: Model, x: NDArray[Any]) -> Callable[[], Any]:
    """One run of a kind. A method with a window steps on what its samples were predicted as before."""
    if kind == "forward":
        return lambda: model.predict(x)
    target = model.predict(x).logits if model.spec.window else None
    return lambda: model.step(x, target=target)


def batches(name: str, manifest: Manifest, method: str, config: Config, batch: int) -> Check:
    """The method can adapt on the batches that it will get, and they are large enough for what it estimates."""
    check, spec = f"batches {name}", manifest.methods[method]
    if spec.step is None:
        return ok(check, f"method {method} has no step: any batch will do")
    if spec.window:
        fits = config.max_window_bytes // sample_bytes(manifest.input)
        where = "in the request that makes one due" if config.policy == "inline" else "in the background"
        text = f"policy {config.policy}, requests of any size: steps on a window of {spec.window} samples, {where}"
        if fits < spec.window:
            return warn(
                check,
                f"{text}; max_window_bytes holds {fits} samples of all streams together",
                "Raise max_window_bytes: this many samples for each stream that shall adapt",
            )
        return ok(check, text)
    inline = config.policy == "inline" and batch >= config.inline_min_batch
    size = batch if inline else spec.batch or max(config.step_batch, spec.min_batch)
    how = "in the pass that answers" if inline else "in the background"
    text = f"policy {config.policy}, requests of {batch}: steps of {size} samples, {how}"
    if inline and batch != (spec.batch or batch):
        return warn(
            check,
            f"{text}, but {method} was compiled for {spec.batch}: they are only answered",
            f"Send {spec.batch} samples in a request, or set another policy",
        )
    if inline and batch < spec.min_batch:
        return warn(
            check,
            f"{text}, but {method} needs {spec.min_batch}: they are only answered",
            f"Set inline_min_batch to {spec.min_batch}: smaller requests are collected",
        )
    if not inline and size > config.window:
        return fail(
            check, f"{text}: they never fit in a window of {config.window}", f"Set window to {size} or more"
        )
    if size < FEW_SAMPLES and any(entry.kind in STATISTICS for entry in manifest.theta.entries):
        key = "inline_min_batch" if inline else "step_batch"
        return warn(
            check,
            f"{text}; the network has BatchNorm, whose statistics are noisy below {FEW_SAMPLES}",
            f"Set {key} to {FEW_SAMPLES} or more: smaller requests are collected",
        )
    return ok(check, text)
