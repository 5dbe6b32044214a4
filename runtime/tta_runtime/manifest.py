"""manifest.json as typed data: the structs of docs/spec/bundle.md and their JSON form.

Decoding answers one question, "is this JSON of the specified types?". Whether the parts agree with each other
is `manifest_check`, whether they agree with the files is `bundle`.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec

from .errors import ManifestMalformed, ManifestTooLarge, NewerFormat, UnknownFormat, did_you_mean

FORMAT = "tta-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
THETA = "theta.safetensors"
ANCHOR = "anchor.safetensors"
FORWARD = "forward"
"""Key of the graph every bundle has: x, theta -> logits, features."""

MAX_MANIFEST_BYTES = 4 << 20


Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A size or a position: never negative, and exact in every JSON reader."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the manifest's parts: immutable, and a misspelt key is an error."""


class InputSpec(Struct, frozen=True, kw_only=True):
    """What the user sends: dtype, shape and value range. Normalisation is inside the graph."""

    name: str = "x"
    dtype: str
    """"float32" or "uint8"; "int64" for text."""
    shape: list[Count | str]
    """The first is "batch"; a string elsewhere is a free dimension. Text: [1, "tokens"]."""
    low: float
    high: float
    """Range of the values the model was trained on, e.g. 0..255. A value outside it is not an error."""
    layout: str = "NCHW"
    """"NCHW" or "flat"; "tokens" for text."""


class TextSpec(Struct, frozen=True, kw_only=True):
    """What a causal language model needs beside its input and its `classes`, the vocabulary."""

    tokenizer: str = "bytes"
    """"bytes" (a token is a byte), or the name of a `tokenizers` file of the bundle."""
    chunk: Count
    """Tokens that are absorbed at once."""
    context: Count
    """Most tokens that a pass sees, those of the cache included."""
    begin: Count | None = None
    """The token that stands before a text, in passes and in chunks; the absorb graph puts it there by itself."""
    end: Count | None = None
    """The token that ends what is generated."""
    cache: list[Count]
    """[layers, 2, kv_heads, head_width] of the cache of one text."""


class ThetaEntry(Struct, frozen=True, kw_only=True):
    """One named tensor inside the flat theta vector."""

    name: str
    shape: list[Count]
    offset: Count
    kind: str
    """What the tensor is: "weight", "bias", "mean", "var", ..."""
    trained: bool
    """True if methods learn it by gradient."""


class ThetaLayout(Struct, frozen=True, kw_only=True):
    """Where each named tensor lies in the flat float32 theta vector of `size` elements."""

    size: Count
    trained: Count
    """theta[:trained] is what methods learn by gradient."""
    digest: str
    """Digest of the source theta (see `theta.digest`)."""
    entries: list[ThetaEntry]


class Port(Struct, frozen=True, kw_only=True):
    """One input or output of a graph and what it is bound to."""

    name: str
    """The ONNX value's name."""
    dtype: str
    shape: list[Count | str]
    bind: str
    """Inputs: batch, theta, state, anchor, hyper, rand, cache. Outputs: logits, features, theta, state, report,
    cache."""
    key: str = ""
    """For batch: "x", "weight" or "target"; for state and anchor: the array's name."""


class Graph(Struct, frozen=True, kw_only=True):
    """An ONNX file and its signature."""

    file: str
    role: str
    """"serve", "step", "probe" or "absorb"."""
    inputs: list[Port]
    outputs: list[Port]
    tensorrt: str | None = None
    """The same graph without the operators that TensorRT lacks, for plans that an edge builds; None: not made."""


class StateSpec(Struct, frozen=True, kw_only=True):
    """One array that a method carries from step to step."""

    name: str
    dtype: str
    shape: list[Count]
    init: str
    """"zeros", "ones" or "theta" (a copy of the vector the state starts beside)."""


class HyperSpec(Struct, frozen=True, kw_only=True):
    """One named number of a method, tunable without exporting again."""

    name: str
    default: float
    doc: str = ""
    low: float | None = None
    high: float | None = None


