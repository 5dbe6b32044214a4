"""Messages between a client and the edge daemon as multipart frames. The specification is docs/spec/wire.md.

Here are the messages; how they become frames, and frames messages, is tta_runtime/wire.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

# What both protocols share has its home in the runtime; who talks to the daemon finds it here as well.
from tta_runtime.wire import MAX_ELEMENTS as MAX_ELEMENTS
from tta_runtime.wire import MAX_REQUEST_ID as MAX_REQUEST_ID
from tta_runtime.wire import NAME_PATTERN as NAME_PATTERN
from tta_runtime.wire import Buffer as Buffer
from tta_runtime.wire import Codec, Message, by_tag
from tta_runtime.wire import DType as DType
from tta_runtime.wire import Limits as Limits
from tta_runtime.wire import Received as Received
from tta_runtime.wire import RequestId as RequestId
from tta_runtime.wire import TensorInfo as TensorInfo
from tta_runtime.wire import Tensors as Tensors
from tta_runtime.wire import declare as declare
from tta_runtime.wire import tag as tag

PROTOCOL = b"TTA1"
MAX_TENSORS = 4  # the most that any message declares

StreamId = Annotated[str, Meta(pattern=NAME_PATTERN)]
# The empty name stands for the daemon's first bundle, and for all streams where a message may mean all.
OptionalName = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,63})?\Z")]
StreamState = Literal["adapting", "frozen", "source", "off"]


# A reply may list the class names of a large model; the client chose its daemon, the daemon not its clients.
REPLY_LIMITS = Limits(
    max_header_bytes=4 * 1024 * 1024,
    max_items=65_536,
    max_str_bytes=64 * 1024,
    max_payload_bytes=256 * 1024 * 1024,
)


class Predict(Message, frozen=True, kw_only=True, tag="predict"):
    """Ask for predictions on one batch and, unless `adapt` is false, let the stream adapt to it."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"
    adapt: bool = True
    compare: bool = False
    """Send the frozen source's logits too."""
    x: TensorInfo


class Info(Message, frozen=True, kw_only=True, tag="info"):
    """Ask what is served."""

    id: RequestId
    bundle: OptionalName = ""


class Status(Message, frozen=True, kw_only=True, tag="status"):
    """Ask how the daemon is doing."""

    id: RequestId


class Reset(Message, frozen=True, kw_only=True, tag="reset"):
    """Return one stream to the source."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"


class Rollback(Message, frozen=True, kw_only=True, tag="rollback"):
    """Return one stream to its last good checkpoint, theta and state together."""

    id: RequestId
    bundle: OptionalName = ""
    stream: StreamId = "default"


class Adapt(Message, frozen=True, kw_only=True, tag="adapt"):
    """Switch adaptation on or off, for the whole daemon or for one stream."""

    id: RequestId
    on: bool
    bundle: OptionalName = ""
    stream: OptionalName = ""
    """Empty: the kill switch of the whole daemon, whatever `bundle` says."""


class Reload(Message, frozen=True, kw_only=True, tag="reload"):
    """Read a bundle's directory again and serve what is there now."""

    id: RequestId
    bundle: OptionalName = ""


class Events(Message, frozen=True, kw_only=True, tag="events"):
    """Ask for the newest events."""

    id: RequestId
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class Score(Message, frozen=True, kw_only=True, tag="score"):
    """Ask how well a text is predicted."""

    id: RequestId
    bundle: OptionalName = ""
    session: OptionalName = ""
    """Whose theta and live context come before it; empty: the source's, without any context."""
    text: TensorInfo
    """[bytes] uint8, UTF-8."""
    context: TensorInfo | None = None
    """[bytes] uint8, UTF-8: seen before the text, not scored."""


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Ask for the text that follows a prompt; it comes in `generated` messages, then `generate-done`."""

    id: RequestId
    bundle: OptionalName = ""
    session: OptionalName = ""
    """As in `score`."""
    prompt: TensorInfo
    """[bytes] uint8, UTF-8; may be empty where something comes before it."""
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """0 takes the most probable token."""
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Only the so many most probable tokens; 0: all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the most probable tokens that together have this probability."""
    seed: Annotated[int, Meta(ge=0, le=2**53 - 1)] = 0
    absorb: bool = False
    """Let the session absorb the prompt and what followed, at the end."""


