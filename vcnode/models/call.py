"""What comes with a command besides its request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """One command as it arrived: who it is, and what its sender demands of it."""

    command_id: str
    """Idempotency key; events that the command causes carry it as ``commandid``.
    Empty: nobody has asked for it."""
    verb: str
    """Such as ``pod.create``."""
    deadline: float | None = None
    """Loop time at which the sender stops waiting; None: it does not say."""
    expected_revision: int | None = None
    """The pod's revision must be this one, or the command is refused."""
    traceparent: str | None = None
    """W3C trace context of its effects: that of the node's span where spans are made, else as received."""
