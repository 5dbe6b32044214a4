"""What operators ask of streams: back to the source, back to a checkpoint, adaptation on or off."""

from __future__ import annotations

from dataclasses import dataclass

from tta_edge.adapt import Stream
from tta_edge.events import Event, Reason, Tell
from tta_edge.registry import Registry
from tta_edge.saver import Saver
from tta_edge.served import Served
from tta_edge.stepper import Stepper
from tta_edge.wire import Adapt, AdaptDone, Reset, ResetDone, Rollback, RollbackDone


@dataclass
class Switch:
    """The daemon's kill switch, read by every thread.

    Attributes:
        on: whether streams adapt.
    """

    on: bool


class Operations:
    """Does what operators ask for. For one thread.

    Args:
        served: bundles.
        registry: streams.
        stepper: lets go of samples that wait.
        switch: of the daemon.
        saver: writes what is confirmed; None: nothing survives a restart.
        tell: takes events.
    """

    def __init__(
        self,
        served: Served,
        registry: Registry,
        stepper: Stepper,
        *,
        switch: Switch,
        saver: Saver | None,
        tell: Tell,
    ) -> None:
        self._served = served
        self._registry = registry
        self._stepper = stepper
        self._switch = switch
        self._saver = saver
        self._tell = tell

    def reset(self, message: Reset) -> ResetDone:
        """Return a stream to the source.

        Raises:
            UnknownBundle, WrongTask, UnknownStream: there is no such stream.
        """
        stream = self._stream(message.bundle, message.stream)
        self._stepper.drop(stream)
        stream.reset()
        durable = self._settle(stream) or self._saver is None  # without a directory a restart is a reset
        digest = stream.model.digest
        return ResetDone(id=message.id, stream=stream.name, theta_digest=digest, durable=durable)

    def roll_back(self, message: Rollback) -> RollbackDone:
        """Return a stream to its last good checkpoint, or to the source where it has none.

        Raises:
            UnknownBundle, WrongTask, UnknownStream: there is no such stream.
        """
        stream = self._stream(message.bundle, message.stream)
        self._stepper.drop(stream)
        found = stream.roll_back()
        durable = self._settle(stream) or (self._saver is None and not found)
        model = stream.model
        return RollbackDone(
            id=message.id,
            stream=stream.name,
            theta_digest=model.digest,
            steps=model.steps,
            to="checkpoint" if found else "source",
            durable=durable,
        )

    def adapt(self, message: Adapt) -> AdaptDone:
        """Switch adaptation, of one stream or, without a name, of the daemon.

        Raises:
            UnknownBundle, WrongTask, UnknownStream: there is no such stream.
        """
        word = "on" if message.on else "off"
        if not message.stream:
            self._switch.on = message.on
            if not message.on:
                self._stepper.drop_all()  # what came before must not be adapted on when it is on again
                for each in self._registry.all():
                    each.fence()
                    each.drop_window()
            durable = self._saver is not None and self._saver.save_switch(message.on)
            self._tell(Event("", "", "switch", Reason.REQUESTED.value, f"adaptation is {word}"))
            return AdaptDone(id=message.id, on=message.on, stream="", durable=durable)
        stream = self._stream(message.bundle, message.stream)
        stream.switch(message.on)
        if not message.on:
            self._stepper.drop(stream)
        if self._saver is not None:
            self._saver.keep(stream, stream.model.checkpoint, stream.notes())
        self._tell(Event(*stream.key, "switch", Reason.REQUESTED.value, f"adaptation is {word}"))
        return AdaptDone(id=message.id, on=message.on, stream=stream.name, durable=self._settle(stream))

    def _settle(self, stream: Stream) -> bool:
        """Write what an operator asked for before it is confirmed; gives whether it will survive."""
        return self._saver is not None and self._saver.settle(stream)

    def _stream(self, bundle: str, name: str) -> Stream:
        return self._registry.find(self._served.images(bundle), name)
