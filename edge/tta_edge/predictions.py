"""Predictions: which may share a run of the engine, the run, and what follows from it for the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.adapt import Answer, Stream
from tta_edge.batching import Mergeable
from tta_edge.cloud_side import CloudSide
from tta_edge.operating import Switch
from tta_edge.policy import Policy
from tta_edge.registry import Registry
from tta_edge.served import Served
from tta_edge.session import Arrived, Emit
from tta_edge.stats import Stats
from tta_edge.status import theta_facts
from tta_edge.stepper import Stepper
from tta_edge.teaching import Bases
from tta_edge.wire import Predict, Prediction, Tensors, declare


class Predictions:
    """Answers predictions. For one thread, but for `merge`.

    Args:
        served: bundles.
        registry: streams.
        bases: on which new streams stand.
        stepper: takes samples for a step in the background.
        policy: when a step follows in the same pass.
        switch: whether there are steps at all.
        cloud: is shown what was answered.
        stats: counts.
        finish: takes the replies.
        clock: seconds, the same one that stamps arrivals.
    """

    def __init__(
        self,
        served: Served,
        registry: Registry,
        bases: Bases,
        stepper: Stepper,
        *,
        policy: Policy,
        switch: Switch,
        cloud: CloudSide,
        stats: Stats,
        finish: Emit,
        clock: Callable[[], float],
    ) -> None:
        self._served = served
        self._registry = registry
        self._bases = bases
        self._stepper = stepper
        self._policy = policy
        self._switch = switch
        self._cloud = cloud
        self._stats = stats
        self._finish = finish
        self._clock = clock

    def merge(self, arrived: Arrived) -> Mergeable | None:
        """Whether a request may share a run with others (see batching.py); for any thread."""
        message, x = arrived.message, arrived.tensors.get("x")
        if not isinstance(message, Predict) or x is None or not x.ndim or not len(x):
            return None
        if message.adapt and self._policy.inline(len(x)):
            return None
        key = (
            message.bundle or self._served.default,
            message.stream,
            message.adapt,
            message.compare,
            x.dtype.str,
            x.shape[1:],
        )
        return Mergeable(key, len(x))

    def answer(self, message: Predict, group: list[Arrived]) -> None:
        """Answer predictions of one stream in one run, all of them or none.

        Args:
            message: the first one's.
            group: requests of the same key (see `merge`).

        Raises:
            UnknownBundle, WrongTask, TooManyStreams, InputError, EngineError: nobody was answered.
        """
        began_s = self._clock()
        host = self._served.images(message.bundle)
        stream = self._registry.get(host, message.stream)
        self._bases.admit(stream)
        batches = [arrived.tensors["x"] for arrived in group]
        # Those that share a run must each be fit for it; a single one is checked by the model before anything else.
        checked = batches if len(group) == 1 else [stream.model.check_input(batch) for batch in batches]
        x = checked[0] if len(group) == 1 else np.concatenate(checked)
        adapt = message.adapt and self._switch.on
        spec, samples = stream.model.spec, len(x) if x.ndim else 0
        fits = spec.batch in (None, samples) and samples >= spec.min_batch
        windowed = stream.auto is not None  # then it steps on a window, whatever the size of a request
        inline = len(group) == 1 and fits and self._policy.inline(samples)
        if windowed:
            inline = self._policy.kind == "inline"
        if adapt and inline:
            answer = stream.answer(x, adapt=True, compare=message.compare)
            if answer.adapted or answer.refused:
                result = "committed" if answer.adapted else "refused"
                self._stats.stepped(host.name, result, self._clock() - began_s)
        else:
            answer = stream.serve(x, collect=adapt, compare=message.compare)
        self._registry.admit(stream)  # only now: a refused first request leaves no stream behind
        collected = adapt and stream.adapts and (windowed or not inline)
        if collected and not inline:
            collected = self._stepper.offer(stream, x)
        self._stats.ran(host.name)
        compute_s = self._clock() - began_s
        ends = np.cumsum([len(batch) for batch in batches]).tolist()
        replies = [
            _prediction(arrived, stream, answer, slice(end - len(batch), end), collected, compute_s)
            for arrived, batch, end in zip(group, batches, ends, strict=True)
        ]
        # From here nothing fails: either all of them are answered here, or none is.
        for arrived, batch, (reply, tensors) in zip(group, batches, replies, strict=True):
            waited_s, total_s = began_s - arrived.at_s, self._clock() - arrived.at_s
            self._stats.predicted(
                host.name, len(batch), queue_s=waited_s, compute_s=compute_s, total_s=total_s
            )
            self._finish(arrived, reply, tensors)
        self._cloud.answered(host, stream, x, answer)


def _prediction(
    arrived: Arrived, stream: Stream, answer: Answer, part: slice, collected: bool, compute_s: float
) -> tuple[Prediction, Tensors]:
    """The reply to one request, of an answer that may have been for several."""
    logits = answer.logits[part]
    source = None if answer.source_logits is None else answer.source_logits[part]
    outputs: dict[str, NDArray[Any]] = {"logits": logits}
    if source is not None:
        outputs["source_logits"] = source
    steps, distance, digest = theta_facts(stream.model)
    reply = Prediction(
        id=arrived.message.id,
        adapted=answer.adapted,
        collected=collected,
        reason="" if answer.reason is None else answer.reason.value,
        steps=steps,
        distance=distance,
        theta_digest=digest,
        report=answer.report,
        compute_ms=compute_s * 1e3,
        logits=declare(logits),
        source_logits=None if source is None else declare(source),
    )
    return reply, outputs
