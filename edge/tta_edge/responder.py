"""Typed requests to typed replies: the daemon without its network.

One thread answers. Steps in the background, writing to disk and loading a bundle have threads of their own; what
they change here, they change through that one thread or under a stream's lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from tta_edge.adapt import Guards, Keeper, Stream
from tta_edge.batching import Call, Mergeable
from tta_edge.cloud_side import CloudSide, Footing
from tta_edge.config import Config
from tta_edge.errors import Internal
from tta_edge.events import EventLog
from tta_edge.gallery import Shelf
from tta_edge.hosting import Host, load_all
from tta_edge.operating import Operations, Switch
from tta_edge.policy import Policy
from tta_edge.predictions import Predictions
from tta_edge.registry import Registry
from tta_edge.reloading import Reloads
from tta_edge.saver import Saver
from tta_edge.served import Served
from tta_edge.session import Arrived, Emit, error_reply
from tta_edge.sessions import Sessions
from tta_edge.stats import Figures, Stats
from tta_edge.status import Overview
from tta_edge.stepper import Stepper
from tta_edge.store import StateStore
from tta_edge.teaching import Bases, Report
from tta_edge.texts import Texts
from tta_edge.wire import (
    Adapt,
    Cancel,
    Events,
    EventsReply,
    Info,
    Predict,
    Reload,
    Reply,
    Reset,
    Rollback,
    StatusReply,
    Tensors,
    TextRequest,
    tag,
)
from tta_runtime.atomic import DISK, Disk
from tta_runtime.errors import TtaError
from tta_runtime.theta import Vector

log = logging.getLogger(__name__)

DEFAULT_STREAM = "default"
CLOSE_S = 5.0  # for a background step that is under way when the daemon ends


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
        began_s = clock()
        self._guards = Guards(
            max_distance=config.max_distance,
            reset_every_steps=config.reset_every_steps,
            min_diversity=config.min_diversity,
            checkpoint_steps=config.checkpoint_steps,
        )
        policy = Policy(
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
        self._served = Served(load_all(config))
        images, first = self._served.of_images(), self._served.host("")
        # Before the state directory is taken: what is refused here leaves nothing behind.
        footing = Footing.find(config, self._served)
        if config.state_dir is not None:
            self._store = StateStore(
                Path(config.state_dir),
                self.events.add,
                max_streams=config.max_stored_streams,
                max_event_bytes=config.max_event_bytes,
                disk=disk,
            )
            self._saver = Saver(self._store)
        allowed = config.adapt and config.mode != "off"
        switch = Switch(allowed and (self._store is None or self._store.switch()))
        self._stepper = Stepper(
            policy,
            max_bytes=config.max_window_bytes,
            adapting=lambda: switch.on,
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
        sessions = Sessions(
            max_sessions=config.max_sessions,
            max_bytes=config.max_session_bytes,
            tell=self.events.add,
            store=self._store,
            saver=self._saver,
        )
        self._texts = Texts(
            config,
            sessions,
            stats,
            tell=self.events.add,
            call=call,
            finish=self._finish,
            refuse=self._refuse,
            emit=emit,
            waited_for=waited_for,
            clock=clock,
        )
        self._cloud = CloudSide(
            config,
            footing,
            first,
            self._bases,
            offer=lambda epoch, seq, theta, report: self.offer_base(first.name, epoch, seq, theta, report),
            tell=self.events.add,
        )
        self._predictions = Predictions(
            self._served,
            self._registry,
            self._bases,
            self._stepper,
            policy=policy,
            switch=switch,
            cloud=self._cloud,
            stats=stats,
            finish=self._finish,
            clock=clock,
        )
        self._operations = Operations(
            self._served,
            self._registry,
            self._stepper,
            switch=switch,
            saver=self._saver,
            tell=self.events.add,
        )
        self._reloads = Reloads(
            config,
            self._served,
            self._registry,
            self._bases,
            self._texts,
            tell=self.events.add,
            call=call,
            finish=self._finish,
            refuse=self._refuse,
        )
        self._overview = Overview(
            config,
            stats,
            served=self._served,
            registry=self._registry,
            bases=self._bases,
            stepper=self._stepper,
            sessions=sessions,
            texts=self._texts,
            switch=switch,
            saver=self._saver,
            cloud=self._cloud,
            open_requests=open_requests,
            began_s=began_s,
            clock=clock,
        )
        self._registry.restore_all(images)
        for stream in self._registry.all():
            self._bases.admit(stream)
        if not self._registry.all() and first.text is None:
            self._registry.admit(self._registry.get(first, DEFAULT_STREAM))
        self._stepper.start()
        self._cloud.start()

    # ------------------------------------------------------------------------------------------ answering

    def merge(self, arrived: Arrived) -> Mergeable | None:
        """Whether a request may share a run with others (see batching.py); for any thread."""
        return self._predictions.merge(arrived)

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
                self._predictions.answer(message, [arrived])
            elif isinstance(message, Reload):
                self._reloads.begin(message.bundle, arrived)
            elif isinstance(message, get_args(TextRequest)) or self._resets_session(message):
                self._texts.take(arrived, self._served.host(message.bundle))
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
        return isinstance(message, Reset) and self._served.host(message.bundle).text is not None

    def _together(self, message: Predict, group: list[Arrived]) -> bool:
        """Answer predictions in one run; false where they must be answered one by one after all."""
        try:
            self._predictions.answer(message, group)
        except Exception:
            # One of them may be at fault: alone, each gets the error that is its own.
            log.debug("%d requests could not share a run", len(group), exc_info=True)
            return False
        return True

    def _command(self, message: Any) -> Reply:
        if isinstance(message, Reset):
            return self._operations.reset(message)
        if isinstance(message, Rollback):
            return self._operations.roll_back(message)
        if isinstance(message, Adapt):
            return self._operations.adapt(message)
        if isinstance(message, Events):
            return EventsReply(id=message.id, events=self.events.newest(message.limit))
        if isinstance(message, Info):
            return self._overview.info(message)
        return self.status(message.id)

    # ------------------------------------------------------------------------------------------ for other threads

    def offer_base(self, bundle: str, epoch: int, seq: int, theta: Vector, report: Report) -> None:
        """Take a verified theta on probation; for any thread. It is done between two requests.

        Args:
            bundle: name; empty for the first one.
            epoch: of its patch.
            seq: of its patch.
            theta: [P], finite, of that bundle.
            report: told what becomes of it, in the answering thread.
        """
        self._call(lambda: self._bases.offer(self._served.host(bundle), epoch, seq, theta, report))

    def status(self, request_id: int = 0, figures: Figures | None = None) -> StatusReply:
        """How the daemon is doing; for any thread."""
        return self._overview.status(request_id, figures)

    # ------------------------------------------------------------------------------------------ between requests

    def reload_all(self) -> None:
        """Read every bundle again, as on SIGHUP; how it ends is told by events."""
        self._reloads.begin_all()

    # ------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Finish a step that is under way, save every stream, let the state directory go."""
        self._cloud.close()
        self._stepper.close(CLOSE_S)
        self._texts.close()
        self._registry.save_all()
        if self._saver is not None:
            self._saver.close()
        if self._store is not None:
            self._store.close()

    # ------------------------------------------------------------------------------------------ inside

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
