"""What the data of each kind of event is."""

from __future__ import annotations

from pydantic import BaseModel

from vcnode.models.audit import AuditRecord
from vcnode.models.base import JsonObject, Reply
from vcnode.models.events import EventKind
from vcnode.models.fleet import DrainProgress, DrainReport, NodeStanding
from vcnode.models.image import PullProgress
from vcnode.models.node import ImageStatus, NodeInfo
from vcnode.models.pod import ContainerStatus, PodState, PodStatus
from vcnode.models.wire import ErrorReply


class ContainerGone(Reply):
    """Data of ``container.deleted``."""

    pod_id: str
    """Pod that held it."""
    container_id: str
    """The container."""


class SessionNews(Reply):
    """Data of ``pod.session_lost`` and ``pod.session_restored``."""

    pod_id: str
    """The pod, whose VM and containers go on."""
    state: PodState
    """Its state, which has not changed."""
    reason: str | None = None
    """Why the session was lost."""


class ImagePulling(PullProgress):
    """Data of ``image.pulling``."""

    name: str
    """Name that the image is going to have."""
    reference: str
    """Where it is pulled from."""


class CommandOutcome(Reply):
    """Data of ``command.done``, ``command.rejected`` and ``command.expired``."""

    verb: str
    """The command, or what stood in its place."""
    command_id: str
    """Its id."""
    ok: bool
    """Whether it succeeded."""
    code: str
    """``ok``, or the error's code."""
    duplicate: bool
    """Whether another message had brought the same command before."""
    deliveries: int
    """How often it was begun, less the times when a stop of the node agent has undone it."""
    error: ErrorReply | None = None
    """Why it did not succeed."""
    reply: JsonObject | None = None
    """The reply, as ``rpc`` would have given it, unless it is too long for an event."""
    reply_bytes: int | None = None
    """Size of a reply that is too long; the same command id over ``rpc`` gets it."""


class NodeFacts(NodeInfo):
    """Data of ``node.started`` and ``node.stopping``."""


class NodeRecovered(Reply):
    """Data of ``node.recovered``."""

    node: str
    """Its name."""
    adopted: tuple[str, ...]
    """Pods whose VM was found alive and goes on."""
    failed: tuple[str, ...]
    """Pods whose VM had died."""
    undone: tuple[str, ...]
    """Pods of which something was half done, which was undone."""
    restored: tuple[str, ...]
    """Pods that the database lacked, or knew in an earlier state; their VMs' notes told of them."""
    reaped: tuple[str, ...]
    """What was nobody's on the host and was removed, as kind and name."""


class DatabaseRebuilt(Reply):
    """Data of ``node.database_rebuilt``."""

    node: str
    """Its name."""
    reason: str
    """What was wrong with the database."""
    kept_aside: str
    """Path of the damaged one on the host."""
    carried_over: dict[str, int]
    """Rows that could be read, by table."""


_SPECIAL: dict[EventKind, type[BaseModel]] = {
    EventKind.POD_SESSION_LOST: SessionNews,
    EventKind.POD_SESSION_RESTORED: SessionNews,
    EventKind.CONTAINER_DELETED: ContainerGone,
    EventKind.IMAGE_PULLING: ImagePulling,
    EventKind.COMMAND_DONE: CommandOutcome,
    EventKind.COMMAND_EXPIRED: CommandOutcome,
    EventKind.COMMAND_REJECTED: CommandOutcome,
    EventKind.AUDIT_DONE: AuditRecord,
    EventKind.AUDIT_FAILED: AuditRecord,
    EventKind.AUDIT_DENIED: AuditRecord,
    EventKind.NODE_STARTED: NodeFacts,
    EventKind.NODE_STOPPING: NodeFacts,
    EventKind.NODE_RECOVERED: NodeRecovered,
    EventKind.NODE_LABELLED: NodeStanding,
    EventKind.NODE_CORDONED: NodeStanding,
    EventKind.NODE_UNCORDONED: NodeStanding,
    EventKind.NODE_DRAINING: DrainProgress,
    EventKind.NODE_DRAINED: DrainReport,
    EventKind.NODE_DATABASE_REBUILT: DatabaseRebuilt,
}
_BY_GROUP: dict[str, type[BaseModel]] = {"pod": PodStatus, "container": ContainerStatus, "image": ImageStatus}


def event_data(kind: EventKind) -> type[BaseModel]:
    """The model of the data of an event: the status of what it is about, unless the kind has its own.

    Raises:
        KeyError: Nothing is written here about the kind.
    """
    return _SPECIAL.get(kind) or _BY_GROUP[kind.partition(".")[0]]