class Absorb(Message, frozen=True, kw_only=True, tag="absorb"):
    """Have a session take a text in; the session begins with it."""

    id: RequestId
    bundle: OptionalName = ""
    session: StreamId
    text: TensorInfo
    """[bytes] uint8, UTF-8."""


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop a `score`, `generate` or `absorb` of the same client; it is answered with the error `cancelled`."""

    id: RequestId
    request: RequestId
    """The id of that request."""


class Export(Message, frozen=True, kw_only=True, tag="export"):
    """Ask for a session as a file."""

    id: RequestId
    bundle: OptionalName = ""
    session: StreamId


class Import(Message, frozen=True, kw_only=True, tag="import"):
    """Begin a session with what another one was exported as."""

    id: RequestId
    bundle: OptionalName = ""
    session: StreamId
    data: TensorInfo
    """[bytes] uint8, a state file."""


class Prediction(Message, frozen=True, kw_only=True, tag="prediction"):
    """Answer to `predict`."""

    id: RequestId
    adapted: bool
    """Whether this batch's step was committed."""
    collected: bool = False
    """Whether the samples went to the stream's window, to be adapted on later."""
    reason: str = ""
    """The guards' code of why not, or of why the stream was reset; empty where there is nothing to say."""
    steps: int
    distance: float
    """Relative L2 distance of theta to the source theta."""
    theta_digest: str
    report: dict[str, float]
    compute_ms: float
    logits: TensorInfo
    """[batch, classes], float32."""
    source_logits: TensorInfo | None = None
    """[batch, classes], float32: the frozen source's; present when asked for by `compare`."""


class InputInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a request's `x` has to be; a string in `shape` is a dimension of any size."""

    dtype: str
    shape: list[int | str]
    low: float
    high: float


class ServerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon accepts in one request."""

    max_batch: int
    max_request_bytes: int
    batch: int | None = None
    """The only batch size the method can adapt on, where it has one."""
    min_batch: int = 1
    """Below it a batch is answered but not adapted on."""


class TextInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a language model takes."""

    tokenizer: str
    """`bytes`, or the name of the bundle's file."""
    tokenizer_digest: str
    chunk: int
    """Tokens that are absorbed at once."""
    context: int
    """Most tokens that it sees at once, those before a text included."""
    begins: bool
    """Whether a token stands before every text, so that the first one is scored as well."""
    max_text_bytes: int
    """Most bytes of one text."""


class InfoReply(Message, frozen=True, kw_only=True, tag="info-reply"):
    """Answer to `info`."""

    id: RequestId
    version: str
    bundle: str
    """Its name in this daemon."""
    model_id: str
    bundle_digest: str
    method: str
    methods: list[str]
    hyper: dict[str, float]
    input: InputInfo
    classes: int
    class_names: list[str] | None = None
    limits: ServerLimits
    text: TextInfo | None = None
    """Of a bundle of the task `text`."""


class BundleStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One served bundle."""

    name: str
    model_id: str
    digest: str
    method: str
    provider: str
    """What really runs its graphs."""
    loads: int
    """How often it was loaded since the daemon started."""
    base: str = ""
    """Epoch and number of the committed base; empty: the bundle's own theta."""
    staged: str = ""
    """Of the base on probation; empty: none."""
    fallbacks: list[str] = []
    """Graphs that do not run where `auto` would have them, each with the reason."""
    task: Literal["classification", "text"] = "classification"


AutoMode = Literal["awake", "resting", "source"]


class AutoStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the method auto has decided for a stream."""

    mode: AutoMode
    """`awake`: steps often; `resting`: settled, steps rarely; `source`: a step has nothing to add."""
    change: float
    """How far the images last moved, in standard deviations of single ones."""
    shift: float | None = None
    """Squared distance of the activations from the source's, in squared spreads of single samples; last step."""
    share: float | None = None
    """Of the shift that was undone, 0 to 1."""
    gain: float | None = None
    """Nats of information that the last step's predictions hold beyond the source's."""
    correlated: bool = False
    """Whether labels come in runs; then answers favour the classes that are present."""
    evidence: float = 1.0
    """For it: how far recent mean predictions depart from the long mean, in units of what chance gives."""


class StreamStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stream's figures."""

    id: str
    bundle: str
    method: str
    steps: int
    theta_digest: str
    distance: float
    state: StreamState
    """`adapting`; `frozen`: the guards suspended it; `source`: its method has no step; `off`: switched off."""
    restored: str
    """What it started from: `source`, or the slot file it was restored from."""
    samples: int
    """Answered since the stream was loaded."""
    window: int = 0
    """Samples that wait for a step."""
    checkpoints: int = 0
    """Good states that a rollback can return to."""
    entropy: float | None = None
    """Running mean entropy of the predictions, in nats."""
    diversity: float | None = None
    """Entropy of the running mean prediction, as a fraction of ln C; near 0 where all goes to one class."""
    agreement: float | None = None
    """Running share of samples, of those compared, where stream and frozen source give the same class."""
    last_event: str = ""
    events: dict[str, int] = msgspec.field(default_factory=dict)
    """Reason code -> how often."""
    auto: AutoStatus | None = None
    """Of a stream whose method is auto."""


class SessionStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One session's figures."""

    id: str
    bundle: str
    method: str
    absorbed: int
    """Tokens."""
    pending: int
    """Of them, those that wait for a chunk to fill."""
    chunks: int
    theta_digest: str
    restored: str
    """What it started from: `source`, `import`, or the slot file it was restored from."""
    durable: bool
    """Whether a restart finds it as it is."""
    bytes: int
    """Memory that is set apart for it."""


class Requests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many requests were answered, and with what."""

    ok: int
    failed: int
    open: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    """Error code -> how often."""


class CloudInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The link to the cloud."""

    phase: str
    """`online`, or how far it is."""
    group: str
    problem: str
    """Why there is no link or, while it is online, why no sample is taken; empty where all is well."""
    stale: bool
    """Whether no good head has come for ten minutes."""
    head: str
    """Epoch and number of the newest patch that the cloud tells of; empty before the first head."""
    seen: int
    """Samples that the filter has looked at."""
    chosen: int
    """Of them, those that were to be sent."""
    sent: int
    """Of those, acknowledged."""
    refused: int
    """Of those, not wanted by the cloud."""
    dropped: int
    """Dropped because too many waited."""
    waiting: int
    patches_refused: int
    """Patches, heads and roots that did not pass verification."""
    head_age_s: float = 0.0
    """Since the last good head, or since the start where none has come yet."""


class StatusReply(Message, frozen=True, kw_only=True, tag="status-reply"):
    """Answer to `status`."""

    id: RequestId
    version: str
    uptime_s: float
    adapt: bool
    """The kill switch: whether any stream may adapt."""
    policy: str
    bundles: list[BundleStatus]
    streams: list[StreamStatus]
    """Those in memory, the most recently used last."""
    stored_streams: int
    """On disk only."""
    state_dir: str = ""
    requests: Requests
    latency_ms: dict[str, float]
    rss_bytes: int
    """Resident memory of the daemon."""
    disk_error: str = ""
    """Why the last write to the state directory failed; empty when it succeeded."""
    cloud: CloudInfo | None = None
    """None in the modes without a cloud."""
    sessions: list[SessionStatus] = msgspec.field(default_factory=list)
    """Of language models, those in memory, the most recently used last."""
    stored_sessions: int = 0
    """On disk only."""
    text_bytes: int = 0
    """Memory set apart for sessions and for texts under way."""


class ResetDone(Message, frozen=True, kw_only=True, tag="reset-done"):
    """Answer to `reset`."""

    id: RequestId
    stream: str
    theta_digest: str
    durable: bool = True
    """Whether a restart finds the stream at the source; false while the state directory cannot be written."""


class RollbackDone(Message, frozen=True, kw_only=True, tag="rollback-done"):
    """Answer to `rollback`."""

    id: RequestId
    stream: str
    theta_digest: str
    steps: int
    to: Literal["checkpoint", "source"]
    durable: bool = True
    """Whether a restart finds the stream as it is now."""


class AdaptDone(Message, frozen=True, kw_only=True, tag="adapt-done"):
    """Answer to `adapt`."""

    id: RequestId
    on: bool
    stream: str
    durable: bool
    """Whether the switch survives a restart: there is a state directory and it was written."""


class ReloadDone(Message, frozen=True, kw_only=True, tag="reload-done"):
    """Answer to `reload`, when the new bundle answers."""

    id: RequestId
    bundle: str
    bundle_digest: str
    changed: bool
    """Whether the directory held another bundle than before."""
    kept_streams: int
    """Streams that go on with their theta."""
    restarted_streams: int
    """Streams that start from the new source, because theirs does not fit it."""


class EventEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something the daemon did by itself or was told to do."""

    seq: int
    """1, 2, ... since the daemon started."""
    time: str
    """UTC, ISO 8601."""
    bundle: str
    stream: str
    """Empty where it concerns the whole daemon."""
    action: str
    reason: str
    detail: str


class EventsReply(Message, frozen=True, kw_only=True, tag="events-reply"):
    """Answer to `events`: the newest, oldest first."""

    id: RequestId
    events: list[EventEntry]


class ScoreDone(Message, frozen=True, kw_only=True, tag="score-done"):
    """Answer to `score`."""

    id: RequestId
    bits: float
    """-log2 p of all scored tokens together."""
    bytes: int
    """Of the text, those that the scored tokens stand for."""
    skipped: int
    """Tokens at the beginning that were not scored, because nothing comes before them: 0 or 1."""
    before: int
    """Tokens that were seen before the text."""
    compute_ms: float
    nats: TensorInfo
    """[scored tokens] float32: -ln p of each."""


class Generated(Message, frozen=True, kw_only=True, tag="generated"):
    """A part of the answer to `generate`; more follow, then `generate-done`."""

    id: RequestId
    start: int
    """UTF-8 bytes of the parts before it."""
    tokens: int
    """So far."""
    text: str


class GenerateDone(Message, frozen=True, kw_only=True, tag="generate-done"):
    """The end of the answer to `generate`."""

    id: RequestId
    reason: Literal["end", "max-tokens", "context"]
    """The model's end token, as many tokens as were asked for, or no more room in the context."""
    tokens: int
    """That were generated."""
    prompt_tokens: int
    compute_ms: float
    absorbed: bool = False
    durable: bool = False
    """Where it was absorbed: whether a restart finds that."""
    text: TensorInfo
    """[bytes] uint8, UTF-8: all of it, for whoever has missed a part."""


class AbsorbDone(Message, frozen=True, kw_only=True, tag="absorb-done"):
    """Answer to `absorb`."""

    id: RequestId
    session: str
    tokens: int
    """Of this text."""
    absorbed: int
    """By the session so far."""
    pending: int
    """Of them, those that wait for a chunk to fill."""
    chunks: int
    theta_digest: str
    report: dict[str, float]
    """The mapper's named numbers of the last chunk."""
    durable: bool
    """Whether a restart finds it: there is a state directory and it was written."""
    compute_ms: float


class CancelDone(Message, frozen=True, kw_only=True, tag="cancel-done"):
    """Answer to `cancel`."""

    id: RequestId
    found: bool
    """Whether that request was under way."""


class ExportDone(Message, frozen=True, kw_only=True, tag="export-done"):
    """Answer to `export`."""

    id: RequestId
    session: str
    absorbed: int
    theta_digest: str
    data: TensorInfo
    """[bytes] uint8, a state file (see bundle.md)."""


class ImportDone(Message, frozen=True, kw_only=True, tag="import-done"):
    """Answer to `import`."""

    id: RequestId
    session: str
    absorbed: int
    theta_digest: str
    durable: bool


class ErrorReply(Message, frozen=True, kw_only=True, tag="error"):
    """Answer to anything that was refused. Nothing has changed in the daemon."""

    id: RequestId | None = None
    """`None` where the request was too broken to read its id."""
    code: str
    cause: str
    fix: str
    retry_after_s: float | None = None


TextRequest = Score | Generate | Absorb | Export | Import
"""What uses a language model."""
Request = (
    Predict | Info | Status | Reset | Rollback | Adapt | Reload | Events | Cancel
    | Score | Generate | Absorb | Export | Import
)  # fmt: skip
Reply = (
    Prediction
    | InfoReply
    | StatusReply
    | ResetDone
    | RollbackDone
    | AdaptDone
    | ReloadDone
    | EventsReply
    | ScoreDone
    | GenerateDone
    | AbsorbDone
    | CancelDone
    | ExportDone
    | ImportDone
    | Generated
    | ErrorReply
)
PARTS = (Generated,)
"""Replies after which the request is still open."""
REQUESTS = by_tag(get_args(Request))
REPLIES = by_tag(get_args(Reply))
_CODEC = Codec(
    PROTOCOL,
    (*REQUESTS.values(), *REPLIES.values()),
    max_tensors=MAX_TENSORS,
    spec="docs/spec/wire.md",
    send_less="Send smaller batches, or raise `max_request_bytes` of the daemon",
)


def encode(message: Message, tensors: Tensors | None = None) -> list[Buffer]:
    """Frames of a message; see `Codec.encode`."""
    return _CODEC.encode(message, tensors)


def decode_request(frames: Sequence[Buffer], limits: Limits) -> Received[Any]:
    """A request from its frames; raises a WireError (see `Codec.decode`)."""
    return _CODEC.decode(frames, limits, REQUESTS)


def decode_reply(frames: Sequence[Buffer], limits: Limits = REPLY_LIMITS) -> Received[Any]:
    """A reply from its frames; raises a WireError (see `Codec.decode`)."""
    return _CODEC.decode(frames, limits, REPLIES)
