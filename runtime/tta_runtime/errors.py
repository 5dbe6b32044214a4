"""Every refusal of the runtime by name. Each carries its cause, with both values, and what to do about it.

The tree, by what the caller can do:

- `BundleError`: the directory is not a good bundle; get another copy or build it again.
- `EngineError`: the graph cannot be loaded or run here; install something or report it.
- `InputError`: this batch is refused; the next one may be good.
- `ThetaError`, `StateError`: a parameter vector or a saved state does not belong here.
- `MethodError`, `ConfigError`: a name or a value in the call or the configuration is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_CAUSE = 1500
"""Characters of a cause; what is longer loses its middle."""


class TtaError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        cause: what is wrong, naming both values (found and expected), without its full stop.
        fix: what the user can do, without its full stop; may be empty.
    """

    code: str = "tta"
    """Stable name for machines, in kebab case; equal for all instances of a class."""

    def __init__(self, cause: str, fix: str = "") -> None:
        cause = _shortened(cause)
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return " ".join(t if t.endswith(("?", ".")) else f"{t}." for t in (self.cause, self.fix) if t)


def _shortened(text: str) -> str:
    """Parts of a cause come from files and from the wire: a message has a bound whatever they hold."""
    if len(text) <= MAX_CAUSE:
        return text
    return f"{text[: MAX_CAUSE - 500]} [...] {text[-490:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a sentence about an unknown name: the nearest known one, or all of them when few.

    Returns:
        Text to append directly to the sentence: ", did you mean `adapt_every`?"; "" when nothing helps.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(word[:200], names, n=1, cutoff=0.6)
    if close:
        return f", did you mean `{close[0]}`?"
    if 0 < len(names) <= 12:
        return "; known: " + ", ".join(f"`{n}`" for n in names)
    return ""


# ---------------------------------------------------------------------------------------------- bundle


class BundleError(TtaError):
    """The directory is not a bundle this version can use."""

    code = "bundle"


class ManifestMissing(BundleError):
    """There is no readable manifest.json at the path (B1)."""

    code = "manifest-missing"


class ManifestTooLarge(BundleError):
    """manifest.json is larger than the limit (B2)."""

    code = "manifest-too-large"


class ManifestMalformed(BundleError):
    """manifest.json is not JSON of the specified types, or has an unknown key (B3)."""

    code = "manifest-malformed"


class UnknownFormat(BundleError):
    """The manifest says that it describes something else than a bundle (B4)."""

    code = "unknown-format"


class NewerFormat(BundleError):
    """The bundle's format version is newer than this runtime knows (B5)."""

    code = "newer-format"


class PathEscapes(BundleError):
    """A file name in the manifest is not a plain name inside the bundle (B6)."""

    code = "path-escapes"


class LayoutMalformed(BundleError):
    """The theta layout has gaps, overlaps, duplicate names or a wrong order (B7)."""

    code = "layout-malformed"


class ManifestInconsistent(BundleError):
    """Parts of the manifest contradict each other (B8)."""

    code = "manifest-inconsistent"


class GraphMismatch(BundleError):
    """A graph's ports disagree with the manifest or with the ONNX file (B9)."""

    code = "graph-mismatch"


class FileMissing(BundleError):
    """A listed file does not exist (B10)."""

    code = "file-missing"


class FileUnlisted(BundleError):
    """The directory holds a file that the manifest does not list (B11)."""

    code = "file-unlisted"


class FileTruncated(BundleError):
    """A listed file has another size than listed (B12)."""

    code = "file-truncated"


class FileTampered(BundleError):
    """A listed file has another sha256 than listed (B13)."""

    code = "file-tampered"


class TokenizerRefused(BundleError):
    """The tokenizer file cannot be read, or has tokens that the model does not know (B19)."""

    code = "tokenizer-refused"


class FileUnreadable(BundleError):
    """The operating system refuses to read a listed file."""

    code = "file-unreadable"


class ThetaMismatch(BundleError):
    """theta.safetensors is not the vector that the layout describes (B14)."""

    code = "theta-mismatch"


