"""Evaluate a bundle's methods on a stream, in this process: the error of each method under each shift.

The settings are the field's own. `online`: back to the source model before each shift. `continual`: never
reset, the shifts follow each other in the given order. Guards of the daemon do not act here: what is measured
is the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.streams.errors import LabelsMissing
from tta_edge.streams.order import SETTINGS, Setting, batches, order
from tta_edge.streams.preprocess import Preprocess, preprocess
from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source, align_labels
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import (
    BadValue,
    NonFiniteState,
    NonFiniteTheta,
    UnknownHyper,
    UnknownMethod,
    did_you_mean,
)
from tta_runtime.inputs import Limits
from tta_runtime.manifest import Manifest
from tta_runtime.model import Engines, Model

NO_SHIFT = "none"
"""What a row calls the stream taken as it is."""

Progress = Callable[[str, int], None]
"""Told what is running and how many predictions were made since the last call."""


@dataclass(frozen=True)
class Row:
    """The result of one method under one shift.

    Attributes:
        shift: name of the corruption; "none" for the stream as it is.
        severity: 1 to 5; None without a shift.
        method: the method's name.
        error: share of wrong predictions.
        samples: how many predictions.
        adapted: how many batches changed theta.
        refused: how many steps were thrown away because theta or state became NaN or Inf.
    """

    shift: str
    severity: int | None
    method: str
    error: float
    samples: int
    adapted: int
    refused: int


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        source: labelled images.
        shifts: one after the other; None is the stream as it is.
        methods: names of methods of the bundle.
        batch: images that arrive together.
        setting: "online" or "continual".
        seed: of shifts, of the order if shuffled, and of the methods.
        shuffle: draw the order instead of taking the file's.
        limit: images of each shift; None: all.
        hyper: method -> hyper-parameter -> value.
    """

    source: Source
    shifts: Sequence[Shift | None]
    methods: Sequence[str]
    batch: int = 64
    setting: Setting = "online"
    seed: int = 0
    shuffle: bool = False
    limit: int | None = None
    hyper: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Rows and everything that is needed to get them again."""

    model: str
    rows: tuple[Row, ...]
    plan: Plan
    hyper: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {
            "model": self.model,
            "stream": self.plan.source.name,
            "setting": self.plan.setting,
            "batch": self.plan.batch,
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "limit": self.plan.limit,
            "hyper": {method: dict(values) for method, values in self.hyper.items()},
            "rows": [vars(row) for row in self.rows],
        }


def evaluate(
    bundle: Bundle | Path | str,
    plan: Plan,
    *,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run every method over every shift.

    All methods see the same images in the same batches. A last batch that is smaller is predicted and counted
    like the others; the method steps on it too unless it is below what the method can step on.

    Args:
        bundle: the bundle.
        plan: what to evaluate.
        options: threads and provider of the engines.
        progress: told after each batch.

    Raises:
        LabelsMissing: the source has no labels.
        InputMismatch: images or labels do not fit the model.
        BadValue: batch, limit or setting make no sense.
        UnknownMethod, UnknownHyper: no such name.
        TtaError: what opening the bundle, reading the source and running the engines raise.
    """
    _check(plan)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    spec = manifest.input
    to_input = preprocess(plan.source.shape, dtype=spec.dtype, shape=spec.shape, low=spec.low, high=spec.high)
    labels = align_labels(plan.source, manifest.classes, manifest.class_names)
    if labels is None:
        raise LabelsMissing(
            f"{plan.source.name} has no labels, so there is no error to measure",
            "Give labels (y in the npz, or a folder for each class), or look at it with tta-edge stream",
        )
    hyper = plan.hyper or {}
    for method in hyper:
        if method not in plan.methods:
            raise UnknownMethod(
                f"a hyper-parameter is set for `{method}`, which is not evaluated"
                + did_you_mean(method, plan.methods),
                "Add it to the methods",
            )
    engines = Engines.load(opened, methods=list(plan.methods), options=options)
    limits = Limits(max_batch=max(Limits().max_batch, plan.batch))
    models = [
        Model(engines, name, hyper=hyper.get(name, {}), seed=plan.seed, limits=limits)
        for name in plan.methods
    ]
    rows: list[Row] = []
    for shift in plan.shifts:
        if plan.setting == "online":
            for model in models:
                model.reset()
        rows += _one_shift(models, plan, shift, labels, to_input, progress or _silent)
    return Evaluation(
        manifest.model_id, tuple(rows), plan, {model.method: model.hyper for model in models if model.hyper}
    )


