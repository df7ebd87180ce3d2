"""What a call can end with, other than its answer: one class for each thing that a caller should do.

A block that is not there is no error; see :class:`kvd.Miss`.
"""


class KvdError(Exception):
    """A fault. ``code`` is stable (``KVD-1012``; ``kvctl explain KVD-1012`` says more), ``retry_after`` is in
    seconds, or ``None``."""

    def __init__(self, message: str = "", *, code: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class NotFound(KvdError, LookupError):
    """What was named does not exist. Register or store it first."""


class Busy(KvdError):
    """Too much at once. Try again after ``retry_after``."""


class Full(KvdError):
    """No room under the limits. Free something or raise the limit."""


class Moved(KvdError):
    """It is served elsewhere. Ask there."""


class Fenced(KvdError):
    """The session belongs to an earlier life of the daemon. The session reconnects by itself; ask again."""


class LeaseExpired(KvdError):
    """The lease ended. Acquire again."""


class Corrupt(KvdError):
    """The bytes are not what was stored. Recompute."""


class Invalid(KvdError, ValueError):
    """The request makes no sense. Mend the caller."""


class Unsupported(KvdError):
    """This daemon does not do that."""


class DeadlineExceeded(KvdError, TimeoutError):
    """The deadline passed, and the operation has ended. Recompute, or allow more time."""


class Unavailable(KvdError, ConnectionError):
    """The daemon cannot be reached or is draining. Recompute, and try again later."""


class Denied(KvdError, PermissionError):
    """The caller may not do that."""


class Internal(KvdError):
    """A defect of kvd. Recompute, and report the code."""
