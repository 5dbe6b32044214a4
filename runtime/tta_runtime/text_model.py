"""A language model that absorbs its context: score, generate, absorb; engines once, a small state for each session.

    model = TextModel.open("lm.bundle")
    session = model.session()
    session.absorb(model.tokenizer.encode(manual))      # theta' and state' of fixed size, no gradients
    session.score(tokens).bits

A session is theta, the mapper's state, and the *pending* tokens that do not fill a chunk yet. What `score` and
`generate` see before their own tokens is the *live context*: the bundle's `begin` token and the pending ones. Its cache
is always made in one go from these, never grown bit by bit, so a session that was saved and loaded answers with the
same bits as one that stayed in memory.

Everything long is a generator that stops between two runs of an engine (`scoring`, `generating`, `absorbing`), so that
a daemon can serve others meanwhile; `score`, `generate` and `absorb` run them to their end.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import state_file, theta
from .arrays import frozen, is_finite, owned
from .engine import Engine, EngineOptions
from .errors import (
    AbsorbUnsupported,
    BadSampling,
    ContextTooLong,
    EmptyText,
    NonFiniteLogits,
    NonFiniteState,
    StaleBase,
    StateMalformed,
    StateOfOtherBundle,
    StateOfOtherTokenizer,
    UnknownToken,
)
from .held import host
from .manifest import Manifest, MethodSpec, TextSpec
from .manifest_check import expect_text
from .model import Checkpoint, Engines, Vector, check_output, method_of
from .sampling import GREEDY, Sampling, bits, draw, surprise_nats
from .tokens import Tokenizer, tokenizer_of

PASS_TOKENS = 256
"""Tokens in one run of the engine: bounds the memory of its logits and how long others wait."""

MOST_ABSORBED = 2**53 - 1
"""Tokens of one session: a number that every language holds exactly."""

Tokens = Sequence[int] | NDArray[np.int64]
Ending = Literal["end", "max-tokens", "context"]
"""Why a text ended: the model's end token, as many tokens as were asked for, no more room in the context."""
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Score:
    """How well a text was predicted.

    Attributes:
        nats: [scored tokens], -ln p of each; the first token of a text that nothing precedes is not scored.
        skipped: tokens that were not scored, 0 or 1.
    """

    nats: NDArray[np.float64]
    skipped: int

    @property
    def bits(self) -> float:
        """Of all scored tokens together."""
        return bits(float(self.nats.sum()))


@dataclass(frozen=True)
class Absorbed:
    """What a session is after it has absorbed a text.

    Attributes:
        tokens: absorbed so far, the pending ones included.
        pending: of them, those that wait for a chunk to fill.
        chunks: absorbed so far.
        report: named numbers of the last chunk; empty where none was filled.
    """

    tokens: int
    pending: int
    chunks: int
    report: Mapping[str, float]


class _Notes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a session's state file says beside theta and state."""

    bundle: str
    tokenizer: str
    pending: list[int]
    notes: str = ""


