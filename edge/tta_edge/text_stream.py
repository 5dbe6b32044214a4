"""A text streamed to a language model: bits per byte of each piece with no context, with all before it absorbed, and
with as much of it in front as the model can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from tta_edge.client import Client
from tta_edge.errors import UnknownSession
from tta_edge.wire import TextInfo
from tta_runtime.errors import BadValue, ContextTooLong, EmptyText
from tta_runtime.manifest_check import BYTES
from tta_runtime.tokens import text_of

SHRINK = 0.8
"""Of a context that was too long, what is tried next: how many tokens a text has only the daemon knows."""


@dataclass(frozen=True)
class Row:
    """One piece of the text.

    Attributes:
        context_bytes: of the text before it.
        bytes: of the piece.
        no_context_bits, stream_bits, full_context_bits: of its scored tokens, under each condition.
        no_context_bytes, stream_bytes, full_context_bytes: that the scored tokens stand for: without anything before it
            the first token of a piece is not scored.
        stream_tokens, full_context_tokens: that were seen before it as they are.
        absorb_ms: that absorbing it took in the daemon.
    """

    context_bytes: int
    bytes: int
    no_context_bits: float
    no_context_bytes: int
    stream_bits: float
    stream_bytes: int
    stream_tokens: int
    full_context_bits: float
    full_context_bytes: int
    full_context_tokens: int
    absorb_ms: float


@dataclass(frozen=True)
class Rates:
    """Bits per byte under each condition, over some rows."""

    no_context_bpb: float
    stream_bpb: float
    full_context_bpb: float

    @property
    def gap_closed(self) -> float | None:
        """Share of what the full context gains that absorbing gains; None where that is nothing."""
        gap = self.no_context_bpb - self.full_context_bpb
        return (self.no_context_bpb - self.stream_bpb) / gap if gap > 0 else None


def rates(rows: Sequence[Row]) -> Rates:
    """Over some rows, each byte counting the same."""
    return Rates(
        sum(row.no_context_bits for row in rows) / sum(row.no_context_bytes for row in rows),
        sum(row.stream_bits for row in rows) / sum(row.stream_bytes for row in rows),
        sum(row.full_context_bits for row in rows) / sum(row.full_context_bytes for row in rows),
    )


def pieces(data: bytes, size: int, limit: int | None = None) -> list[str]:
    """A text in pieces of about so many bytes; no character is cut.

    Args:
        data: UTF-8.
        size: of a piece; its last character may go beyond it.
        limit: only the first so many.

    Raises:
        InvalidUtf8: it is no text.
        BadValue: there is nothing in it.
    """
    text = text_of(data, "the file")
    found: list[str] = []
    start = filled = 0
    for place, character in enumerate(text):
        filled += len(character.encode())
        if filled >= size or place + 1 == len(text):
            found.append(text[start : place + 1])
            start, filled = place + 1, 0
            if len(found) == limit:
                break
    if not found:
        raise BadValue("the file is empty", "Name a file that has a text")
    return found


class TextStreamer:
    """Sends a text to a daemon, piece by piece.

    Args:
        client: connected to the daemon.
        texts: the pieces. A last one too short to be scored is joined to the one before.
        session: the daemon's session to use; it is reset first.
        bundle: which of the daemon's; empty for its first.

    Attributes:
        info: what the daemon said that it serves.

    Raises:
        BadValue: the bundle is not for text, or cannot score pieces as short as these.
        ClientError: the daemon cannot be reached.
    """

    def __init__(self, client: Client, texts: Sequence[str], *, session: str, bundle: str = "") -> None:
        self._client, self._session, self._bundle = client, session, bundle
        self.info = client.info(bundle)
        if self.info.text is None:
            raise BadValue(
                f"`{self.info.model_id}` is not a language model",
                "Stream images to it, or serve a bundle for text",
            )
        self._context = self.info.text.context
        self._tokens_per_byte = 1.0
        self._texts = self._scorable(texts, self.info.text)

    def run(self) -> Iterator[Row]:
        """One row after the other.

        Raises:
            ClientError, ServiceError: the daemon cannot be reached, or refuses.
            InputError: a piece is longer than the model sees at once.
        """
        client, session, bundle = self._client, self._session, self._bundle
        with suppress(UnknownSession):
            client.reset(session, bundle)
        before = ""
        for text in self._texts:
            alone = client.score(text, "", bundle)
            streamed = client.score(text, session, bundle) if before else alone
            full, seen = self._full(text, before)
            done = client.absorb(text, session, bundle)
            yield Row(
                context_bytes=len(before.encode()),
                bytes=len(text.encode()),
                no_context_bits=alone.bits,
                no_context_bytes=alone.bytes,
                stream_bits=streamed.bits,
                stream_bytes=streamed.bytes,
                stream_tokens=streamed.before,
                full_context_bits=full[0],
                full_context_bytes=full[1],
                full_context_tokens=seen,
                absorb_ms=done.compute_ms,
            )
            before += text

    def _scorable(self, texts: Sequence[str], facts: TextInfo) -> Sequence[str]:
        """The pieces so that each can be scored alone, as far as that is known before they are sent."""
        least = 1 if facts.begins else 2
        if facts.tokenizer == BYTES and any(len(text.encode()) < least for text in texts[:-1]):
            raise BadValue(
                f"a piece has 1 byte, and `{self.info.model_id}` scores no single token that nothing stands before",
                f"Set --piece-bytes to {least} or more",
            )
        if len(texts) < 2 or (facts.tokenizer == BYTES and len(texts[-1].encode()) >= least):
            return texts
        try:
            self._client.score(texts[-1], "", self._bundle)
        except EmptyText:
            return [*texts[:-2], texts[-2] + texts[-1]]
        return texts

    def _full(self, text: str, before: str) -> tuple[tuple[float, int], int]:
        """Bits and bytes of a piece behind as much of the text before it as fits, and how many tokens that is."""
        room = max(0.0, self._context - 1 - len(text.encode()) * self._tokens_per_byte)
        size = int(room / self._tokens_per_byte)
        while True:
            tail = (
                before.encode()[max(0, len(before.encode()) - size) :].decode("utf-8", "ignore")
                if size
                else ""
            )
            try:
                found = self._client.score(text, "", self._bundle, context=tail or None)
            except ContextTooLong:
                if not tail:
                    raise
                size = int(size * SHRINK)
                continue
            if tail:
                self._tokens_per_byte = max(0.05, found.before / len(tail.encode()))
            return (found.bits, found.bytes), found.before


def to_json(rows: Sequence[Row], **facts: object) -> dict[str, Any]:
    """The machine-readable form of a streamed text."""
    table = [{**asdict(row), **asdict(rates([row]))} for row in rows]
    total = rates(rows) if rows else None
    mean = None if total is None else {**asdict(total), "gap_closed": total.gap_closed}
    return {**facts, "rows": table, "mean": mean}
