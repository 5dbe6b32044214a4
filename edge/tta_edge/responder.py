"""Typed requests to typed replies: the daemon without its network.

One thread answers. Steps in the background, writing to disk and loading a bundle have threads of their own; what
they change here, they change through that one thread or under a stream's lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from tta_edge.adapt import Answer, Guards, Keeper, Stream
from tta_edge.auto import Auto
from tta_edge.base import Base
from tta_edge.batching import Call, Mergeable
from tta_edge.cloud import CloudLink
from tta_edge.config import BundleConfig, Config
from tta_edge.enrol import Enrolment
from tta_edge.enrol import load as load_enrolment
from tta_edge.errors import Internal, ModeRefused, NotEnrolled, ReloadUnderWay, UnknownBundle
from tta_edge.events import Event, EventLog, Reason
from tta_edge.gallery import Shelf
from tta_edge.hosting import Host, load, load_all, wanted
from tta_edge.policy import Policy
from tta_edge.registry import Registry
from tta_edge.saver import Saver
from tta_edge.sending import Sender, encoder
from tta_edge.session import Arrived, error_reply
from tta_edge.sessions import Sessions
from tta_edge.spool import Spool
from tta_edge.stats import Figures, Stats
from tta_edge.stepper import Stepper
from tta_edge.store import StateStore
from tta_edge.teaching import TAUGHT, Bases, Report, check_mode
from tta_edge.texts import Texts
from tta_edge.wire import (
    Adapt,
    AdaptDone,
    AutoStatus,
    BundleStatus,
    Cancel,
    Events,
    EventsReply,
    Info,
    InfoReply,
    InputInfo,
    Predict,
    Prediction,
    Reload,
    ReloadDone,
    Reply,
    Requests,
    Reset,
    ResetDone,
    Rollback,
    RollbackDone,
    ServerLimits,
    StatusReply,
    StreamStatus,
    Tensors,
    TextInfo,
    TextRequest,
    declare,
    tag,
)
from tta_runtime import __version__
from tta_runtime.atomic import DISK, Disk
from tta_runtime.errors import TtaError, did_you_mean
from tta_runtime.manifest_check import expect_task
from tta_runtime.memory import resident_bytes, return_free_memory
from tta_runtime.model import Model
from tta_runtime.text_model import TextModel
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

DEFAULT_STREAM = "default"
CLOSE_S = 5.0  # for a background step that is under way when the daemon ends

Emit = Callable[[Arrived, Reply, Tensors], None]
"""Takes the reply to an open request, and its tensors."""


class Responder:
    """Answers the requests of one daemon. `respond`, `call`s and `close` are for one thread.

    Args:
        config: of the daemon.
        stats: shared with whoever reads them.
        emit: takes the replies.
        call: has something done by the answering thread between two requests.
        open_requests: how many requests are being worked on.
        waited_for: whether somebody waits for the answer to one; for any thread.
        clock: seconds, the same one that stamps arrivals.
        disk: what writes to the state directory.

    Raises:
        BundleError, MethodError, EngineError: a bundle cannot be served.
        StateDirUnusable, StateDirInUse: of the state directory.
        NotAnImage, ImagesExtraMissing: samples are to go to the cloud as JPEG and cannot.
    """

    def __init__(
        self,
        config: Config,
        stats: Stats,
        *,
        emit: Emit,
        call: Callable[[Call], None],
        open_requests: Callable[[], int] = lambda: 0,
        waited_for: Callable[[Arrived], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
        disk: Disk = DISK,
    ) -> None:
        self._config = config
        self._stats = stats
        self._emit = emit
        self._call = call
        self._open_requests = open_requests
        self._clock = clock
        self._began_s = clock()
        self._guards = Guards(
            max_distance=config.max_distance,
            reset_every_steps=config.reset_every_steps,
            min_diversity=config.min_diversity,
            checkpoint_steps=config.checkpoint_steps,
        )
        self._policy = Policy(
            config.policy,
            step_batch=config.step_batch,
            every_samples=config.every_samples,
            budget=config.budget,
            inline_min_batch=config.inline_min_batch,
            window=config.window,
        )
        self._shelf = Shelf(config.max_window_bytes)
        self._saver: Saver | None = None
        self._store: StateStore | None = None
        self.events = EventLog(stats, self._keep_line)
        self._hosts = load_all(config)
        self._default = next(iter(self._hosts))
        images = {name: host for name, host in self._hosts.items() if host.text is None}
        # Before the state directory is taken: what is refused here leaves nothing behind.
        for host in images.values():
            check_mode(config.mode, host)
        if config.mode in TAUGHT and self._default not in images:
            raise ModeRefused(
                f"mode `{config.mode}` teaches the first bundle, and `{self._default}` is a language model",
                "Set mode = local",
            )
        enrolment = _enrolment(config) if config.mode in TAUGHT else None
        sends = enrolment is not None and config.upload != "off"
        first = self._hosts[self._default].engines.bundle.manifest.input
        jpegs = encoder(config.upload_encoding, config.upload_jpeg_quality, first) if sends else None
        if config.state_dir is not None:
            self._store = StateStore(
                Path(config.state_dir),
                self.events.add,
                max_streams=config.max_stored_streams,
                max_event_bytes=config.max_event_bytes,
                disk=disk,
            )
            self._saver = Saver(self._store)
        self._adapting = (
            config.adapt and config.mode != "off" and (self._store is None or self._store.switch())
        )
        self._stepper = Stepper(
            self._policy,
            max_bytes=config.max_window_bytes,
            adapting=lambda: self._adapting,
            stats=stats,
            clock=clock,
        )
        self._registry = Registry(
            self._new_stream,
            max_streams=config.max_streams,
            tell=self.events.add,
            store=self._store,
            saver=self._saver,
            left=self._stepper.drop,
        )
        self._bases = Bases(
            config.mode,
            probation_samples=config.probation_samples,
            directory=None if config.state_dir is None else Path(config.state_dir),
            tell=self.events.add,
            streams=self._registry.all,
            disk=disk,
        )
        for host in images.values():
            self._bases.open(host)
        self._sessions = Sessions(
            max_sessions=config.max_sessions,
            max_bytes=config.max_session_bytes,
            tell=self.events.add,
            store=self._store,
            saver=self._saver,
        )
        self._texts = Texts(
            config,
            self._sessions,
            stats,
            tell=self.events.add,
            call=call,
            finish=self._finish,
            refuse=self._refuse,
            emit=emit,
            waited_for=waited_for,
            clock=clock,
        )
        self._cloud = None if enrolment is None else self._linked(config, enrolment)
        self._sender = Sender(
            config.upload if sends else "off",
            share=config.upload_share,
            samples_per_minute=config.upload_samples_per_minute,
            bytes_per_minute=config.upload_bytes_per_minute,
            send=lambda uploads: None if self._cloud is None else self._cloud.send(uploads),
            seed=config.seed,
            encoder=jpegs,
        )
        self._reloading: set[str] = set()
        self._registry.restore_all(images)
        for stream in self._registry.all():
            self._bases.admit(stream)
        if not self._registry.all() and self._default in images:
            self._registry.admit(self._registry.get(self._hosts[self._default], DEFAULT_STREAM))
        self._stepper.start()
        if self._cloud is not None:
            self._cloud.start()

    # ------------------------------------------------------------------------------------------ answering

    def merge(self, arrived: Arrived) -> Mergeable | None:
        """Whether a request may share a run with others (see batching.py); for any thread."""
        message, x = arrived.message, arrived.tensors.get("x")
        if not isinstance(message, Predict) or x is None or not x.ndim or not len(x):
            return None
        if message.adapt and self._policy.inline(len(x)):
            return None
        key = (
            message.bundle or self._default,
            message.stream,
            message.adapt,
            message.compare,
            x.dtype.str,
            x.shape[1:],
        )
        return Mergeable(key, len(x))

    def respond(self, group: list[Arrived]) -> None:
        """Answer requests that share a run, or a single one. Whatever goes wrong becomes an error reply."""
        first = group[0].message
        if len(group) > 1 and isinstance(first, Predict) and self._together(first, group):
            return
        for arrived in group:
            self._alone(arrived)

    def _alone(self, arrived: Arrived) -> None:
        message: Any = arrived.message
        try:
            if isinstance(message, Predict):
                self._predict(message, [arrived])
            elif isinstance(message, Reload):
                self._begin_reload(message.bundle, arrived)
            elif isinstance(message, get_args(TextRequest)) or self._resets_session(message):
                self._texts.take(arrived, self._host(message.bundle))
            elif isinstance(message, Cancel):
                self._finish(arrived, self._texts.cancel(arrived, message), {})
            else:
                self._finish(arrived, self._command(message), {})
        except TtaError as error:
            self._refuse(arrived, error)
        except Exception as error:
            log.exception("a defect while answering `%s`", tag(message))
            cause = f"the daemon failed with {type(error).__name__}"
            self._refuse(arrived, Internal(cause, "Report it with the daemon's log"))

    def _resets_session(self, message: Any) -> bool:
        return isinstance(message, Reset) and self._host(message.bundle).text is not None

    def _together(self, message: Predict, group: list[Arrived]) -> bool:
        """Answer predictions in one run; false where they must be answered one by one after all."""
        try:
            self._predict(message, group)
        except Exception:
            # One of them may be at fault: alone, each gets the error that is its own.
            log.debug("%d requests could not share a run", len(group), exc_info=True)
            return False
        return True

    def _predict(self, message: Predict, group: list[Arrived]) -> None:
        """Answer predictions of one stream in one run; `message` is the first one's."""
        began_s = self._clock()
        host = self._images(message.bundle)
        stream = self._registry.get(host, message.stream)
        self._bases.admit(stream)
        batches = [arrived.tensors["x"] for arrived in group]
        # Those that share a run must each be fit for it; a single one is checked by the model before anything else.
        checked = batches if len(group) == 1 else [stream.model.check_input(batch) for batch in batches]
        x = checked[0] if len(group) == 1 else np.concatenate(checked)
        adapt = message.adapt and self._adapting
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
        self._afterwards(host, stream, x, answer)

    def _afterwards(self, host: Host, stream: Stream, x: NDArray[Any], answer: Answer) -> None:
        """What the cloud's side of it costs: nobody waits for that, and nothing of it may cost an answer."""
        try:
            if answer.reason in (Reason.COLLAPSE, Reason.NON_FINITE_LOGITS):
                self._bases.collapsed(host, f"stream `{stream.name}`: {answer.reason.value}")
            self._bases.answered(host, stream, x, answer.logits)
            if host.name == self._default:
                self._sender.answered(stream.name, x, answer.logits, self._bases.base(host.name))
        except Exception:
            log.exception("a defect while a base was judged or samples were chosen")

    def _command(self, message: Any) -> Reply:
        if isinstance(message, Reset):
            stream = self._registry.find(self._images(message.bundle), message.stream)
            self._stepper.drop(stream)
            stream.reset()
            durable = self._settle(stream) or self._store is None  # without a directory a restart is a reset
            digest = stream.model.digest
            return ResetDone(id=message.id, stream=stream.name, theta_digest=digest, durable=durable)
        if isinstance(message, Rollback):
            stream = self._registry.find(self._images(message.bundle), message.stream)
            self._stepper.drop(stream)
            found = stream.roll_back()
            durable = self._settle(stream) or (self._store is None and not found)
            model = stream.model
            return RollbackDone(
                id=message.id,
                stream=stream.name,
                theta_digest=model.digest,
                steps=model.steps,
                to="checkpoint" if found else "source",
                durable=durable,
            )
        if isinstance(message, Adapt):
            return self._switch(message)
        if isinstance(message, Events):
            return EventsReply(id=message.id, events=self.events.newest(message.limit))
        if isinstance(message, Info):
            return self._info(message)
        return self.status(message.id)

    def _switch(self, message: Adapt) -> AdaptDone:
        word = "on" if message.on else "off"
        if not message.stream:
            self._adapting = message.on
            if not message.on:
                self._stepper.drop_all()  # what came before must not be adapted on when it is on again
                for each in self._registry.all():
                    each.fence()
                    each.drop_window()
            durable = self._saver is not None and self._saver.save_switch(message.on)
            self.events.add(Event("", "", "switch", Reason.REQUESTED.value, f"adaptation is {word}"))
            return AdaptDone(id=message.id, on=message.on, stream="", durable=durable)
        stream = self._registry.find(self._images(message.bundle), message.stream)
        stream.switch(message.on)
        if not message.on:
            self._stepper.drop(stream)
        if self._saver is not None:
            self._saver.keep(stream, stream.model.checkpoint, stream.notes())
        self.events.add(Event(*stream.key, "switch", Reason.REQUESTED.value, f"adaptation is {word}"))
        return AdaptDone(id=message.id, on=message.on, stream=stream.name, durable=self._settle(stream))

    def _settle(self, stream: Stream) -> bool:
        """Write what an operator asked for before it is confirmed; gives whether it will survive."""
        return self._saver is not None and self._saver.settle(stream)

    # ------------------------------------------------------------------------------------------ bases

    def _linked(self, config: Config, enrolment: Enrolment) -> CloudLink:
        """The link to the cloud, for the first bundle."""
        host = self._hosts[self._default]
        return CloudLink(
            enrolment,
            host.engines.bundle,
            config.mode,
            lambda: self._bases.base(host.name),
            lambda epoch, seq, theta, report: self.offer_base(host.name, epoch, seq, theta, report),
            Spool(
                enrolment.directory.parent / "spool",
                max_samples=config.max_spool_samples,
                max_bytes=config.max_spool_bytes,
                tell=self.events.add,
            ),
            max_distance=config.max_distance,
        )

    def offer_base(self, bundle: str, epoch: int, seq: int, theta: Vector, report: Report) -> None:
        """Take a verified theta on probation; for any thread. It is done between two requests.

        Args:
            bundle: name; empty for the first one.
            epoch: of its patch.
            seq: of its patch.
            theta: [P], finite, of that bundle.
            report: told what becomes of it, in the answering thread.
        """
        self._call(lambda: self._bases.offer(self._host(bundle), epoch, seq, theta, report))

    def base(self, bundle: str = "") -> Base:
        """The committed base of a bundle; for any thread."""
        return self._bases.base(bundle or self._default)

    # ------------------------------------------------------------------------------------------ reloading

    def reload_all(self) -> None:
        """Read every bundle again, as on SIGHUP; how it ends is told by events."""
        for name in list(self._hosts):
            if name not in self._reloading:
                self._begin_reload(name, None)

    def _begin_reload(self, name: str, arrived: Arrived | None) -> None:
        old = self._host(name)
        if old.name in self._reloading:
            raise ReloadUnderWay(f"bundle `{old.name}` is being reloaded already", "Wait for it to finish")
        self._reloading.add(old.name)
        bundle = wanted(self._config)[old.name]
        threading.Thread(
            target=self._load, args=(old, bundle, arrived), name="tta-loader", daemon=True
        ).start()

    def _load(self, old: Host, bundle: BundleConfig, arrived: Arrived | None) -> None:
        """In the loader's thread: load, then hand the result to the answering thread."""
        try:
            new = load(old.name, bundle, self._config, before=old)
        except TtaError as error:
            refused = error
            self._call(lambda: self._reload_failed(old, refused, arrived))
        except Exception as error:
            log.exception("a defect while loading bundle %s", old.name)
            internal = Internal(f"loading failed with {type(error).__name__}", "Report it with the log")
            self._call(lambda: self._reload_failed(old, internal, arrived))
        else:
            self._call(lambda: self._swap(old, new, arrived))

    def _reload_failed(self, old: Host, error: TtaError, arrived: Arrived | None) -> None:
        self._reloading.discard(old.name)
        self.events.add(Event(old.name, "", "reload", Reason.BUNDLE_REFUSED.value, str(error)))
        if arrived is not None:
            self._refuse(arrived, error)

    def _swap(self, old: Host, new: Host, arrived: Arrived | None) -> None:
        self._reloading.discard(old.name)
        before, now = old.engines.bundle.digest, new.engines.bundle.digest
        self._hosts[new.name] = new
        if new.text is not None:
            kept, restarted = self._texts.swap(new)
        else:
            if before != now:
                self._bases.open(new)
            kept, restarted = self._registry.swap(new)
        detail = f"bundle {now[:12]} after {before[:12]}; {kept} streams go on, {restarted} start anew"
        self.events.add(Event(new.name, "", "reload", Reason.REQUESTED.value, detail))
        if arrived is not None:
            reply = ReloadDone(
                id=arrived.message.id,
                bundle=new.name,
                bundle_digest=now,
                changed=before != now,
                kept_streams=kept,
                restarted_streams=restarted,
            )
            self._finish(arrived, reply, {})
        self._call(return_free_memory)  # when nothing holds the old engines any more

    # ------------------------------------------------------------------------------------------ looking in

    def _info(self, message: Info) -> InfoReply:
        host = self._host(message.bundle)
        manifest = host.engines.bundle.manifest
        spec = manifest.methods[host.method]
        return InfoReply(
            id=message.id,
            version=__version__,
            bundle=host.name,
            model_id=manifest.model_id,
            bundle_digest=host.engines.bundle.digest,
            method=host.method,
            methods=sorted(manifest.methods),
            hyper={h.name: host.hyper.get(h.name, h.default) for h in spec.hyper},
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
            text=None if host.text is None else self._text_info(host.text),
        )

    def _text_info(self, text: TextModel) -> TextInfo:
        return TextInfo(
            tokenizer=text.text.tokenizer,
            tokenizer_digest=text.tokenizer.digest,
            chunk=text.text.chunk,
            context=text.text.context,
            begins=text.text.begin is not None,
            max_text_bytes=self._config.max_text_bytes,
        )

    def status(self, request_id: int = 0, figures: Figures | None = None) -> StatusReply:
        """How the daemon is doing; for any thread."""
        figures = figures or self._stats.figures()
        return StatusReply(
            id=request_id,
            version=__version__,
            uptime_s=self._clock() - self._began_s,
            adapt=self._adapting,
            policy=self._config.policy,
            bundles=[self._bundle_status(host) for host in list(self._hosts.values())],
            streams=[self._stream_status(stream) for stream in self._registry.all()],
            stored_streams=self._registry.stored(self._text_bundles()),
            state_dir=self._config.state_dir or "",
            requests=Requests(
                ok=figures.ok,
                failed=figures.failed,
                open=self._open_requests(),
                failures=dict(figures.refused),
            ),
            latency_ms=figures.latency(),
            rss_bytes=resident_bytes(),
            disk_error="" if self._saver is None else self._saver.error,
            cloud=None
            if self._cloud is None
            else self._cloud.info(seen=self._sender.seen, chosen=self._sender.chosen),
            sessions=self._texts.status(),
            stored_sessions=self._sessions.stored(self._text_bundles()),
            text_bytes=self._sessions.nbytes,
        )

    def _text_bundles(self) -> set[str]:
        return {name for name, host in list(self._hosts.items()) if host.text is not None}

    def _bundle_status(self, host: Host) -> BundleStatus:
        bundle = host.engines.bundle
        status = BundleStatus(
            name=host.name,
            model_id=bundle.manifest.model_id,
            digest=bundle.digest,
            method=host.method,
            provider=", ".join(sorted(set(host.engines.providers.values()))),
            loads=host.loads,
            task="classification" if host.text is None else "text",
        )
        if host.text is not None:
            return status
        base, staged = self._bases.base(host.name), self._bases.candidate(host.name)
        return msgspec.structs.replace(
            status,
            base="" if not base.seq else f"{base.epoch}.{base.seq}",
            staged="" if staged is None else f"{staged[0]}.{staged[1]}",
            fallbacks=[str(fallback) for fallback in host.fallbacks],
        )

    def _stream_status(self, stream: Stream) -> StreamStatus:
        model, monitor, auto = stream.model, stream.monitor, stream.auto
        steps, distance, digest = _facts(model)
        return StreamStatus(
            id=stream.name,
            bundle=stream.bundle,
            method=model.method,
            steps=steps,
            theta_digest=digest,
            distance=distance,
            state=stream.state(self._adapting),
            restored=stream.restored,
            samples=stream.samples,
            window=self._stepper.waiting(stream) if auto is None else len(auto.gallery),
            checkpoints=len(stream.checkpoints),
            entropy=monitor.entropy,
            diversity=monitor.diversity,
            agreement=monitor.agreement,
            last_event=stream.last_event,
            events=dict(stream.counts),
            auto=None if auto is None else _auto_status(auto),
        )

    # ------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Finish a step that is under way, save every stream, let the state directory go."""
        if self._cloud is not None:
            self._cloud.close()
        self._stepper.close(CLOSE_S)
        self._texts.close()
        self._registry.save_all()
        if self._saver is not None:
            self._saver.close()
        if self._store is not None:
            self._store.close()

    # ------------------------------------------------------------------------------------------ inside

    def _host(self, name: str) -> Host:
        host = self._hosts.get(name or self._default)
        if host is None:
            raise UnknownBundle(
                f"there is no bundle `{name}`{did_you_mean(name, self._hosts)}", "Name one that is served"
            )
        return host

    def _images(self, name: str) -> Host:
        """The bundle of a name, which must be for images."""
        host = self._host(name)
        expect_task(host.engines.bundle.manifest, "classification")
        return host

    def _new_stream(self, host: Host, name: str) -> Stream:
        return Stream(
            name,
            host.model(self._config),
            self._guards,
            bundle=host.name,
            tell=self.events.add,
            keeper=self._saver or Keeper(),
            shelf=self._shelf,
        )

    def _keep_line(self, line: bytes) -> None:
        if self._saver is not None:
            self._saver.line(line)

    def _finish(self, arrived: Arrived, reply: Reply, tensors: Tensors) -> None:
        self._stats.answered(tag(arrived.message))
        self._emit(arrived, reply, tensors)

    def _refuse(self, arrived: Arrived, error: TtaError) -> None:
        self._stats.refused(error.code)
        self._emit(arrived, error_reply(error, arrived.message.id), {})


