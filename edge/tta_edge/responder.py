"""Typed requests to typed replies: the daemon without its network. Each stream is a guarded model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tta_edge.adapt import Event, GuardedModel, Guards
from tta_edge.config import Config
from tta_edge.errors import Internal, TooManyStreams, UnknownStream
from tta_edge.session import Arrived, error_reply
from tta_edge.stats import Stats
from tta_edge.wire import (
    Info,
    InfoReply,
    InputInfo,
    Predict,
    Prediction,
    Reply,
    Requests,
    Reset,
    ResetDone,
    ServerLimits,
    StatusReply,
    StreamStatus,
    Tensors,
    declare,
    tag,
)
from tta_runtime import Limits, __version__
from tta_runtime.bundle import Bundle
from tta_runtime.engine import EngineOptions
from tta_runtime.errors import TtaError, UnknownMethod, did_you_mean
from tta_runtime.model import Engines, Model

log = logging.getLogger(__name__)

DEFAULT_STREAM = "default"


class Responder:
    """Answers the requests of one daemon, one after the other. Used by one thread.

    Args:
        engines: loaded graphs, shared by all streams.
        config: of the daemon; its method is settled.
        stats: shared with whoever reads them.
        clock: seconds, the same one that stamps arrivals.

    Raises:
        MethodError: the bundle has no such method or hyper-parameter.
    """

    def __init__(
        self, engines: Engines, config: Config, stats: Stats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engines = engines
        self._config = config
        self._stats = stats
        self._clock = clock
        self._began_s = clock()
        self._guards = Guards(max_distance=config.max_distance, reset_every_steps=config.reset_every_steps)
        # Made at once, so that a wrong hyper-parameter stops the daemon and not its first client.
        self._streams: dict[str, GuardedModel] = {}
        self._streams[DEFAULT_STREAM] = self._new_stream(DEFAULT_STREAM)

    def respond(self, arrived: Arrived) -> tuple[Reply, Tensors]:
        """The reply to a request and its tensors. Whatever goes wrong becomes an error reply."""
        message = arrived.message
        try:
            reply, tensors = self._answer(arrived)
        except TtaError as error:
            return self._refused(message.id, error)
        except Exception as error:
            log.exception("a defect while answering `%s`", tag(message))
            return self._refused(
                message.id,
                Internal(f"the daemon failed with {type(error).__name__}", "Report it with the daemon's log"),
            )
        measured = isinstance(message, Predict)
        self._stats.answered(tag(message), (self._clock() - arrived.at_s) * 1e3 if measured else None)
        return reply, tensors

    def _refused(self, request_id: int, error: TtaError) -> tuple[Reply, Tensors]:
        self._stats.refused(error.code)
        return error_reply(error, request_id), {}

    def _answer(self, arrived: Arrived) -> tuple[Reply, Tensors]:
        message = arrived.message
        if isinstance(message, Predict):
            return self._predict(message, arrived.tensors)
        if isinstance(message, Reset):
            return self._reset(message), {}
        if isinstance(message, Info):
            return self._info(message.id), {}
        return self._status(message.id), {}

    def _predict(self, message: Predict, tensors: Tensors) -> tuple[Prediction, Tensors]:
        began_s = self._clock()
        stream = self._streams.get(message.stream) or self._new_stream(message.stream)
        answer = stream.answer(tensors["x"], adapt=message.adapt, compare=message.compare)
        self._streams[message.stream] = stream  # only now: a refused first request leaves no stream behind
        outputs = {"logits": answer.logits}
        if answer.source_logits is not None:
            outputs["source_logits"] = answer.source_logits
        model = stream.model
        reply = Prediction(
            id=message.id,
            adapted=answer.adapted,
            reason="" if answer.reason is None else answer.reason.value,
            steps=model.steps,
            distance=model.distance,
            theta_digest=model.digest,
            report=answer.report,
            compute_ms=(self._clock() - began_s) * 1e3,
            logits=declare(answer.logits),
            source_logits=None if answer.source_logits is None else declare(answer.source_logits),
        )
        return reply, outputs

    def _reset(self, message: Reset) -> ResetDone:
        stream = self._streams.get(message.stream)
        if stream is None:
            raise UnknownStream(
                f"there is no stream `{message.stream}`{did_you_mean(message.stream, self._streams)}",
                "Streams begin with their first `predict`",
            )
        stream.reset()
        return ResetDone(id=message.id, stream=message.stream, theta_digest=stream.model.digest)

    def _info(self, request_id: int) -> InfoReply:
        model = self._streams[DEFAULT_STREAM].model
        manifest, spec = model.manifest, model.spec
        return InfoReply(
            id=request_id,
            version=__version__,
            model_id=manifest.model_id,
            bundle_digest=self._engines.bundle.digest,
            method=model.method,
            methods=sorted(manifest.methods),
            hyper=model.hyper,
            input=InputInfo(
                dtype=manifest.input.dtype,
                shape=list(manifest.input.shape),
                low=manifest.input.low,
                high=manifest.input.high,
            ),
            classes=manifest.classes,
            class_names=manifest.class_names,
            limits=ServerLimits(
                max_batch=self._config.max_batch,
                max_request_bytes=self._config.max_request_bytes,
                batch=spec.batch,
                min_batch=spec.min_batch,
            ),
        )

    def _status(self, request_id: int) -> StatusReply:
        return StatusReply(
            id=request_id,
            version=__version__,
            uptime_s=self._clock() - self._began_s,
            bundles=[self._engines.bundle.manifest.model_id],
            streams=[_stream_status(stream) for stream in self._streams.values()],
            requests=Requests(ok=self._stats.ok, failed=self._stats.failed, failures=self._stats.failures()),
            latency_ms=self._stats.latency(),
        )

    def _new_stream(self, name: str) -> GuardedModel:
        config = self._config
        if len(self._streams) >= config.max_streams:
            raise TooManyStreams(
                f"{len(self._streams)} streams are held, max_streams is {config.max_streams}",
                "Use one of them, or raise `max_streams`",
            )
        method = self._engines.methods[0]
        limits = Limits(max_batch=config.max_batch, max_bytes=config.max_request_bytes)
        model = Model(self._engines, method, hyper=config.hyper_of(method), seed=config.seed, limits=limits)
        return GuardedModel(name, model, self._guards, on_event=_log_event)


def load(config: Config, *, stats: Stats, clock: Callable[[], float]) -> Responder:
    """Open the bundle, load what its method needs and stand ready to answer.

    Raises:
        BundleError: the bundle is refused.
        MethodError: it has no such method or hyper-parameter.
        EngineError: this machine cannot run its graphs.
    """
    bundle = Bundle.open(_bundle_path(config))
    known = bundle.manifest.methods
    for name in config.hyper_methods():
        if name not in known:
            raise UnknownMethod(
                f"hyper-parameters are set for unknown method `{name}`{did_you_mean(name, known)}",
                "Correct the name, or leave the setting out",
            )
    method = config.method or bundle.manifest.default_method
    engines = Engines.load(bundle, methods=[method], options=EngineOptions(threads=config.threads))
    log.info(
        "serving `%s` with method `%s` on %s, bundle %s",
        bundle.manifest.model_id,
        method,
        ", ".join(sorted(set(engines.providers.values()))),
        bundle.digest[:12],
    )
    return Responder(engines, config, stats, clock)


def _bundle_path(config: Config) -> Path:
    if config.bundle is not None:
        return Path(config.bundle)
    from tta_edge.builtin import builtin_bundle

    return builtin_bundle()


def _stream_status(stream: GuardedModel) -> StreamStatus:
    model = stream.model
    return StreamStatus(
        id=stream.stream,
        method=model.method,
        steps=model.steps,
        theta_digest=model.digest,
        distance=model.distance,
        state="adapting" if stream.adapts else "source",
        entropy=stream.last_entropy,
        last_event=stream.last_event,
        events=dict(stream.counts),
    )


def _log_event(event: Event) -> None:
    level = logging.INFO if event.action == "skip" else logging.WARNING
    fields = {"stream": event.stream, "action": event.action, "reason": event.reason.value}
    log.log(
        level,
        "stream %s: %s (%s): %s",
        event.stream,
        event.action,
        event.reason.value,
        event.detail,
        extra={"event": fields},
    )
