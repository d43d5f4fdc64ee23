"""Every error that leaves vcnode, as one tree.

::

    VcnodeError
     +-- RequestError                   the caller must change something
     |    +-- InvalidArgumentError      400  does not match the schema, or a bad value
     |    +-- PermissionDeniedError     403  the node's policy forbids it; names the rule
     |    +-- NotFoundError             404  no such pod, container, image
     |    +-- AlreadyExistsError        409  same id, different content
     |    +-- FailedPreconditionError   412  wrong state; says which states allow it
     |    +-- AbortedError              409  another command holds this pod          (retryable)
     |    +-- ResourceExhaustedError    429  no memory, slots, space                 (retryable)
     |    +-- UnsupportedError          501  the driver declares that it lacks this
     +-- NodeError                      the node could not do it
          +-- UnavailableError          503  draining, or a connection was lost      (retryable)
          +-- DeadlineExceededError     504  outcome unknown: ask for the status first
          +-- DriverError               500  a driver failed; carries driver and operation
          |    +-- HypervisorError, AgentError, NetworkError, StorageError
          +-- CleanupError              500  something is left; delete again

``code`` is for programs, ``number`` goes to the ``Nats-Service-Error-Code`` header, ``message`` is one
sentence that is safe to show to the caller, ``details`` holds the same facts as data. Drivers translate
foreign exceptions at their own edge with ``raise ... from exc``; nobody branches on message text.
``CancelledError`` is never wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class VcnodeError(Exception):
    """Base of all errors of vcnode; never raised itself.

    Args:
        message: One sentence, capital first, naming the object and the value; says what to do.
        details: The same facts as JSON data, for programs.
    """

    code: ClassVar[str] = "internal"
    number: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details


class RequestError(VcnodeError):
    """The request cannot be carried out as it stands; the caller must change something."""

    code = "invalid_argument"
    number = 400


class InvalidArgumentError(RequestError):
    """The request does not match its schema, or a value is out of bounds.

    ``details["violations"]`` lists ``{"field": "spec.id", "message": "..."}``.
    """

    @classmethod
    def field(cls, field: str, message: str) -> InvalidArgumentError:
        """Build the error for one bad *field* (dotted path as in the request)."""
        return cls(f"{field}: {message}", violations=[{"field": field, "message": message}])


class PermissionDeniedError(RequestError):
    """The node's policy forbids what the request asks for, whoever asks.

    ``details``: ``rule`` (the setting that forbids it), ``field``, and ``denials`` with all of them.
    """

    code = "permission_denied"
    number = 403


class NotFoundError(RequestError):
    """The named pod, container or image does not exist on this node."""

    code = "not_found"
    number = 404


class AlreadyExistsError(RequestError):
    """The id is taken by an object with different content (the same content would be a success)."""

    code = "already_exists"
    number = 409


class FailedPreconditionError(RequestError):
    """The object is in a state that does not allow the command.

    ``details``: ``state`` (the actual one) and ``allowed`` (the states that would do) where states matter.
    """

    code = "failed_precondition"
    number = 412

    @classmethod
    def state(cls, what: str, state: str, allowed: Iterable[str], verb: str) -> FailedPreconditionError:
        """Build the error for *verb* on *what*, which is in *state* and not in one of *allowed*."""
        names = sorted(allowed)
        hint = ": resume it first" if state == "paused" and "running" in names else ""
        return cls(
            f"{what} is {state}; {verb} needs it to be {' or '.join(names) or 'in another state'}{hint}.",
            state=state,
            allowed=names,
        )


class AbortedError(RequestError):
    """Another command holds this pod, or overtook this one. Ask again later with the same command id."""

    code = "aborted"
    number = 409
    retryable = True


class ResourceExhaustedError(RequestError):
    """The node is short of something now: slots, memory, space. ``details`` says what and how much."""

    code = "resource_exhausted"
    number = 429
    retryable = True


class UnsupportedError(RequestError):
    """The chosen driver declares that it cannot do this."""

    code = "not_implemented"
    number = 501


class NodeError(VcnodeError):
    """The request was fine; the node could not carry it out."""


class UnavailableError(NodeError):
    """The node is draining or lost a connection that the command needs."""

    code = "unavailable"
    number = 503
    retryable = True


class DeadlineExceededError(NodeError):
    """The deadline passed first. The outcome is unknown to the caller: ask for the status."""

    code = "deadline_exceeded"
    number = 504


class DriverError(NodeError):
    """A driver failed. The cause is chained; the message names the operation, not the cause."""

    driver: ClassVar[str] = "driver"


class HypervisorError(DriverError):
    """The VM could not be started, reached, changed or ended."""

    driver = "hypervisor"


class AgentError(DriverError):
    """The guest agent failed, broke the protocol, or went silent."""

    driver = "agent"


class NetworkError(DriverError):
    """The network of a pod could not be set up, changed or removed."""

    driver = "network"


class StorageError(DriverError):
    """A shared directory or an image could not be prepared or removed."""

    driver = "storage"


class CleanupError(NodeError):
    """An undo failed: the pod stays listed as ``failed`` with leftovers; delete it again."""

    def __init__(self, message: str, leftovers: Iterable[str], **details: Any) -> None:
        super().__init__(message, leftovers=list(leftovers), **details)


def _leaves(cls: type[VcnodeError]) -> Iterable[type[VcnodeError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _leaves(sub)


def from_code(code: str, message: str, details: Mapping[str, Any]) -> VcnodeError:
    """Build the error that a peer described by *code*; the base error for codes that are not known here."""
    by_code: dict[str, type[VcnodeError]] = {}
    for cls in _leaves(VcnodeError):
        if cls not in (RequestError, NodeError, CleanupError) and not issubclass(cls, DriverError):
            by_code.setdefault(cls.code, cls)
    error = by_code.get(code, NodeError)(message)
    error.details.update(details)  # not as keywords: a peer may use any name
    return error
