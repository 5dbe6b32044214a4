"""Requests to language models: each is a chain of runs of an engine, and others are served between two of them.

A request is a generator. After each of its runs it goes to the end of the queue of the answering thread, so a text of
a thousand tokens costs whoever comes meanwhile one run of waiting, not a thousand. Requests to one session are answered
one after the other, in the order in which they came.

What has changed is kept at the end of a request, all of it or nothing.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_edge.batching import Call
from tta_edge.config import Config
from tta_edge.errors import Cancelled, Internal, SessionExists
from tta_edge.events import Event, Reason, Tell
from tta_edge.hosting import Host, pass_bytes
from tta_edge.session import Arrived, Emit, Refuse
from tta_edge.sessions import AllInUse, HeldSession, Sessions, language_model
from tta_edge.stats import Stats
from tta_edge.store import Key
from tta_edge.wire import (
    Absorb,
    AbsorbDone,
    Cancel,
    CancelDone,
    Export,
    ExportDone,
    Generate,
    Generated,
    GenerateDone,
    Import,
    ImportDone,
    Reply,
    Reset,
    ResetDone,
    Score,
    ScoreDone,
    SessionStatus,
    Tensors,
    declare,
    tag,
)
from tta_runtime.errors import (
    BadField,
    EngineError,
    NonFiniteState,
    NonFiniteTheta,
    TooLarge,
    TtaError,
    WrongDtype,
    WrongShape,
)
from tta_runtime.manifest_check import expect_task
from tta_runtime.sampling import Sampling
from tta_runtime.text_model import Ending, TextSession
from tta_runtime.tokens import text_of

log = logging.getLogger(__name__)

READ_BYTES = 12
"""Memory for each byte of a text while it is absorbed: as it came, as a str, and its token twice."""
Answer = tuple[Reply, Tensors]
Steps = Generator["Turn | None", None, Answer]
"""After each run None, or the turn that the request waits for."""


@dataclass(eq=False)
class Task:
    """A request under way.

    Attributes:
        arrived: the request.
        steps: what is left of it.
        line: the session whose requests wait for each other; None: it uses none.
        host: whose model it uses.
        stop: why it shall go on no further.
    """

    arrived: Arrived
    steps: Steps
    line: Key | None
    host: Host
    stop: TtaError | None = None


@dataclass(eq=False)
class Turn:
    """A request's place in the queue for memory.

    Attributes:
        task: the request while it sleeps.
    """

    task: Task | None = None


class Texts:
    """Answers requests to language models. For one thread, but for `status`.

    Args:
        config: of the daemon.
        sessions: in memory and on disk.
        stats: counts.
        tell: told of resets and of what was refused.
        call: has something done by this thread after what waits now.
        finish: takes the reply to a request.
        refuse: takes the error that a request is answered with.
        emit: takes a part of a reply.
        waited_for: whether somebody still waits for the answer.
        clock: seconds.
    """

    def __init__(
        self,
        config: Config,
        sessions: Sessions,
        stats: Stats,
        *,
        tell: Tell,
        call: Callable[[Call], None],
        finish: Emit,
        refuse: Refuse,
        emit: Emit,
        waited_for: Callable[[Arrived], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._sessions = sessions
        self._stats = stats
        self._tell = tell
        self._call = call
        self._finish = finish
        self._refuse = refuse
        self._emit = emit
        self._waited_for = waited_for
        self._clock = clock
        self._tasks: dict[tuple[bytes, int], Task] = {}
        self._lines: dict[Key, deque[Task]] = {}
        self._turns: deque[Turn] = deque()
        self._sources: dict[str, HeldSession] = {}
        self._closed = False

    # ------------------------------------------------------------------------------------------ requests

    def take(self, arrived: Arrived, host: Host) -> None:
        """Begin a request of one bundle; whatever goes wrong becomes an error reply.

        Raises:
            WrongTask: the bundle is for images.
        """
        expect_task(host.engines.bundle.manifest, "text")
        message: Any = arrived.message
        name = message.stream if isinstance(message, Reset) else message.session
        line = (host.name, name) if name else None
        task = Task(arrived, self._steps(arrived, host), line, host)
        self._tasks[arrived.key] = task
        if line is not None and line in self._lines:
            self._lines[line].append(task)
            return
        if line is not None:
            self._lines[line] = deque()
        self._advance(task)

    def cancel(self, arrived: Arrived, message: Cancel) -> CancelDone:
        """Stop another request of the same client before its next run."""
        task = self._tasks.get((arrived.peer, message.request))
        if task is not None:
            cause = f"request {message.request} was cancelled by its client"
            self._stop(task, Cancelled(cause, "Nothing has changed"))
        return CancelDone(id=message.id, found=task is not None)

    def swap(self, host: Host) -> tuple[int, int]:
        """Go on with a new version of a bundle; see `Sessions.swap`. What is under way with the old one ends."""
        for task in self._tasks.values():
            if task.host.name == host.name and task.host.text is not host.text:
                cause = f"bundle `{host.name}` was reloaded meanwhile"
                self._stop(task, Cancelled(cause, "Repeat the request"))
        self._sources.pop(host.name, None)  # it would keep the old model and its engines in memory
        try:
            return self._sessions.swap(host)
        finally:
            self._freed()

    def close(self) -> None:
        """Go on with nothing, and save what the disk does not hold yet."""
        self._closed = True
        self._sessions.save_all()

    def status(self) -> list[SessionStatus]:
        """The sessions in memory; for any thread."""
        return [_status(session, self._sessions) for session in self._sessions.all()]

    # ------------------------------------------------------------------------------------------ run after run

    def _advance(self, task: Task) -> None:
        """One run of a request, then the next one after what waits now."""
        if self._closed:
            return  # the process ends
        if task.stop is None and not self._waited_for(task.arrived):
            task.stop = Cancelled("the client has gone", "")
        try:
            if task.stop is not None:
                task.steps.close()
                raise task.stop
            turn = next(task.steps)
        except StopIteration as stop:
            self._finish(task.arrived, *stop.value)
        except TtaError as error:
            if reason := _reason(error):
                self._tell(Event(*(task.line or (task.host.name, "")), "refuse", reason, error.cause))
            self._refuse(task.arrived, error)
        except Exception as error:
            log.exception("a defect while answering `%s`", tag(task.arrived.message))
            cause = f"the daemon failed with {type(error).__name__}"
            self._refuse(task.arrived, Internal(cause, "Report it with the daemon's log"))
        else:
            if turn is None:
                self._call(partial(self._advance, task))
            else:
                turn.task = task
            return
        self._ended(task)

    def _stop(self, task: Task, error: TtaError) -> None:
        """Let a request go on no further; one that sleeps has to wake for that."""
        task.stop = error
        for turn in self._turns:
            if turn.task is task:
                self._wake(turn)

    def _freed(self) -> None:
        """There may be memory for whoever waits for it the longest; and whoever has gone waits for nothing."""
        for place, turn in enumerate(self._turns):
            if turn.task is not None and (place == 0 or not self._waited_for(turn.task.arrived)):
                self._wake(turn)

    def _wake(self, turn: Turn) -> None:
        task, turn.task = turn.task, None
        if task is not None:
            self._call(partial(self._advance, task))

    def _ended(self, task: Task) -> None:
        del self._tasks[task.arrived.key]
        if task.line is None:
            return
        waiting = self._lines[task.line]
        if waiting:
            self._call(partial(self._advance, waiting.popleft()))
        else:
            del self._lines[task.line]

    def _steps(self, arrived: Arrived, host: Host) -> Steps:
        message, tensors = arrived.message, arrived.tensors
        if isinstance(message, Score):
            return self._score(message, tensors, host)
        if isinstance(message, Generate):
            return self._generate(message, arrived, host)
        if isinstance(message, Absorb):
            return self._absorb(message, tensors, host)
        if isinstance(message, Export):
            return self._export(message, host)
        if isinstance(message, Import):
            return self._import(message, tensors, host)
        if isinstance(message, Reset):
            return self._reset(message, host)
        raise TypeError(f"no request for a language model: {tag(message)}")

    # ------------------------------------------------------------------------------------------ kinds of requests

    def _score(self, message: Score, tensors: Tensors, host: Host) -> Steps:
        began_s = self._clock()
        model = language_model(host)
        text = self._text(tensors["text"], "the text")
        tokens = model.tokenizer.encode(text)
        context = (
            model.tokenizer.encode(self._text(tensors["context"], "the context")) if message.context else []
        )
        place = yield from self._enter(host, message.session, len(context) + len(tokens))
        with closing(place):
            session = place.held.model
            before = len(context) + session.live
            score = yield from session.scoring(tokens, context)
        self._stats.read(host.name, "scored", len(score.nats))
        nats = score.nats.astype(np.float32)
        skipped = model.tokenizer.head_bytes(text) if score.skipped else 0
        reply = ScoreDone(
            id=message.id,
            bits=score.bits,
            bytes=len(text.encode()) - skipped,
            skipped=score.skipped,
            before=before,
            compute_ms=(self._clock() - began_s) * 1e3,
            nats=declare(nats),
        )
        return reply, {"nats": nats}

    def _generate(self, message: Generate, arrived: Arrived, host: Host) -> Steps:
        began_s = self._clock()
        model = language_model(host)
        prompt = model.tokenizer.encode(self._text(arrived.tensors["prompt"], "the prompt"))
        if message.absorb and not message.session:
            raise BadField("message `generate`: absorb is true and no session is named", "Name a session")
        if message.absorb:
            model.absorber()  # before anything is generated that could not be kept
        sampling = Sampling(message.temperature, message.top_k, message.top_p, message.seed)
        place = yield from self._enter(host, message.session, len(prompt) + message.max_tokens)
        with closing(place):
            text, tokens, reason = yield from self._write(
                message, arrived, host.name, place.held.model, prompt, sampling
            )
            durable = False
            if message.absorb and (prompt or tokens):
                yield None
                yield from place.held.model.absorbing([*prompt, *tokens])
                durable = self._sessions.admit(place.held)
                self._stats.read(host.name, "absorbed", len(prompt) + len(tokens))
            elif message.absorb:
                durable = self._sessions.durable(place.held)
        data = _bytes(text.encode())
        reply = GenerateDone(
            id=message.id,
            reason=reason,
            tokens=len(tokens),
            prompt_tokens=len(prompt),
            compute_ms=(self._clock() - began_s) * 1e3,
            absorbed=message.absorb,
            durable=durable,
            text=declare(data),
        )
        return reply, {"text": data}

    def _write(
        self,
        message: Generate,
        arrived: Arrived,
        bundle: str,
        session: TextSession,
        prompt: list[int],
        sampling: Sampling,
    ) -> Generator[None, None, tuple[str, list[int], Ending]]:
        """Generate and send, token by token: the text, its tokens, and why it ended."""
        decoder = session.model.tokenizer.decoder()
        steps = session.generating(prompt, max_tokens=message.max_tokens, sampling=sampling)
        tokens: list[int] = []
        parts: list[str] = []
        sent = 0

        def send(part: str) -> None:
            nonlocal sent
            if part:
                self._emit(arrived, Generated(id=message.id, start=sent, tokens=len(tokens), text=part), {})
                parts.append(part)
                sent += len(part.encode())

        while True:
            run_s = self._clock()
            try:
                token = next(steps)
            except StopIteration as stop:
                ending: Ending = stop.value
                break
            if token is not None:
                now_s = self._clock()
                first_s = None if tokens else now_s - arrived.at_s
                self._stats.generated(bundle, compute_s=now_s - run_s, first_s=first_s)
                tokens.append(token)
                send(decoder.push(token))
            yield
        send(decoder.end())
        return "".join(parts), tokens, ending

    def _absorb(self, message: Absorb, tensors: Tensors, host: Host) -> Steps:
        began_s = self._clock()
        model = language_model(host)
        text = self._text(tensors["text"], "the text")
        read_bytes = READ_BYTES * tensors["text"].size
        place = yield from self._enter(host, message.session, begins=True, held_bytes=read_bytes)
        with closing(place):
            held = place.held
            tokens = array("i", model.tokenizer.encode(text))
            del text
            told = yield from held.model.absorbing(tokens)
            durable = self._sessions.admit(held)
        self._stats.read(host.name, "absorbed", len(tokens))
        reply = AbsorbDone(
            id=message.id,
            session=message.session,
            tokens=len(tokens),
            absorbed=told.tokens,
            pending=told.pending,
            chunks=told.chunks,
            theta_digest=held.model.digest,
            report=dict(told.report),
            durable=durable,
            compute_ms=(self._clock() - began_s) * 1e3,
        )
        return reply, {}

    def _export(self, message: Export, host: Host) -> Steps:
        place = yield from self._enter(host, message.session)
        held = place.held
        place.close()
        data = _bytes(held.model.encode(held.model.checkpoint))
        reply = ExportDone(
            id=message.id,
            session=message.session,
            absorbed=held.model.absorbed,
            theta_digest=held.model.digest,
            data=declare(data),
        )
        return reply, {"data": data}

    def _import(self, message: Import, tensors: Tensors, host: Host) -> Steps:
        limit = language_model(host).max_state_bytes
        data = _flat(tensors["data"], "the file", limit, "It is no session of this bundle")
        place = yield from self._enter(host, message.session, begins=True)
        with closing(place):
            held = place.held
            if not self._sessions.is_new(held):
                raise SessionExists(
                    f"there is a session `{message.session}` of bundle `{host.name}` already",
                    "Choose another name, or reset that one first",
                )
            checkpoint, _, notes = held.model.decode(bytes(data))
            held.model.resume(checkpoint, notes)
            held.restored = "import"
            durable = self._sessions.admit(held)
        reply = ImportDone(
            id=message.id,
            session=message.session,
            absorbed=held.model.absorbed,
            theta_digest=held.model.digest,
            durable=durable,
        )
        return reply, {}

    def _reset(self, message: Reset, host: Host) -> Steps:
        place = yield from self._enter(host, message.stream)
        held = place.held
        place.close()
        absorbed = held.model.absorbed
        durable = self._sessions.end(held)
        self._tell(Event(*held.key, "reset", Reason.REQUESTED.value, f"{absorbed} tokens are forgotten"))
        digest = held.model.digest
        return ResetDone(id=message.id, stream=message.stream, theta_digest=digest, durable=durable), {}

    # ------------------------------------------------------------------------------------------ inside

    def _named(self, host: Host, name: str, at_most: int) -> HeldSession:
        """The session of a name; for an empty one the source, which nobody changes."""
        if name:
            return self._sessions.find(host, name, at_most)
        if host.name not in self._sources:
            self._sources[host.name] = HeldSession((host.name, ""), language_model(host))
        return self._sources[host.name]

    def _enter(
        self, host: Host, name: str, tokens: int = 0, *, begins: bool = False, held_bytes: int = 0
    ) -> Generator[Turn, None, _Place]:
        """A session, and memory for a text of so many tokens behind its live context, and for what else is held.

        Where others use what is needed it waits for them, and holds nothing meanwhile: so one of them always goes on.
        Who needs memory waits behind those who wait for some already, or a large text would wait for ever.
        """
        turn = Turn()
        try:
            while True:
                if not self._turns or self._turns[0] is turn or not (tokens or begins):
                    try:
                        return self._place(host, name, tokens, begins, held_bytes)
                    except AllInUse:
                        pass
                if turn not in self._turns:
                    self._turns.append(turn)
                yield turn
        finally:
            if turn in self._turns:
                self._turns.remove(turn)
                self._freed()

    def _place(self, host: Host, name: str, tokens: int, begins: bool, held_bytes: int) -> _Place:
        model = language_model(host)
        # A text that would need more than there is at all has it to itself.
        most = self._config.max_session_bytes - model.session_bytes

        def needed(live: int) -> int:
            longest = min(live + tokens, model.text.context)
            return min(most, held_bytes + (pass_bytes(model, longest) if tokens else 0))

        # How much of one on disk is live is known when it is in memory, and by then others have gone to disk for it.
        at_most = needed(1 + model.text.chunk)
        held = self._sessions.begin(host, name, at_most) if begins else self._named(host, name, at_most)
        place = _Place(self._sessions, held, self._freed)
        try:
            place.borrow(needed(held.model.live))
        except BaseException:
            place.close()
            raise
        return place

    def _text(self, data: NDArray[Any], what: str) -> str:
        fix = "Send it in parts, or raise `max_text_bytes`"
        return text_of(_flat(data, what, self._config.max_text_bytes, fix).tobytes(), what)


class _Place:
    """A session that stays in memory while a request uses it, and the memory that the request takes."""

    def __init__(self, sessions: Sessions, held: HeldSession, freed: Callable[[], None]) -> None:
        self.held = held
        self._sessions = sessions
        self._freed = freed
        self._borrowed = 0
        held.in_use += 1

    def borrow(self, nbytes: int) -> None:
        self._sessions.borrow(nbytes, self.held)
        self._borrowed = nbytes

    def close(self) -> None:
        self.held.in_use -= 1
        self._sessions.give_back(self._borrowed)
        self._sessions.leave(self.held)
        self._freed()


def _reason(error: TtaError) -> str:
    """Of the event that an error is worth; empty where only the request was at fault."""
    if isinstance(error, EngineError):
        return Reason.ENGINE.value
    return error.code if isinstance(error, NonFiniteTheta | NonFiniteState) else ""


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _flat(data: NDArray[Any], what: str, limit: int, fix: str) -> NDArray[np.uint8]:
    """The bytes of a tensor; ``fix`` is what to do where there are more than ``limit``.

    Raises:
        WrongDtype, WrongShape, TooLarge: it is no row of at most so many bytes.
    """
    if data.dtype != np.uint8:
        raise WrongDtype(f"{what} is {data.dtype}, expected uint8", "Send its bytes")
    if data.ndim != 1:
        raise WrongShape(f"{what} has the shape {list(data.shape)}, expected one dimension", "Send its bytes")
    if data.size > limit:
        raise TooLarge(f"{what} has {data.size} bytes, the limit is {limit}", fix)
    return data


def _status(session: HeldSession, sessions: Sessions) -> SessionStatus:
    model = session.model
    checkpoint, pending = model.snapshot
    chunk = model.model.text.chunk
    return SessionStatus(
        id=session.key[1],
        bundle=session.key[0],
        method=model.model.method,
        absorbed=checkpoint.steps * chunk + len(pending),
        pending=len(pending),
        chunks=checkpoint.steps,
        theta_digest=model.digest,
        restored=session.restored,
        durable=sessions.durable(session),  # asked after the snapshot: what is newer is not called older
        bytes=session.nbytes,
    )