def _prediction(
    arrived: Arrived, stream: Stream, answer: Answer, part: slice, collected: bool, compute_s: float
) -> tuple[Prediction, Tensors]:
    """The reply to one request, of an answer that may have been for several."""
    logits = answer.logits[part]
    source = None if answer.source_logits is None else answer.source_logits[part]
    outputs: dict[str, NDArray[Any]] = {"logits": logits}
    if source is not None:
        outputs["source_logits"] = source
    steps, distance, digest = _facts(stream.model)
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


def _facts(model: Model) -> tuple[int, float, str]:
    """Steps, distance and digest of one theta, though a step in the background may be committed meanwhile."""
    while True:
        now = model.checkpoint
        facts = model.steps, model.distance, model.digest
        if model.checkpoint is now:
            return facts


def _auto_status(auto: Auto) -> AutoStatus:
    """What auto has decided for a stream."""
    return AutoStatus(
        mode="source" if auto.held else "resting" if auto.resting else "awake",
        change=auto.shift,
        shift=auto.report.get("shift"),
        share=auto.report.get("share"),
        gain=auto.gain,
        correlated=auto.prior.correlated,
        evidence=auto.prior.evidence,
    )


def _enrolment(config: Config) -> Enrolment:
    """What this edge is known by.

    Raises:
        NotEnrolled: the state directory holds no enrolment, or there is none.
    """
    if config.state_dir is None:
        raise NotEnrolled(
            f"mode `{config.mode}` needs the enrolment of a state directory, and none is set",
            "Set `state_dir` to the directory that `tta-edge enroll` was given",
        )
    return load_enrolment(Path(config.state_dir))