@dataclass(frozen=True, eq=False)
class _Now:
    """What flips as one."""

    checkpoint: Checkpoint
    pending: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What has been seen of a text: the cache [layers, 2, 1, kv_heads, length, head_width], and the logits for what
    comes next, [vocabulary]; these have no element where nothing was seen.
    """

    cache: NDArray[np.float32]
    next: NDArray[np.float32]

    @property
    def length(self) -> int:
        return int(self.cache.shape[4])


class TextModel:
    """A text bundle's engines and tokenizer, for any number of sessions. Stateless, safe for several threads.

    Args:
        engines: from `Engines.load(..., task="text")`.
        method: name; None: the manifest's default.

    Raises:
        WrongTask: the bundle is for images.
        UnknownMethod: no such method, or its graphs are not loaded.
        TokenizerRefused, EngineMissing: the bundle's tokenizer cannot be used.
    """

    def __init__(self, engines: Engines, method: str | None = None) -> None:
        bundle = engines.bundle
        self.text: TextSpec = expect_text(bundle.manifest)
        self.engines = engines
        self.manifest: Manifest = bundle.manifest
        self.method: str = self.manifest.default_method if method is None else method
        self.spec: MethodSpec = method_of(self.manifest.methods, self.method, engines.methods)
        self.tokenizer: Tokenizer = tokenizer_of(bundle)
        self.theta0: Vector = bundle.theta0
        self._forward = engines[self.spec.serve]
        self._absorb = None if self.spec.step is None else engines[self.spec.step]
        zeros = {s.name: frozen(np.zeros(s.shape, dtype=s.dtype)) for s in self.spec.state}
        self.source = Checkpoint(self.theta0, MappingProxyType(zeros), 0, 0)
        """What a new session starts from; its arrays are shared by all."""

    @classmethod
    def open(
        cls, path: Path | str, *, method: str | None = None, options: EngineOptions | None = None
    ) -> TextModel:
        """A model from a bundle's path.

        Raises:
            TtaError: what `Bundle.open`, `Engines.load` and `TextModel` raise.
        """
        engines = Engines.load(
            path, methods=None if method is None else [method], options=options, task="text"
        )
        return cls(engines, method)

    def session(self) -> TextSession:
        """A new one, at the source."""
        return TextSession(self)

    # -------------------------------------------------------------------------------- sizes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of one token."""
        return 4 * int(np.prod(self.text.cache))

    @property
    def session_bytes(self) -> int:
        """The most memory that one session takes: theta, state, and the cache of its live context."""
        kept = 4 * (self.manifest.theta.size + self.manifest.classes) + self.text.chunk * self.cache_bytes
        return kept + sum(array.nbytes for array in self.source.state.values())

    @property
    def max_state_bytes(self) -> int:
        """The largest size that a session's state file can have."""
        return state_file.max_bytes(self.manifest, self.spec.state)

    # -------------------------------------------------------------------------------- the graphs

    def check_tokens(self, tokens: Tokens) -> tuple[int, ...]:
        """The tokens, if the model knows them all.

        Raises:
            UnknownToken: one is outside of the vocabulary.
        """
        known = self.manifest.classes
        for place, token in enumerate(tokens):
            if not 0 <= token < known:
                raise UnknownToken(
                    f"token {place} is {token}, the vocabulary is 0 to {known - 1}",
                    "Use the bundle's tokenizer",
                )
        return tuple(int(token) for token in tokens)

    def nothing(self) -> _Seen:
        """What has been seen before the first token."""
        layers, two, heads, width = self.text.cache
        return _Seen(np.zeros((layers, two, 1, heads, 0, width), np.float32), np.zeros(0, np.float32))

    def look(self, tokens: Sequence[int], vector: Vector, seen: _Seen) -> tuple[NDArray[np.float32], _Seen]:
        """One run: logits [tokens, vocabulary] for what follows each token, and what has been seen then.

        Raises:
            EngineFailed, NonFiniteLogits: the engine failed, or the model did.
        """
        x = np.array([tokens], dtype=np.int64)
        outputs = _run(self._forward, {"x": x, "theta": vector, "cache": seen.cache})
        logits: NDArray[np.float32] = outputs["logits"][0]
        if not is_finite(logits):
            raise NonFiniteLogits(
                f"the logits after {seen.length + len(tokens)} tokens hold NaN or Inf",
                "Reset the session; if a new one does it as well, build the bundle again",
            )
        return logits, _Seen(outputs["cache"], logits[-1])

    def absorber(self) -> Engine:
        """The engine that absorbs.

        Raises:
            AbsorbUnsupported: the method has none.
        """
        if self._absorb is None:
            able = [name for name, spec in self.manifest.methods.items() if spec.step is not None]
            raise AbsorbUnsupported(
                f"method `{self.method}` absorbs nothing",
                f"Serve the bundle with {' or '.join(able) or 'a method that has an absorb graph'}",
            )
        return self._absorb

    def absorb_chunk(
        self, tokens: Sequence[int], before: Checkpoint
    ) -> tuple[Checkpoint, Mapping[str, float]]:
        """Theta and state after one more chunk, and the report.

        Args:
            tokens: exactly `text.chunk`.
            before: its state is what the chunk is folded into.

        Raises:
            AbsorbUnsupported: the method has no absorb graph.
            EngineFailed: the engine failed.
            NonFiniteTheta, NonFiniteState: NaN or Inf came out.
        """
        x = np.array([tokens], dtype=np.int64)
        outputs = _run(self.absorber(), {"x": x, **{f"state {k}": v for k, v in before.state.items()}})
        vector = frozen(theta.check(self.manifest.theta, outputs["theta"]))
        state = {s.name: frozen(outputs[f"state {s.name}"]) for s in self.spec.state}
        for name, value in state.items():
            if not is_finite(value):
                raise NonFiniteState(
                    f"state `{name}` holds values that are not finite", "Keep the state before"
                )
        report = outputs.get("report", np.zeros(0, np.float32)).tolist()
        after = Checkpoint(vector, MappingProxyType(state), before.steps + 1, before.seed)
        return after, dict(zip(self.spec.report, report, strict=True))


