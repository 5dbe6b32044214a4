"""Every refusal of the edge by name. Each carries its cause, with both values, and what to do about it."""

from __future__ import annotations

from tta_runtime.errors import AddressInUse as AddressInUse
from tta_runtime.errors import BadEndpoint as BadEndpoint
from tta_runtime.errors import CannotBind as CannotBind
from tta_runtime.errors import RemoteBindRefused as RemoteBindRefused
from tta_runtime.errors import StartError as StartError
from tta_runtime.errors import TtaError


class ServiceError(TtaError):
    """The daemon understood the request and does not carry it out."""

    code = "service"


class Busy(ServiceError):
    """The queue is full; nothing was computed. `retry_after_s` says when a place is likely to be free."""

    code = "busy"
    retry_after_s: float | None = None


class Draining(ServiceError):
    """The daemon is shutting down and takes no new requests."""

    code = "draining"


class DuplicateRequest(ServiceError):
    """A peer re-used the id of a request that is still open."""

    code = "duplicate-request"


class UnknownStream(ServiceError):
    """A message names a stream that has no state here."""

    code = "unknown-stream"


class UnknownBundle(ServiceError):
    """A message names a bundle that this daemon does not serve."""

    code = "unknown-bundle"


class TooManyStreams(ServiceError):
    """One more stream would exceed `max_streams`, and none can go to disk."""

    code = "too-many-streams"


class UnknownSession(ServiceError):
    """A message names a session that has absorbed nothing here."""

    code = "unknown-session"


class SessionExists(ServiceError):
    """A session of that name is there already; an import replaces none."""

    code = "session-exists"


class TooManySessions(ServiceError):
    """One more session would exceed `max_sessions` or `max_session_bytes`, and none can go to disk."""

    code = "too-many-sessions"


class Cancelled(ServiceError):
    """The client has cancelled the request; nothing has changed."""

    code = "cancelled"


class ReloadUnderWay(ServiceError):
    """Another reload of the same bundle has not finished."""

    code = "reload-under-way"


class Internal(ServiceError):
    """A defect of the daemon; its log holds the trace."""

    code = "internal"


class StateDirUnusable(StartError):
    """The state directory cannot be made, read or written."""

    code = "state-dir-unusable"


class StateDirInUse(StartError):
    """Another daemon uses the state directory."""

    code = "state-dir-in-use"


class ModeRefused(StartError):
    """The mode and the method do not go together."""

    code = "mode-refused"


class SpoolError(TtaError):
    """Samples that wait for upload cannot be kept, read or removed."""

    code = "spool"


class SampleRefused(SpoolError):
    """A sample is not of a form that the spool takes, or larger than it may ever hold."""

    code = "sample-refused"


class SpoolDamaged(SpoolError):
    """A record of a waiting sample is not what was written."""

    code = "spool-damaged"


class SpoolUnwritable(SpoolError):
    """The operating system refuses to make or to write the spool; what was reported durable is unchanged."""

    code = "spool-unwritable"


class SpoolUnreadable(SpoolError):
    """The operating system refuses to read the spool."""

    code = "spool-unreadable"


class SpoolInUse(SpoolError):
    """Another process is rewriting files of the spool."""

    code = "spool-in-use"


class ClientError(TtaError):
    """A call of the client library failed."""

    code = "client"


class Unreachable(ClientError):
    """Nothing that speaks this protocol accepts connections at the endpoint."""

    code = "unreachable"


class DeadlineExceeded(ClientError):
    """The daemon was reached but did not answer in time."""

    code = "deadline-exceeded"


class ConnectionLost(ClientError):
    """The connection broke while a request was open: nobody knows whether it was carried out."""

    code = "connection-lost"


class ClientClosed(ClientError):
    """The client was closed before the call, or while it was under way."""

    code = "client-closed"


class RemoteError(ClientError):
    """The daemon answered with an error whose code this version does not know."""

    code = "remote"


class NotEnrolled(StartError):
    """The mode needs a cloud, and this edge is not known to any."""

    code = "not-enrolled"


class EnrolmentRefused(StartError):
    """The cloud does not take the token, or this state directory is enrolled already."""

    code = "enrolment-refused"


class CloudUnreachable(StartError):
    """Nobody answers at the cloud's door."""

    code = "cloud-unreachable"