class AnchorMismatch(BundleError):
    """anchor.safetensors lacks an array that a graph needs, or holds bad ones (B15)."""

    code = "anchor-mismatch"


# ---------------------------------------------------------------------------------------------- engine


class EngineError(TtaError):
    """A graph cannot be loaded or run here."""

    code = "engine"


class EngineMissing(EngineError):
    """The library or the provider that should run the graph is not installed."""

    code = "engine-missing"


class DriverMissing(EngineMissing):
    """This machine has no NVIDIA driver, or the driver finds no GPU."""

    code = "driver-missing"


class LibraryMissing(EngineMissing):
    """No TensorRT is installed, or its libraries cannot be loaded."""

    code = "library-missing"


class LibraryUnsuitable(EngineMissing):
    """The installed TensorRT has a version that cannot be used."""

    code = "library-unsuitable"


class GpuUnsupported(EngineMissing):
    """The installed TensorRT does not know GPUs of this compute capability."""

    code = "gpu-unsupported"


class GraphsMissing(EngineMissing):
    """The bundle was built without graphs for TensorRT."""

    code = "graphs-missing"


class PlanCacheRefused(EngineError):
    """The directory for plans cannot be used: a plan is machine code, and others could write there."""

    code = "plan-cache-refused"


class EngineFailed(EngineError):
    """The engine refused to load or to run a graph; the cause holds its message."""

    code = "engine-failed"


class OutOfDeviceMemory(EngineFailed):
    """The GPU has no room for a graph or for a batch."""

    code = "out-of-device-memory"


class PlanRefused(EngineFailed):
    """TensorRT refuses to parse or build a graph, or to load its plan."""

    code = "plan-refused"


class NonFiniteLogits(EngineError):
    """A language model answered with NaN or Inf."""

    code = "non-finite-output"


# ---------------------------------------------------------------------------------------------- input


class InputError(TtaError):
    """A batch is refused; nothing was computed."""

    code = "input"


class WrongShape(InputError):
    """The batch does not have the shape of the manifest's input."""

    code = "wrong-shape"


class WrongDtype(InputError):
    """The batch does not have the dtype of the manifest's input."""

    code = "wrong-dtype"


class NonFinite(InputError):
    """The batch holds NaN or Inf."""

    code = "non-finite"


class EmptyBatch(InputError):
    """The batch holds no sample."""

    code = "empty-batch"


class TooLarge(InputError):
    """The batch has more samples or bytes than the limits allow."""

    code = "too-large"


class BadWeight(InputError):
    """The per-sample weights are not finite float32 values >= 0, one for each sample."""

    code = "bad-weight"


class WeightUnsupported(InputError):
    """The method's step takes no weights, so a sample cannot be refused with it."""

    code = "weight-unsupported"


class BadTarget(InputError):
    """The teacher's logits are not finite float32 values, one row for each sample and one column for each class."""

    code = "bad-target"


class TargetMissing(InputError):
    """The method learns from a teacher's logits and was given none."""

    code = "target-missing"


class TargetUnsupported(InputError):
    """The method's step takes no teacher's logits."""

    code = "target-unsupported"


class BatchTooSmall(InputError):
    """The method needs more samples for one step."""

    code = "batch-too-small"


class BatchTooLarge(InputError):
    """A step's batch has more samples than the graph was built for."""

    code = "batch-too-large"


class WrongBatch(InputError):
    """The method's step was compiled for another, fixed number of samples."""

    code = "wrong-batch"


class JpegRefused(InputError):
    """A sample that came as a JPEG file is not one that the model's images can be."""

    code = "jpeg-refused"


class JpegMalformed(JpegRefused):
    """It is no JPEG, has segments that an image does not need, bytes after its end, or cannot be decoded."""

    code = "jpeg-malformed"


class JpegTruncated(JpegRefused):
    """It ends before its image does."""

    code = "jpeg-truncated"


class JpegNotBaseline(JpegRefused):
    """It is progressive, lossless, or arithmetically coded."""

    code = "jpeg-not-baseline"


class JpegWrongSize(JpegRefused):
    """It says that it has another height or width than the model's images."""

    code = "jpeg-wrong-size"