class TextSession:
    """What one conversation or document has become: theta, state, pending tokens. One writer, like `Model`.

    Args:
        model: whose engines answer.
    """

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self._now = _Now(model.source, ())
        self._live: tuple[_Now, _Seen] | None = None
        self._digest: tuple[Checkpoint, str] | None = None

    # -------------------------------------------------------------------------------- what it is now

    @property
    def checkpoint(self) -> Checkpoint:
        """Theta, state and the number of absorbed chunks (`steps`)."""
        return self._now.checkpoint

    @property
    def pending(self) -> tuple[int, ...]:
        """Absorbed tokens that do not fill a chunk yet."""
        return self._now.pending

    @property
    def snapshot(self) -> tuple[Checkpoint, tuple[int, ...]]:
        """Checkpoint and pending tokens of one moment; for any thread."""
        now = self._now
        return now.checkpoint, now.pending

    @property
    def live(self) -> int:
        """Tokens of the live context: `begin` and the pending ones."""
        return len(self.pending) + (self.model.text.begin is not None)

    @property
    def absorbed(self) -> int:
        """Tokens absorbed so far, the pending ones included."""
        return self._now.checkpoint.steps * self.model.text.chunk + len(self._now.pending)

    @property
    def digest(self) -> str:
        """Digest of theta; computed once for each."""
        now, known = self.checkpoint, self._digest
        if known is None or known[0] is not now:
            known = self._digest = now, theta.digest(self.model.manifest.theta, now.theta)
        return known[1]

    # -------------------------------------------------------------------------------- score

    def score(self, tokens: Tokens, context: Tokens = ()) -> Score:
        """How well a text is predicted; changes nothing.

        Args:
            tokens: of the text.
            context: tokens that the model sees before it, and that are not scored.

        Raises:
            EmptyText: nothing is left to score.
            UnknownToken, ContextTooLong: the text is refused.
            EngineError: the model failed.
        """
        return finish(self.scoring(tokens, context))

    def scoring(self, tokens: Tokens, context: Tokens = ()) -> Generator[None, None, Score]:
        """`score`, stopping between two runs of the engine."""
        text, before = self.model.check_tokens(tokens), self.model.check_tokens(context)
        everything = (*before, *text)
        if len(text) < (1 if before or self.live else 2):
            raise EmptyText(
                f"the text has {len(text)} tokens and nothing stands before it: there is none to score",
                "Send a longer text",
            )
        self._check_room(len(everything), "the text", len(everything) - 1)
        vector = self.checkpoint.theta
        seen = yield from self._look_live()
        nats: list[NDArray[np.float64]] = []
        if seen.next.size:
            nats.append(surprise_nats(seen.next[None], np.array(everything[:1])))
        for first in range(0, len(everything) - 1, PASS_TOKENS):
            yield
            part = everything[first : min(first + PASS_TOKENS, len(everything) - 1)]
            logits, seen = self.model.look(part, vector, seen)
            nats.append(surprise_nats(logits, np.array(everything[first + 1 : first + 1 + len(part)])))
        all_nats = np.concatenate(nats)
        scored = all_nats[max(0, len(all_nats) - len(text)) :]
        return Score(scored, len(text) - len(scored))

    # -------------------------------------------------------------------------------- generate

    def generate(
        self, tokens: Tokens, *, max_tokens: int = 64, sampling: Sampling = GREEDY
    ) -> Generator[int, None, Ending]:
        """Tokens that follow a prompt, one after the other; changes nothing.

        Args:
            tokens: of the prompt; may be empty where something stands before it.
            max_tokens: at most so many.
            sampling: how they are drawn.

        Returns:
            As the generator's value, why it ended.

        Raises:
            EmptyText: there is nothing to go on from.
            UnknownToken, ContextTooLong: the prompt is refused.
            EngineError: the model failed.
        """
        steps = self.generating(tokens, max_tokens=max_tokens, sampling=sampling)
        while True:
            try:
                token = next(steps)
            except StopIteration as stop:
                ending: Ending = stop.value
                return ending
            if token is not None:
                yield token

    def generating(
        self, tokens: Tokens, *, max_tokens: int = 64, sampling: Sampling = GREEDY
    ) -> Generator[int | None, None, Ending]:
        """`generate`, stopping between two runs of the engine: with None where no token has come."""
        if max_tokens < 1:
            raise BadSampling(f"max_tokens is {max_tokens}", "Ask for 1 token or more")
        prompt = self.model.check_tokens(tokens)
        if not prompt and not self.live:
            raise EmptyText("the prompt is empty and nothing stands before it", "Send a prompt")
        self._check_room(len(prompt), "the prompt", len(prompt))
        vector = self.checkpoint.theta
        seen = yield from self._look_live()
        for first in range(0, len(prompt), PASS_TOKENS):
            yield None
            _, seen = self.model.look(prompt[first : first + PASS_TOKENS], vector, seen)
        for position in range(max_tokens):
            token = draw(seen.next, sampling, position)
            if token == self.model.text.end:
                return "end"
            yield token
            if position + 1 < max_tokens:
                if seen.length >= self.model.text.context:
                    return "context"
                _, seen = self.model.look((token,), vector, seen)
        return "max-tokens"

    # -------------------------------------------------------------------------------- absorb

    def absorb(self, tokens: Tokens) -> Absorbed:
        """Take a text in: whole chunks become theta, the rest waits.

        Raises:
            EmptyText, UnknownToken: the text is refused.
            AbsorbUnsupported: the method absorbs nothing.
            StateMalformed: the session came from a file that claims so many tokens that there is no room for these.
            NonFiniteTheta, NonFiniteState, EngineError: the model failed. By any refusal nothing is changed.
        """
        return finish(self.absorbing(tokens))

    def absorbing(self, tokens: Tokens) -> Generator[None, None, Absorbed]:
        """`absorb`, stopping between two runs of the engine. All of the text is taken in at the end, or nothing."""
        started = self._now
        self.model.absorber()  # refused at once: tokens would wait for ever
        chunk = self.model.text.chunk
        # Four bytes a token, for as long as the text is read; Python's own numbers would take several times as many.
        waiting = array("i", started.pending)
        waiting.extend(self.model.check_tokens(tokens))
        if len(waiting) == len(started.pending):
            raise EmptyText("the text is empty", "Send a text")
        self._check_count(started.checkpoint.steps, len(waiting))
        whole = len(waiting) - len(waiting) % chunk
        after, report = started.checkpoint, dict[str, float]()
        for first in range(0, whole, chunk):
            after, told = self.model.absorb_chunk(waiting[first : first + chunk], after)
            report = dict(told)
            if first + chunk < whole:
                yield
        if self._now is not started:
            raise StaleBase(
                f"the session went on from {started.checkpoint.steps} chunks to {self.checkpoint.steps} meanwhile",
                "Absorb the text again",
            )
        self._become(_Now(after, tuple(waiting[whole:])))
        return Absorbed(self.absorbed, len(self.pending), after.steps, report)

    def reset(self) -> None:
        """Back to the source: nothing absorbed."""
        self._become(_Now(self.model.source, ()))

    def _become(self, now: _Now) -> None:
        self._now = now
        self._live = self._digest = None  # they would keep the checkpoint before in memory

    # -------------------------------------------------------------------------------- files

    def notes(self, notes: str = "") -> str:
        """What is saved beside the checkpoint: whose session it is, and its pending tokens."""
        bundle, tokenizer = self.model.engines.bundle.digest, self.model.tokenizer.digest
        return msgspec.json.encode(_Notes(bundle, tokenizer, list(self.pending), notes)).decode()

    def encode(self, checkpoint: Checkpoint, *, generation: int = 0, notes: str | None = None) -> bytes:
        """The bytes of a state file.

        Args:
            checkpoint: of this session.
            generation: grows with every save of the same session.
            notes: from `notes`, of the same moment as the checkpoint; None: of now.
        """
        saved = state_file.Saved(
            checkpoint.theta, checkpoint.state, self.model.method, {}, checkpoint.steps, checkpoint.seed,
            generation, self.notes() if notes is None else notes,
        )  # fmt: skip
        return state_file.encode(self.model.manifest, saved)

    def decode(self, data: bytes) -> tuple[Checkpoint, int, str]:
        """Checkpoint, generation and notes from the bytes of a state file; `resume` goes on from them.

        Raises:
            StateOfOtherTokenizer, StateOfOtherBundle: it was saved by another model.
            StateError: the subclass that names why else it is refused.
        """
        saved = state_file.decode(data, self.model.manifest, self.model.method)
        self._check_count(saved.steps, len(self._notes_of(saved.notes).pending))
        state = MappingProxyType({name: owned(array) for name, array in saved.state.items()})
        return Checkpoint(owned(saved.theta), state, saved.steps, saved.seed), saved.generation, saved.notes

    @property
    def max_state_bytes(self) -> int:
        """The largest size that a state file of this session can have."""
        return self.model.max_state_bytes

    def resume(self, checkpoint: Checkpoint, notes: str) -> None:
        """Go on from what `decode` gave.

        Raises:
            StateError: the notes are not of this model.
        """
        self._become(_Now(checkpoint, tuple(self._notes_of(notes).pending)))

    # -------------------------------------------------------------------------------- inside

    def _notes_of(self, text: str) -> _Notes:
        fix = "Start a new session"
        try:
            notes = msgspec.json.decode(text, type=_Notes)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise StateMalformed(f"the notes are not those of a session: {error}", fix) from error
        bundle, tokenizer = self.model.engines.bundle.digest, self.model.tokenizer.digest
        # First of the two: a bundle with another tokenizer is another bundle as well.
        if notes.tokenizer != tokenizer:
            raise StateOfOtherTokenizer(
                f"the session was saved with the tokenizer {notes.tokenizer[:12]}, this bundle's is {tokenizer[:12]}",
                "Use it with its own bundle, or absorb the text again",
            )
        if notes.bundle != bundle:
            raise StateOfOtherBundle(
                f"the session was saved with the bundle {notes.bundle[:12]}, this is {bundle[:12]}",
                "Use it with its own bundle, or absorb the text again",
            )
        chunk, known = self.model.text.chunk, self.model.manifest.classes
        if len(notes.pending) >= chunk or not all(0 <= token < known for token in notes.pending):
            raise StateMalformed(
                f"the session has {len(notes.pending)} pending tokens, expected fewer than {chunk} below {known}",
                fix,
            )
        return notes

    def _check_count(self, chunks: int, others: int) -> None:
        """Refuse a file, or a text, after which the session would have absorbed more than can be told of."""
        absorbed = chunks * self.model.text.chunk + others
        if absorbed > MOST_ABSORBED:
            raise StateMalformed(
                f"with {chunks} chunks the session would have absorbed {absorbed} tokens, at most {MOST_ABSORBED}",
                "Start a new session",
            )

    def _check_room(self, length: int, what: str, fed: int) -> None:
        live, room = self.live, self.model.text.context
        if live + fed > room:
            raise ContextTooLong(
                f"{what} has {length} tokens, with {live} of live context before it that is more than the {room} "
                "that the model sees",
                "Absorb it, or the first part of it, or send less at once",
            )

    def _look_live(self) -> Generator[None, None, _Seen]:
        """The live context, looked at once for each state of the session."""
        now = self._now
        if self._live is not None and self._live[0] is now:
            return self._live[1]
        begin = self.model.text.begin
        tokens = (*(() if begin is None else (begin,)), *now.pending)
        seen = self.model.nothing()
        for first in range(0, len(tokens), PASS_TOKENS):
            if first:
                yield
            _, seen = self.model.look(tokens[first : first + PASS_TOKENS], now.checkpoint.theta, seen)
        self._live = now, seen
        return seen


def finish(steps: Iterator[Any] | Generator[Any, None, R]) -> R:
    """Run a generator to its end; gives its value."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: R = stop.value
            return value


def _run(engine: Engine, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Outputs by what they are bound to ("logits", "theta", "cache", "report", "state NAME"), from inputs likewise."""
    held = engine.run({port.name: values[_bound(port.bind, port.key)] for port in engine.spec.inputs})
    outputs = {name: host(value) for name, value in held.items()}
    for port in engine.spec.outputs:
        check_output(port, outputs[port.name], 1)
    return {_bound(port.bind, port.key): outputs[port.name] for port in engine.spec.outputs}


def _bound(bind: str, key: str) -> str:
    return "x" if bind == "batch" else f"{bind} {key}".strip()
