"""One request to the cloud: when it is sent, or sent again, and what answers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tta_runtime.errors import UnknownMessage
from tta_runtime.link import (
    Accepted,
    Fetch,
    FromCloud,
    FromEdge,
    GetRoot,
    Hello,
    Noted,
    PatchMessage,
    Ping,
    Progress,
    RootMessage,
    Sample,
    Welcome,
    encode_message,
)
from tta_runtime.wire import Buffer, Tensors, tag

Frames = list[Buffer]

_ANSWERS: Mapping[type[Any], tuple[type[Any], ...]] = {
    Hello: (Welcome,),
    Sample: (Accepted,),
    Fetch: (PatchMessage, Noted),
    GetRoot: (RootMessage,),
    Progress: (Noted,),
    Ping: (Noted,),
}


@dataclass
class Request:
    """Something that wants an answer.

    Attributes:
        message: the request.
        tensors: that go with it.
        under_way: it was sent on this connection, and may be answered.
        due_s: when it is sent, for the first time or again.
        sent: it was sent, on this connection or a former one.
        tries: how often, on this connection.
        refusals: of the cloud that count.
    """

    message: FromEdge
    tensors: Tensors = field(default_factory=dict)
    under_way: bool = False
    due_s: float = 0.0
    sent: bool = False
    tries: int = 0
    refusals: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    def begin(self) -> None:
        """It is sent now."""
        self.under_way = self.sent = True
        self.tries += 1

    def frames(self) -> Frames:
        """What is sent."""
        return encode_message(self.message, self.tensors)

    def restart(self, now_s: float) -> None:
        """The connection is a new one: nothing of the former is answered in it."""
        self.under_way, self.due_s, self.tries = False, now_s, 0

    def check(self, answer: FromCloud) -> None:
        """Whether a message of its number answers it.

        Raises:
            UnknownMessage: it is no answer to such a request, or one to another sample.
        """
        if not isinstance(answer, _ANSWERS[type(self.message)]):
            cause = f"the cloud answered `{tag(self.message)}` with `{tag(answer)}`"
        elif (
            isinstance(answer, Accepted)
            and isinstance(self.message, Sample)
            and answer.key != self.message.key
        ):
            cause = f"the cloud answered request {answer.id} with the key {answer.key} of another sample"
        else:
            return
        raise UnknownMessage(cause, "Use an edge and a cloud of the same version")