class JpegWrongMode(JpegRefused):
    """It says that it has other channels (CMYK, grey for colour) or deeper ones than the model's images."""

    code = "jpeg-wrong-mode"


class InvalidUtf8(InputError):
    """The text is not UTF-8."""

    code = "invalid-utf-8"


class EmptyText(InputError):
    """There is no token to score, to absorb or to go on from."""

    code = "empty-text"


class ContextTooLong(InputError):
    """The text, with what stands before it, is longer than the model can see at once."""

    code = "context-too-long"


class UnknownToken(InputError):
    """A token is outside of the vocabulary."""

    code = "unknown-token"


class BadSampling(InputError):
    """A sampling parameter is out of its range."""

    code = "bad-sampling"


# ------------------------------------------------------------------------------------------ theta and state


class ThetaError(TtaError):
    """A theta vector is refused; the active one is unchanged."""

    code = "theta"


class StaleBase(ThetaError):
    """The vector was made for another theta than the active one."""

    code = "stale-base"


class LayoutMismatch(ThetaError):
    """The vector or the tensors do not fit the bundle's layout."""

    code = "layout-mismatch"


class NonFiniteTheta(ThetaError):
    """The vector holds NaN or Inf."""

    code = "non-finite-theta"


class StateError(TtaError):
    """A method state or a saved state file is refused; the active one is unchanged."""

    code = "state"


class NonFiniteState(StateError):
    """A method's state holds NaN or Inf."""

    code = "non-finite-state"


class StateMissing(StateError):
    """The state file does not exist."""

    code = "state-missing"


class StateMalformed(StateError):
    """The file is not a whole state file of the specified form."""

    code = "state-malformed"


class StateTampered(StateError):
    """The file's contents do not match its checksum."""

    code = "state-tampered"


class NewerState(StateError):
    """The state file's format version is newer than this runtime knows."""

    code = "newer-state"


class OlderState(StateError):
    """The state file's format version is older than this runtime reads."""

    code = "older-state"


class StateOfOtherBundle(StateError):
    """The state was saved with another bundle."""

    code = "state-of-other-bundle"


class StateOfOtherTokenizer(StateError):
    """The session was saved with another tokenizer."""

    code = "state-of-other-tokenizer"


class StateMismatch(StateError):
    """The state was saved for another method, or its arrays do not fit this one."""

    code = "state-mismatch"


class StateUnreadable(StateError):
    """The operating system refuses to read the state file."""

    code = "state-unreadable"


class StateUnwritable(StateError):
    """The operating system refuses to write the state file; an older one is unchanged."""

    code = "state-unwritable"


# ------------------------------------------------------------------------------------------ names and values


class MethodError(TtaError):
    """A method or one of its hyper-parameters is unknown, or method or bundle are none for this purpose."""

    code = "method"


class WrongTask(MethodError):
    """The bundle is for images where one for text is needed, or the other way round."""

    code = "wrong-task"


class UnknownMethod(MethodError):
    """The bundle, or this set of engines, has no method of that name."""

    code = "unknown-method"


class UnknownHyper(MethodError):
    """The method has no hyper-parameter of that name."""

    code = "unknown-hyper"


class MethodNeedsTeacher(MethodError):
    """The method learns from a teacher's logits where there is no teacher."""

    code = "method-needs-teacher"


class AbsorbUnsupported(MethodError):
    """The method only serves: it turns no text into theta."""

    code = "absorb-unsupported"


class ConfigError(TtaError):
    """A key or a value of the configuration is wrong."""

    code = "config"


class UnknownKey(ConfigError):
    """The configuration has no key of that name."""

    code = "unknown-key"


class BadValue(ConfigError):
    """A value has the wrong type or is out of range."""

    code = "bad-value"


class ImagesExtraMissing(ConfigError):
    """Pillow is needed and not installed."""

    code = "images-extra-missing"


class NotAnImage(ConfigError):
    """The model's input is not what a JPEG can hold."""

    code = "not-an-image"


# ---------------------------------------------------------------------------------------------- frames


