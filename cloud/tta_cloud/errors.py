"""Every refusal of the cloud service by name; see tta_runtime.errors for the tree."""

from __future__ import annotations

from tta_runtime.errors import ConfigError, StateError, TtaError


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
