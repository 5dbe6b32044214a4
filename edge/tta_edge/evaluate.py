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

from tta_edge.adapt import STANDARD, Stream
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
from tta_runtime.manifest import FORWARD, Manifest, MethodSpec
from tta_runtime.model import Engines, Model

NO_SHIFT = "none"
"""What a row calls the stream taken as it is."""

Progress = Callable[[str, int], None]
"""Told what is running and how many predictions were made since the last call."""


@dataclass(frozen=True, eq=False)
class Row:
    """The result of one method under one shift.

    Attributes:
        shift: name of the corruption; "none" for the stream as it is.
        severity: 1 to 5; None without a shift.
        method: the method's name.
        wrong: [samples] bool, in order of arrival: whether each prediction was wrong. All rows of an evaluation
            have the same images in the same order, so that rows can be compared sample by sample.
        adapted: how many batches changed theta.
        refused_batches: the batches (counted from 0) whose step was thrown away because theta or state became
            NaN or Inf; they were answered all the same.
    """

    shift: str
    severity: int | None
    method: str
    wrong: NDArray[np.bool_]
    adapted: int
    refused_batches: tuple[int, ...]

    @property
    def label(self) -> str:
        """The shift as it is written on a command line."""
        return self.shift if self.severity is None else f"{self.shift}:{self.severity}"

    @property
    def samples(self) -> int:
        """How many predictions."""
        return len(self.wrong)

    @property
    def error(self) -> float:
        """Share of wrong predictions."""
        return int(self.wrong.sum()) / len(self.wrong)

    @property
    def refused(self) -> int:
        """How many steps were thrown away."""
        return len(self.refused_batches)

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form: everything but the single predictions."""
        return {
            "shift": self.shift,
            "severity": self.severity,
            "method": self.method,
            "error": self.error,
            "samples": self.samples,
            "adapted": self.adapted,
            "refused": self.refused,
            "refused_batches": list(self.refused_batches),
        }


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
    """Rows and everything that is needed to get them again.

    Attributes:
        model: the bundle's model id.
        digest: the bundle's digest.
        frozen: the evaluated method that is the source model left alone; None if none of them is.
        rows: shift after shift; within a shift the methods in the plan's order.
        plan: what was evaluated.
        hyper: method -> hyper-parameter -> the value used, given or default.
    """

    model: str
    digest: str
    frozen: str | None
    rows: tuple[Row, ...]
    plan: Plan
    hyper: Mapping[str, Mapping[str, float]]

    def rows_of(self, method: str) -> tuple[Row, ...]:
        """The rows of one method, shift after shift."""
        return tuple(row for row in self.rows if row.method == method)

    def shifted_rows_of(self, method: str) -> tuple[Row, ...]:
        """Those of them that a mean over the shifts is taken over: without the stream as it is, unless there is
        nothing else.
        """
        rows = self.rows_of(method)
        return tuple(row for row in rows if row.shift != NO_SHIFT) or rows

    def to_json(self) -> dict[str, Any]:
        """The machine-readable form."""
        return {
            "model": self.model,
            "bundle": self.digest,
            "stream": self.plan.source.name,
            "setting": self.plan.setting,
            "batch": self.plan.batch,
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "limit": self.plan.limit,
            "hyper": {method: dict(values) for method, values in self.hyper.items()},
            "rows": [row.to_json() for row in self.rows],
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
    players = [_Player(model) for model in models]
    rows: list[Row] = []
    for shift in plan.shifts:
        if plan.setting == "online":
            for player in players:
                player.reset()
        rows += _one_shift(players, plan, shift, labels, to_input, progress or _silent)
    return Evaluation(
        manifest.model_id,
        opened.digest,
        next((name for name in plan.methods if is_frozen(manifest.methods[name])), None),
        tuple(rows),
        plan,
        {model.method: model.hyper for model in models if model.hyper},
    )


def parse_shifts(source: Source, text: str | None) -> tuple[Shift | None, ...]:
    """The shifts of a command line as `Source.parse` reads them; the word `none` is the stream as it is.

    Raises:
        UnknownShift, BadSeverity: a misspelt item.
        ShiftNotGiven: the source has ready-made shifts, and not this one, or no unshifted images.
    """
    if text is None or NO_SHIFT not in (items := [item.strip() for item in text.split(",")]):
        return source.parse(text)
    source.shifted(None, 0)  # refuse it now where there are no unshifted images
    parts = [(None,) if item == NO_SHIFT else source.parse(item) for item in items]
    return tuple(dict.fromkeys(shift for part in parts for shift in part))


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


def is_frozen(method: MethodSpec) -> bool:
    """Whether a method is the source model left alone: no step, and theta serves."""
    return method.step is None and method.serve == FORWARD and method.serve_vector == "theta"


def _silent(_: str, __: int) -> None:
    """Nobody watches."""


class _Player:
    """A method that answers batches: bare, or inside the daemon's guards where it has a window of its own."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Back to the source."""
        self.model.reset()
        self._stream = Stream("evaluate", self.model, STANDARD) if self.model.spec.window else None

    def answer(self, x: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
        """Logits for a batch, having stepped where it can; False if a step had to be thrown away."""
        if self._stream is None:
            return step_and_answer(self.model, x)
        answer = self._stream.answer(x)
        return answer.logits, not answer.refused


def _one_shift(
    players: Sequence[_Player],
    plan: Plan,
    shift: Shift | None,
    labels: NDArray[np.int64],
    to_input: Preprocess,
    progress: Progress,
) -> list[Row]:
    """All methods over one shift, batch by batch."""
    places = order(plan.source.count, limit=plan.limit, shuffle=plan.shuffle, seed=plan.seed)
    adapted = [0] * len(players)
    wrong: list[list[NDArray[np.bool_]]] = [[] for _ in players]
    refused: list[list[int]] = [[] for _ in players]
    stream = batches(plan.source, shift, places, batch=plan.batch, seed=plan.seed)
    for number, batch in enumerate(stream):
        x = to_input(batch.images)
        truth = labels[batch.indices]
        for k, player in enumerate(players):
            model, before = player.model, player.model.steps
            logits, good = player.answer(x)
            wrong[k].append(logits.argmax(axis=1) != truth)
            adapted[k] += model.steps - before
            if not good:
                refused[k].append(number)
            progress(f"{shift or NO_SHIFT} {model.method}", len(x))
    name, severity = (NO_SHIFT, None) if shift is None else (shift.name, shift.severity)
    return [
        Row(name, severity, player.model.method, np.concatenate(wrong[k]), adapted[k], tuple(refused[k]))
        for k, player in enumerate(players)
    ]


def step_and_answer(model: Model, x: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
    """A bare method's logits for a batch, having stepped where it can; False if the step had to be thrown away.

    Args:
        model: adapts.
        x: [batch, ...], finite.
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