class WireError(TtaError):
    """The frames of a message break the specification of its protocol."""

    code = "wire"

    request_id: int | None = None
    """The id of the request at fault, where it could still be read."""


class BadFraming(WireError):
    """Too few or too many frames (W1)."""

    code = "bad-framing"


class UnsupportedProtocol(WireError):
    """Frame 0 is not this version's name (W2)."""

    code = "unsupported-protocol"


class MessageTooLarge(WireError):
    """A header or a payload is over the receiver's limit (W3)."""

    code = "message-too-large"


class MalformedHeader(WireError):
    """Frame 1 is not one MessagePack map within the limits (W4)."""

    code = "malformed-header"


class UnknownMessage(WireError):
    """The header's `type` names no message (W5)."""

    code = "unknown-message"


class UnknownField(WireError):
    """The header has a field that its message does not have (W6)."""

    code = "unknown-field"


class BadField(WireError):
    """A field is missing, has the wrong type or is out of range (W7)."""

    code = "bad-field"


class TensorMismatch(WireError):
    """Tensor frames and their declaration disagree in number or in bytes (W8, W9)."""

    code = "tensor-mismatch"


# ---------------------------------------------------------------------------------------------- patches


class PatchError(TtaError):
    """A signed message, or the theta that it carries, is refused; nothing has changed."""

    code = "patch"


class MalformedBody(PatchError):
    """A signed body is not one MessagePack map of the specified fields within the limits (P1, P2)."""

    code = "malformed-body"


class UnknownSigner(PatchError):
    """A signature is by a key that the root does not name (P3)."""

    code = "unknown-signer"


class BadSignature(PatchError):
    """A signature does not fit the body (P3)."""

    code = "bad-signature"


class TooFewSignatures(PatchError):
    """Fewer keys have signed than the root asks for (P3)."""

    code = "too-few-signatures"


class UnknownCodec(PatchError):
    """The payload is encoded in a way that this version does not know (P4)."""

    code = "unknown-codec"


class BaseMismatch(PatchError):
    """The patch was made for another bundle: mix-and-match (P5)."""

    code = "base-mismatch"


class WrongChannel(PatchError):
    """The message belongs to another group (P5)."""

    code = "wrong-channel"


class EpochAhead(PatchError):
    """The message is of an epoch that the root at hand does not name yet (P6)."""

    code = "epoch-ahead"


class Replayed(PatchError):
    """The message is not newer than what was accepted before: replay or rollback (P6)."""

    code = "replayed"


class FastForward(PatchError):
    """The sequence number jumps so far that no honest one could follow (P7)."""

    code = "fast-forward"


class PayloadMismatch(PatchError):
    """The payload has another length or another hash than the signed body says (P8)."""

    code = "payload-mismatch"


class PayloadNotFinite(PatchError):
    """The payload holds NaN or Inf (P9)."""

    code = "payload-not-finite"


class TooFar(PatchError):
    """The theta is farther from the bundle's source than the ball allows (P10)."""

    code = "too-far"


class DigestMismatch(PatchError):
    """The theta that results is not the one that was signed (P11)."""

    code = "digest-mismatch"


class Expired(PatchError):
    """A head or a root is past its time: freeze (H3, R4)."""

    code = "expired"


class RootRefused(PatchError):
    """A root does not follow the one at hand (R1..R3)."""

    code = "root-refused"


class KeyFileRefused(TtaError):
    """A key file cannot be used."""

    code = "key-file"


class KeyExposed(KeyFileRefused):
    """Others than the owner can read a secret key."""

    code = "key-exposed"


class StartError(TtaError):
    """A service cannot start."""

    code = "start"


class BadEndpoint(StartError):
    """An endpoint is not of a form that can be bound or reached."""

    code = "bad-endpoint"


class RemoteBindRefused(StartError):
    """A bind that other machines could reach was not asked for explicitly."""

    code = "remote-bind-refused"


class AddressInUse(StartError):
    """Another process listens on the address already."""

    code = "address-in-use"


class CannotBind(StartError):
    """The operating system refuses the address."""

    code = "cannot-bind"
