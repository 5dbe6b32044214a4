"""Every refusal of the cloud service by name. Each carries its cause, with both values, and what to do about it.

- `StoreError`: the file in which the service keeps everything; one operation was not carried out, or none can be.
- `RecordError`: what was to be stored is not what it should be, or what was found is not what was stored.
- `LedgerError`, `LearnerError`, `EdgeError`, `TokenError`: the operation does not fit what is stored.
"""

from __future__ import annotations

from tta_runtime.errors import ConfigError, StateError, TtaError
from tta_runtime.link import BUSY, DRAINING, DUPLICATE, NOT_GREETED


class CloudError(TtaError):
    """Base of every refusal of the cloud service."""

    code = "cloud"


class Internal(CloudError):
    """A defect of the service; its log holds the trace."""

    code = "internal"


# ------------------------------------------------------------------------------------------ the store


class StoreError(CloudError):
    """The store does not carry out an operation, or cannot be opened. Nothing of the operation is in it."""

    code = "store"


class StoreInUse(StoreError):
    """Another service holds the store's directory."""

    code = "store-in-use"


class StoreUnusable(StoreError):
    """The store's directory or file cannot be made, read or written."""

    code = "store-unusable"


class StoreTooNew(StoreError):
    """A newer version wrote the store; it was left as it is."""

    code = "store-too-new"


class StoreDamaged(StoreError):
    """The file was found to be damaged while it was in use; what comes next goes to a new one."""

    code = "store-damaged"


class StoreBusy(StoreError):
    """As much as may wait for the disk waits already. `retry_after_s` says when to try again."""

    code = "busy"
    retry_after_s: float = 1.0


class StoreFull(StoreError):
    """The disk, or the share of it that the store may have, is full."""

    code = "store-full"


class StoreClosed(StoreError):
    """The service is shutting down."""

    code = "store-closed"


# ------------------------------------------------------------------------------------------ records


class RecordError(CloudError):
    """A record is not what it should be."""

    code = "record"


class BadRecord(RecordError):
    """What was to be stored has a value that is out of range, or parts that disagree."""

    code = "bad-record"


class SampleTooLarge(RecordError):
    """One sample alone is over the bytes that its group may have."""

    code = "sample-too-large"


class DamagedRecord(RecordError):
    """A record does not carry the seal that was stored with it: a bit has flipped on the disk."""

    code = "damaged-record"


# ------------------------------------------------------------------------------------------ ledger, learners


class LedgerError(CloudError):
    """A patch does not fit what the ledger holds."""

    code = "ledger"


class UnknownPatch(LedgerError):
    """The ledger holds no patch of that group, epoch and number."""

    code = "unknown-patch"


class OutOfOrder(LedgerError):
    """A patch's epoch or number is not the next one of its group."""

    code = "out-of-order"


class IllegalTransition(LedgerError):
    """A patch in this state cannot go to that one."""

    code = "illegal-transition"


class GroupPinned(LedgerError):
    """The group is to stay at the patch that it has; nothing newer is published."""

    code = "group-pinned"


class NotPinnable(LedgerError):
    """The group cannot stay at this patch: edges have a newer one, and refuse lower numbers."""

    code = "not-pinnable"


class NothingToDo(LedgerError):
    """The group is as it was asked to be already."""

    code = "nothing-to-do"


class UnknownGroup(LedgerError):
    """Neither an edge nor a patch is of this group."""

    code = "unknown-group"


class LearnerError(CloudError):
    """A learner's snapshot does not fit what is stored."""

    code = "learner"


class StaleLearner(LearnerError):
    """Another snapshot was saved since, or one of the samples was learnt from already."""

    code = "stale-learner"


# ------------------------------------------------------------------------------------------ edges, tokens


class EdgeError(CloudError):
    """An edge cannot be registered or changed."""

    code = "edge"


class UnknownEdge(EdgeError):
    """No edge has this key."""

    code = "unknown-edge"


class EdgeExists(EdgeError):
    """The key is registered already, under another name or group or in another state."""

    code = "edge-exists"


class EdgeRevoked(EdgeError):
    """The edge's key was revoked, and stays so."""

    code = "edge-revoked"


class TokenError(CloudError):
    """An enrolment token is refused."""

    code = "token"


class UnknownToken(TokenError):
    """No such token was issued, or it was withdrawn."""

    code = "unknown-token"


class TokenExpired(TokenError):
    """The token was issued too long ago."""

    code = "token-expired"


class TokenUsed(TokenError):
    """Another key has used the token; it works once."""

    code = "token-used"


class TeacherUnfit(CloudError):
    """The teacher cannot teach this student."""

    code = "teacher-unfit"


class StudentUnfit(CloudError):
    """The student's bundle has nothing to distil with."""

    code = "student-unfit"


class TeacherRefused(ConfigError):
    """What is named as the teacher is neither a bundle nor a network that can be compiled."""

    code = "teacher-refused"


class SnapshotUnreadable(StateError):
    """What a learner left is not a snapshot of these models."""

    code = "snapshot-unreadable"


class LinkRefusal(CloudError):
    """The cloud understood a message of an edge and does not act on it."""

    code = "link-refusal"


class NotGreeted(LinkRefusal):
    """The connection has not begun with the message that opens it, or the cloud has forgotten it (L5)."""

    code = NOT_GREETED


class DuplicateRequest(LinkRefusal):
    """An edge used the id of one request for another (L8)."""

    code = DUPLICATE


class Busy(LinkRefusal):
    """More is open than the cloud holds; nothing was stored (L10)."""

    code = BUSY
    retry_after_s: float | None = None


class Draining(LinkRefusal):
    """The cloud is shutting down and takes nothing new."""

    code = DRAINING


class IdentityMissing(ConfigError):
    """The store has no keys."""

    code = "identity-missing"


class IdentityExists(ConfigError):
    """The store has keys already."""

    code = "identity-exists"


class NoAnswer(CloudError):
    """The service has not said in time what became of a command."""

    code = "no-answer"


class Refused(CloudError):
    """The service has refused a command, with the code and the words that it gave.

    Args:
        code: of the error in the service.
        cause: as there.
        fix: as there.
    """

    code = "refused"

    def __init__(self, code: str, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.code = code


class CannotServe(CloudError):
    """The service cannot begin: an address is taken, or not one of its own."""

    code = "cannot-serve"