def spread(
    settings: Mapping[str, float | Mapping[str, float]], manifest: Manifest, methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Hyper-parameters for each method: a bare `lr` goes to every method that has one, `tent.lr` to tent
    alone.

    Args:
        settings: as `tta_edge.config.parse_settings` gives them.
        manifest: of the bundle.
        methods: the evaluated ones.

    Raises:
        UnknownHyper: none of the methods has a hyper-parameter of a bare name.
    """
    result: dict[str, dict[str, float]] = {}
    known = {
        method: {hyper.name for hyper in manifest.methods[method].hyper}
        for method in methods
        if method in manifest.methods
    }
    for name, value in settings.items():
        if isinstance(value, Mapping):
            continue
        owners = [method for method, names in known.items() if name in names]
        if not owners:
            raise UnknownHyper(
                f"no evaluated method has a hyper-parameter `{name}`"
                + did_you_mean(name, set().union(*known.values())),
                "Use a name that the bundle lists",
            )
        for method in owners:
            result.setdefault(method, {})[name] = value
    for method, value in settings.items():
        if isinstance(value, Mapping):  # the specific setting wins over the bare one
            result.setdefault(method, {}).update(value)
    return result


def check_setting(text: str) -> Setting:
    """The setting of that name.

    Raises:
        BadValue: there is none.
    """
    for setting in SETTINGS:
        if setting == text:
            return setting
    raise BadValue(f"setting is `{text}`" + did_you_mean(text, SETTINGS), "Use online or continual")


def _check(plan: Plan) -> None:
    if plan.batch < 1:
        raise BadValue(f"batch is {plan.batch}", "Use 1 or more")
    if plan.limit is not None and plan.limit < 1:
        raise BadValue(f"limit is {plan.limit}", "Use 1 or more")
    check_setting(plan.setting)
    if not plan.methods:
        raise BadValue("no method is named", "Name one or more")
    if len(set(plan.methods)) != len(plan.methods):
        raise BadValue(f"a method is named twice: {', '.join(plan.methods)}", "Name each once")


def _silent(_: str, __: int) -> None:
    """Nobody watches."""


def _one_shift(
    models: Sequence[Model],
    plan: Plan,
    shift: Shift | None,
    labels: NDArray[np.int64],
    to_input: Preprocess,
    progress: Progress,
) -> list[Row]:
    """All methods over one shift, batch by batch."""
    places = order(plan.source.count, limit=plan.limit, shuffle=plan.shuffle, seed=plan.seed)
    wrong, adapted, refused = ([0] * len(models) for _ in range(3))
    for batch in batches(plan.source, shift, places, batch=plan.batch, seed=plan.seed):
        x = to_input(batch.images)
        truth = labels[batch.indices]
        for k, model in enumerate(models):
            before = model.steps
            logits, good = _answer(model, x)
            wrong[k] += int((logits.argmax(axis=1) != truth).sum())
            adapted[k] += model.steps - before
            refused[k] += not good
            progress(f"{shift or NO_SHIFT} {model.method}", len(x))
    name, severity = (NO_SHIFT, None) if shift is None else (shift.name, shift.severity)
    return [
        Row(name, severity, model.method, wrong[k] / len(places), len(places), adapted[k], refused[k])
        for k, model in enumerate(models)
    ]


def _answer(model: Model, x: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
    """The method's logits for a batch, having stepped where it can; False if the step had to be thrown
    away.
    """
    spec = model.spec
    steps = spec.step is not None and len(x) >= spec.min_batch and spec.batch in (None, len(x))
    if not steps:
        return model.predict(x).logits, True
    step = model.step(x)
    try:
        model.commit(step)
    except (NonFiniteTheta, NonFiniteState):
        return model.predict(x).logits, False
    return step.logits, True
