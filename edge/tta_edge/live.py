"""Stream images to a daemon and measure what its adaptation gains over the frozen source model beside it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.client import Client, Reply
from tta_edge.errors import Busy, UnknownStream
from tta_edge.retry import Retry
from tta_edge.streams.measures import Recovery, drift, gap_recovered, recovery_samples
from tta_edge.streams.order import batches, order
from tta_edge.streams.preprocess import Preprocess, preprocess
from tta_edge.streams.shifts import Shift
from tta_edge.streams.source import Source, align_labels
from tta_runtime.errors import BadValue
from tta_runtime.numerics import softmax

NO_SHIFT = "none"
PATIENT = Retry(attempts=10, wait_s=0.2, errors=(Busy,))
"""How a stream deals with a daemon that is busy. One that is not there is an error at once."""


@dataclass(eq=False)
class Phase:
    """What was seen during one part of the stream: clean, or under one shift.

    Attributes:
        shift: None for the clean part.
        wrong: for each sample, whether the stream's answer was wrong; empty without labels.
        source_wrong: the same for the frozen source.
        agree: for each sample, whether both gave the same class.
        entropy: of each sample's prediction, in nats.
        source_entropy: the same for the frozen source.
        source_sums: for each batch [classes], the sum of the frozen source's predicted probabilities.
        sizes: samples of each batch.
        latency_ms: of each batch.
        adapted: batches that changed theta.
        steps: of the stream, after the last batch.
        distance: of theta from the source theta, after the last batch.
        reasons: why batches were not adapted on, or the stream was reset.
    """

    shift: Shift | None
    wrong: list[bool] = field(default_factory=list)
    source_wrong: list[bool] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    source_entropy: list[float] = field(default_factory=list)
    source_sums: list[NDArray[np.float64]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    adapted: int = 0
    steps: int = 0
    distance: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def samples(self) -> int:
        """How many samples were answered."""
        return len(self.agree)

    def add(self, reply: Reply, labels: NDArray[np.int64] | None) -> None:
        """Account for one answered batch.

        Args:
            reply: asked for with `compare=True`.
            labels: [batch], or None.
        """
        if reply.source_logits is None or reply.source_entropy is None:
            raise ValueError("the reply lacks the frozen source's answer")
        ours, source = reply.logits.argmax(axis=1), reply.source_logits.argmax(axis=1)
        if labels is not None:
            self.wrong += (ours != labels).tolist()
            self.source_wrong += (source != labels).tolist()
        self.agree += (ours == source).tolist()
        self.entropy += reply.entropy.tolist()
        self.source_entropy += reply.source_entropy.tolist()
        self.source_sums.append(softmax(reply.source_logits).sum(axis=0, dtype=np.float64))
        self.sizes.append(len(ours))
        self.latency_ms.append(reply.latency_ms)
        self.adapted += reply.adapted
        self.steps, self.distance = reply.steps, reply.distance
        if reply.reason:
            self.reasons[reply.reason] += 1


@dataclass(frozen=True)
class Result:
    """The figures of one part of the stream. Accuracies are fractions; None where there are no labels.

    Attributes:
        shift: name of the corruption; "none" for a stream as it is.
        severity: 1 to 5, or None.
        samples: how many.
        clean: accuracy of the source model on the same images without the shift.
        source: accuracy of the source model under the shift.
        adapted: accuracy of the stream under the shift.
        gap_recovered: (adapted - source) / (clean - source); None where the shift took nothing.
        recovery_samples: see `streams.measures.recovery_samples`.
        agreement: share of samples where stream and frozen source give the same class.
        entropy: mean over the stream's predictions, in nats.
        source_entropy: the same for the frozen source.
        drift: total variation distance between the frozen source's mean prediction over the clean part and
        over
            this one; without a clean part, between the first and the last third of this one.
        adapted_batches: batches that changed theta.
        steps: of the stream, at the end.
        distance: of theta from the source theta, at the end.
        latency_ms: median over the batches, from request to reply.
        reasons: reason code -> how often the daemon's guards gave it.
    """

    shift: str
    severity: int | None
    samples: int
    clean: float | None
    source: float | None
    adapted: float | None
    gap_recovered: float | None
    recovery_samples: int | None
    agreement: float
    entropy: float
    source_entropy: float
    drift: float
    adapted_batches: int
    steps: int
    distance: float
    latency_ms: float
    reasons: dict[str, int]


def summarise(phase: Phase, clean: Phase | None, recovery: Recovery) -> Result:
    """The figures of one part.

    Args:
        phase: the part, with at least one sample.
        clean: the clean part; None if there was none, or the part itself.
        recovery: definition of the recovery time.
    """
    labelled = bool(phase.wrong)
    reference = _accuracy(clean.source_wrong) if clean is not None else None
    source, adapted = _accuracy(phase.source_wrong), _accuracy(phase.wrong)
    gap = None
    if reference is not None and source is not None and adapted is not None:
        gap = gap_recovered(reference, source, adapted)
    return Result(
        shift=NO_SHIFT if phase.shift is None else phase.shift.name,
        severity=None if phase.shift is None else phase.shift.severity,
        samples=phase.samples,
        clean=reference,
        source=source,
        adapted=adapted,
        gap_recovered=gap,
        recovery_samples=recovery_samples(np.array(phase.wrong), recovery)
        if labelled and phase.shift
        else None,
        agreement=sum(phase.agree) / phase.samples,
        entropy=statistics.fmean(phase.entropy),
        source_entropy=statistics.fmean(phase.source_entropy),
        drift=_drift(phase, clean),
        adapted_batches=phase.adapted,
        steps=phase.steps,
        distance=phase.distance,
        latency_ms=statistics.median(phase.latency_ms),
        reasons=dict(phase.reasons),
    )


def _drift(phase: Phase, clean: Phase | None) -> float:
    batches = len(phase.sizes)
    if clean is not None:
        return drift(_mean_prediction(clean, 0, len(clean.sizes)), _mean_prediction(phase, 0, batches))
    third = max(1, batches // 3)
    return drift(_mean_prediction(phase, 0, third), _mean_prediction(phase, batches - third, batches))


def _mean_prediction(phase: Phase, first: int, last: int) -> NDArray[np.float64]:
    """The frozen source's mean predicted probabilities over some batches, [classes]."""
    return np.asarray(np.sum(phase.source_sums[first:last], axis=0) / sum(phase.sizes[first:last]))


