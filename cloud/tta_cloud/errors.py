"""Every refusal of the cloud service by name; see tta_runtime.errors for the tree."""

from __future__ import annotations

from tta_runtime.errors import ConfigError, StateError, TtaError
from tta_runtime.link import BUSY, DRAINING, DUPLICATE, NOT_GREETED


class CloudError(TtaError):
    """The cloud service cannot do this."""

    code = "cloud"


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
