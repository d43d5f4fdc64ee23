"""Who asked what, and how it ended: the data of the events ``audit.*``."""

from __future__ import annotations

from typing import Literal

from vcnode.models.base import Moment, Reply


class Actor(Reply):
    """Who sent a command, as far as the node can know it."""

    account: str | None = None
    """NATS account. The server tells it, and the other fields but ``claim``, in ``Nats-Request-Info``, which
    it adds to what one account imports from another."""
    user: str | None = None
    """User name, or public nkey, on the NATS server; with ``share`` set on the import only."""
    client_id: int | None = None
    """Number of the connection on its NATS server; as ``user``."""
    client_name: str | None = None
    """Name that the connection gave itself."""
    host: str | None = None
    """Address that the connection comes from; as ``user``."""
    verified: bool = False
    """Whether that comes from the NATS server beyond doubt: the node is told (``nats.trust_request_info``)
    that nobody in its own account may send it commands."""
    claim: str | None = None
    """What the sender said of himself in the header ``Vcnode-Actor``; nobody has checked it."""


class AuditRecord(Reply):
    """A command that may change something, once it has ended."""

    verb: str
    """The command."""
    command_id: str
    """Its id; the events that it has caused carry it as ``commandid``."""
    way: Literal["rpc", "cmd"]
    """Whether it came by request or through the queue of durable commands."""
    actor: Actor = Actor()
    """Who sent it."""
    names: dict[str, str] = {}
    """What it is about, as far as it says: ``pod_id``, ``container_id``, ``name`` and ``reference`` (of an
    image), ``session_id``."""
    digest: str
    """SHA-256 of its body as canonical JSON (sorted names, no spaces, passwords as ``***``): tells two bodies
    apart without telling what they hold."""
    received_at: Moment
    """When it came, by the node's clock."""
    ok: bool
    """Whether it succeeded."""
    code: str
    """``ok``, or the error's code."""
    rule: str | None = None
    """The setting that denied it."""
    message: str | None = None
    """The error's message."""
    traceparent: str | None = None
    """W3C trace context of the command, if it has one."""