def _accuracy(wrong: Sequence[bool]) -> float | None:
    return 1.0 - sum(wrong) / len(wrong) if wrong else None


OnBatch = Callable[[Sequence[Phase], Reply], None]
"""Told after each batch: all parts so far (the last one is running) and the newest reply."""


@dataclass(frozen=True)
class StreamPlan:
    """What to send.

    Attributes:
        source: the images.
        shifts: parts of the stream one after the other; None is the images as they are.
        batch: images in a request.
        seed: of the shifts, and of the order if shuffled.
        limit: images in each part; None: all.
        shuffle: draw the order instead of taking the source's.
        stream: the daemon's stream.
        reset_between: back to the source model before each part, not only before the first.
    """

    source: Source
    shifts: Sequence[Shift | None]
    batch: int = 64
    seed: int = 0
    limit: int | None = None
    shuffle: bool = False
    stream: str = "tta-edge-stream"
    reset_between: bool = False


class Streamer:
    """Sends a plan to a daemon, part by part.

    Args:
        client: connected to the daemon.
        plan: what to send.
        on_batch: told after each batch.

    Attributes:
        on_batch: may be set until `run`.
        info: what the daemon said that it serves.
        phases: the parts so far.

    Raises:
        InputMismatch: images or labels do not fit the daemon's model.
        BadValue: batch or limit below 1.
        ClientError: the daemon cannot be reached.
    """

    def __init__(self, client: Client, plan: StreamPlan, on_batch: OnBatch | None = None) -> None:
        for name, value in (("batch", plan.batch), ("limit", plan.limit)):
            if value is not None and value < 1:
                raise BadValue(f"{name} is {value}", "Use 1 or more")
        self.phases: list[Phase] = []
        self._client, self._plan, self.on_batch = client, plan, on_batch
        self.info = client.info()
        wanted = self.info.input
        self._to_input: Preprocess = preprocess(
            plan.source.shape, dtype=wanted.dtype, shape=wanted.shape, low=wanted.low, high=wanted.high
        )
        self._labels = align_labels(plan.source, self.info.classes, self.info.class_names)
        self._places = order(plan.source.count, limit=plan.limit, shuffle=plan.shuffle, seed=plan.seed)

    def run(self, *, reset: bool = True) -> list[Phase]:
        """Send everything once.

        Args:
            reset: start from the source model.

        Raises:
            ClientError, ServiceError: the daemon cannot be reached, or refuses.
            StreamError: a shift cannot be made, or an image cannot be read.
        """
        plan = self._plan
        self.phases = []
        for place, shift in enumerate(plan.shifts):
            if (place == 0 and reset) or plan.reset_between:
                self._reset()
            phase = Phase(shift)
            self.phases.append(phase)
            for batch in batches(plan.source, shift, self._places, batch=plan.batch, seed=plan.seed):
                x = self._to_input(batch.images)
                reply = self._client.predict(x, stream=plan.stream, compare=True)
                phase.add(reply, None if self._labels is None else self._labels[batch.indices])
                if self.on_batch is not None:
                    self.on_batch(self.phases, reply)
        return self.phases

    def _reset(self) -> None:
        with suppress(UnknownStream):  # nobody has used it yet: it will start at the source
            self._client.reset(self._plan.stream)


def results(phases: Sequence[Phase], recovery: Recovery) -> tuple[Result | None, list[Result]]:
    """The clean part's figures (None if there was none) and those of the shifted parts.

    A stream whose only part is unshifted is itself what is looked at: then it is returned among the latter.
    """
    seen = [phase for phase in phases if phase.samples]
    clean = next((phase for phase in seen if phase.shift is None), None)
    shifted = [phase for phase in seen if phase.shift is not None]
    if not shifted:
        return None, [summarise(phase, None, recovery) for phase in seen]
    first = None if clean is None else summarise(clean, None, recovery)
    return first, [summarise(phase, clean, recovery) for phase in shifted]


def to_json(
    clean: Result | None, shifted: Sequence[Result], recovery: Recovery, **facts: object
) -> dict[str, Any]:
    """The machine-readable form of a finished stream.

    Args:
        clean: figures of the clean part.
        shifted: figures of the other parts.
        recovery: definition of the recovery time.
        facts: what else there is to state, such as batch and seed.
    """
    gaps = [result.gap_recovered for result in shifted if result.gap_recovered is not None]
    return {
        **facts,
        "recovery": asdict(recovery),
        "shifts": [asdict(result) for result in shifted],
        "mean_gap_recovered": statistics.fmean(gaps) if gaps else None,
        "clean_loss": clean_loss(clean),
        "clean": None if clean is None else asdict(clean),
    }


def clean_loss(clean: Result | None) -> float | None:
    """Accuracy that adapting cost on the clean part, as a fraction; negative where it gained."""
    if clean is None or clean.source is None or clean.adapted is None:
        return None
    return clean.source - clean.adapted
