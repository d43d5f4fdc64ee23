"""Events: CloudEvents 1.0 in JSON, one kind per status change.

Source: CloudEvents 1.0.2 core and JSON format; extension ``sequence``/``sequencetype`` after the
CloudEvents *sequence* extension, ``traceparent`` after *distributed tracing*.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import ConfigDict

from vcnode.models.base import JsonObject, Moment, Reply


class EventKind(StrEnum):
    """Every kind of event; also the middle of its subject."""

    POD_CREATED = "pod.created"
    POD_STARTING = "pod.starting"
    POD_STARTED = "pod.started"
    POD_PAUSED = "pod.paused"
    POD_RESUMED = "pod.resumed"
    POD_RESIZED = "pod.resized"
    POD_VOLUME_ATTACHED = "pod.volume_attached"
    POD_VOLUME_DETACHED = "pod.volume_detached"
    """Its memory is another."""
    POD_STOPPING = "pod.stopping"
    POD_STOPPED = "pod.stopped"
    POD_FAILED = "pod.failed"
    POD_RESTARTING = "pod.restarting"
    """Its restart policy is going to start it again, at ``restart_at``."""
    POD_RESTART_CANCELLED = "pod.restart_cancelled"
    POD_DELETED = "pod.deleted"
    POD_SESSION_LOST = "pod.session_lost"
    POD_SESSION_RESTORED = "pod.session_restored"
    CONTAINER_CREATED = "container.created"
    CONTAINER_STARTED = "container.started"
    CONTAINER_READY = "container.ready"
    """Its probes say that it is ready; a container without probes is ready when it is started."""
    CONTAINER_UNREADY = "container.unready"
    CONTAINER_PAUSED = "container.paused"
    CONTAINER_RESUMED = "container.resumed"
    CONTAINER_UPDATED = "container.updated"
    """Its limits are others."""
    CONTAINER_EXITED = "container.exited"
    CONTAINER_RESTARTING = "container.restarting"
    """Its restart policy is going to start it again, at ``restart_at``."""
    CONTAINER_RESTART_CANCELLED = "container.restart_cancelled"
    CONTAINER_DELETED = "container.deleted"
    IMAGE_PULLING = "image.pulling"
    IMAGE_PULLED = "image.pulled"
    IMAGE_IMPORTED = "image.imported"
    IMAGE_REMOVED = "image.removed"
    COMMAND_DONE = "command.done"
    """A durable command has ended, well or not."""
    COMMAND_EXPIRED = "command.expired"
    """A durable command was not begun: its deadline had passed."""
    COMMAND_REJECTED = "command.rejected"
    """A durable command was not begun: it can never be carried out."""
    AUDIT_DONE = "audit.done"
    """A command that may change something has succeeded."""
    AUDIT_FAILED = "audit.failed"
    AUDIT_DENIED = "audit.denied"
    """The node's policy forbids what it asked for."""
    NODE_STARTED = "node.started"
    NODE_STOPPING = "node.stopping"
    NODE_RECOVERED = "node.recovered"
    NODE_LABELLED = "node.labelled"
    NODE_CORDONED = "node.cordoned"
    NODE_UNCORDONED = "node.uncordoned"
    NODE_DRAINING = "node.draining"
    """A drain has begun, or is done with one more pod."""
    NODE_DRAINED = "node.drained"
    NODE_DATABASE_REBUILT = "node.database_rebuilt"
    """The database was damaged; a new one took its place with what could be read of it."""


class Event(Reply):
    """One event as it is published."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    specversion: str = "1.0"
    """CloudEvents version."""
    id: str
    """``<node>-<sequence>``: unique as long as the node keeps its state directory. With the time behind it,
    the ``Nats-Msg-Id`` that JetStream de-duplicates by."""
    source: str
    """``/vcnode/<node>``."""
    type: str
    """``vcnode.`` and the kind, such as ``vcnode.pod.started``."""
    subject: str
    """``<pod>``, ``<pod>/<container>``, ``image/<name>``, ``command/<command id>``, or the node's name."""
    time: Moment
    """When it happened (not when it was published)."""
    datacontenttype: str = "application/json"
    """Always JSON."""
    sequence: str
    """Position in this node's stream of events, without gaps, as a decimal number."""
    sequencetype: str = "Integer"
    """Always ``Integer``."""
    epoch: int
    """The node's epoch when it happened."""
    mock: bool = False
    """True when the node only pretends to run VMs."""
    commandid: str | None = None
    """The command that caused it, if one did."""
    traceparent: str | None = None
    """W3C trace context of that command, if it has one."""
    data: JsonObject
    """The status after the change (``PodStatus``, ``ContainerStatus``, …) or the facts of the event."""

    @property
    def kind(self) -> str:
        """The type without its prefix, such as ``pod.started``."""
        return self.type.removeprefix("vcnode.")

    @property
    def message_id(self) -> str:
        """What JetStream knows it by. The time tells it from one of an earlier state directory."""
        return f"{self.id}@{self.time.isoformat()}"