class MethodSpec(Struct, frozen=True, kw_only=True):
    """How theta changes: which graph steps, which graph and vector serve, and what is carried along."""

    doc: str
    step: str | None
    """Key of the step graph, or for text of the absorb graph; None: the method only serves."""
    serve: str = FORWARD
    serve_vector: str = "theta"
    """"theta" or "state:NAME"."""
    logits: str
    """"before" or "after": which theta gave the logits a step returns."""
    state: list[StateSpec] = []
    hyper: list[HyperSpec] = []
    report: list[str] = []
    """Names of the report vector's entries, in order."""
    batch: Count | None = None
    """The number of samples a step is compiled for; None: any."""
    min_batch: Count = 1
    rand: Count = 0
    """How many uniforms in [0, 1) the host draws for a step."""
    forwards: float | None = None
    """Passes through the network for each sample of one step; None: whoever built the bundle did not say."""
    backwards: float | None = None
    """Passes back through it, likewise."""
    window: Count = 0
    """How many recent samples, balanced by predicted class, the host keeps for a step; 0: a step takes what arrives."""

    @property
    def forward_equivalents(self) -> float | None:
        """What one step costs for each sample, in forward passes, a backward pass counted as two; None: not said.

        An answer between steps is a forward pass more.
        """
        if self.forwards is None or self.backwards is None:
            return None
        return self.forwards + 2 * self.backwards


class FileEntry(Struct, frozen=True, kw_only=True):
    """Hash and size of one file of the bundle."""

    sha256: str
    bytes: Count


class Manifest(Struct, frozen=True, kw_only=True):
    """manifest.json."""

    format: str = FORMAT
    format_version: Count = FORMAT_VERSION
    model_id: str
    task: str = "classification"
    """"classification" or "text"."""
    input: InputSpec
    classes: Count
    """Length of the logits; for text the vocabulary."""
    class_names: list[str] | None = None
    text: TextSpec | None = None
    """Of the task "text"."""
    adapter: str
    theta: ThetaLayout
    graphs: dict[str, Graph]
    methods: dict[str, MethodSpec]
    default_method: str
    files: dict[str, FileEntry] = {}
    """Every file of the bundle but manifest.json."""
    provenance: dict[str, str] = {}

    def takes_target(self, method: str) -> bool:
        """Whether a method's steps take logits beside the images: a teacher's, or the stream's own earlier ones."""
        step = self.methods[method].step
        return step is not None and any(
            (port.bind, port.key) == ("batch", "target") for port in self.graphs[step].inputs
        )

    def needs_teacher(self, method: str) -> bool:
        """Whether a method's steps learn from a teacher's logits: then it cannot adapt by itself."""
        return self.takes_target(method) and not self.methods[method].window


class _Header(msgspec.Struct, frozen=True):
    """The two keys that say whether the rest can be understood."""

    format: str
    format_version: int


_STRUCTS = (
    InputSpec,
    TextSpec,
    ThetaEntry,
    ThetaLayout,
    Port,
    Graph,
    StateSpec,
    HyperSpec,
    MethodSpec,
    FileEntry,
    Manifest,
)
_KNOWN_KEYS = frozenset(name for struct in _STRUCTS for name in struct.__struct_fields__)


def decode(data: bytes) -> Manifest:
    """Manifest from the bytes of manifest.json.

    Raises:
        ManifestTooLarge: more than `MAX_MANIFEST_BYTES`; nothing is parsed.
        ManifestMalformed: not JSON, a wrong type, a missing or an unknown key.
        UnknownFormat, NewerFormat: the header names another format or a newer version; the rest is not
            parsed, so that a newer version's unknown keys are not reported as misspelt.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestTooLarge(
            f"{MANIFEST} has {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}", "Build the bundle again"
        )
    header = _decode(data, _Header)
    if header.format != FORMAT:
        raise UnknownFormat(
            f"format is `{header.format}`, expected `{FORMAT}`", "Give the directory of a bundle"
        )
    if header.format_version > FORMAT_VERSION:
        raise NewerFormat(
            f"format_version is {header.format_version}, this tta-runtime reads up to {FORMAT_VERSION}",
            "Upgrade tta-runtime, or build the bundle with this version",
        )
    if header.format_version < 1:
        raise ManifestMalformed(
            f"format_version is {header.format_version}, versions start at 1", "Build the bundle again"
        )
    return _decode(data, Manifest)


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: pretty printed, keys in the order of the structs, maps sorted by key."""
    ordered = msgspec.structs.replace(
        manifest,
        graphs=dict(sorted(manifest.graphs.items())),
        files=dict(sorted(manifest.files.items())),
        provenance=dict(sorted(manifest.provenance.items())),
    )
    return msgspec.json.format(msgspec.json.encode(ordered), indent=2) + b"\n"


_S = TypeVar("_S", bound=msgspec.Struct)


def _decode(data: bytes, kind: type[_S]) -> _S:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # ValidationError is a DecodeError; deep nesting: RecursionError, bad UTF-8: UnicodeDecodeError.
        text = str(error)
        unknown = re.search(r"unknown field `([^`]*)`", text)
        hint = did_you_mean(unknown[1], _KNOWN_KEYS) if unknown else ""
        raise ManifestMalformed(f"{MANIFEST}: {text}{hint}", "Build the bundle again") from error
