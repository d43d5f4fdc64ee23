"""What each side may do on the NATS server: ready-made permissions for nodes, schedulers and observers. Pure.

Each user gets a place of its own for replies (setting ``nats.inbox_prefix``), so that nobody reads another's.
Of JetStream's API a node may use only what names itself: the filter of a consumer and the key of a look-up
are part of the API's subjects (NATS ADR-31, ADR-8, and nats-server's
``$JS.API.CONSUMER.CREATE.<stream>.<consumer>.<filter>``, 2.9 and later).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vcnode.models.subjects import Subjects


class Role(StrEnum):
    """Whose permissions."""

    NODE = "node"
    """A node agent: takes its own commands, publishes its own events and values. Reads nobody else's."""
    SCHEDULER = "scheduler"
    """Commands every node and reads everything. Publishes no event and no value."""
    OBSERVER = "observer"
    """Reads events and values. Commands nobody."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a user may publish and subscribe to."""

    publish: tuple[str, ...]
    """Subjects that it may publish on."""
    subscribe: tuple[str, ...]
    """Subjects that it may subscribe to."""
    inbox_prefix: str
    """What its ``nats.inbox_prefix`` must be."""
    responses: bool = False
    """Whether it may answer on the reply subject of what it has received."""

    def as_config(self) -> str:
        """The value of ``permissions`` in a nats-server configuration."""
        lines = [
            "{",
            f"  publish: {{ allow: [{_quoted(self.publish)}] }}",
            f"  subscribe: {{ allow: [{_quoted(self.subscribe)}] }}",
        ]
        if self.responses:
            lines.append(f'  allow_responses: {{ max: {MAX_RESPONSES}, expires: "{RESPONSE_S}s" }}')
        return "\n".join([*lines, "}"])

    def as_claims(self) -> dict[str, object]:
        """The part of a user's JWT that grants them (nats-io/jwt, version 2)."""
        made: dict[str, object] = {
            "pub": {"allow": list(self.publish)},
            "sub": {"allow": list(self.subscribe)},
        }
        if self.responses:
            made["resp"] = {"max": MAX_RESPONSES, "ttl": RESPONSE_S * 1_000_000_000}
        return made


RESPONSE_S = 3600
"""Seconds for which a command may be answered."""
MAX_RESPONSES = 1
"""A command has one reply."""


def permissions(role: Role, name: str, subjects: Subjects) -> Permissions:
    """What a user of that role may do.

    Args:
        role: What it is.
        name: The node's name; for the others, any token that no other user has.
        subjects: The names under the prefix.

    Raises:
        ValueError: The name cannot be one token of a subject.
    """
    inbox = f"_INBOX_{role.value}_{name}"
    subjects.rpc(name, "node.ping")  # checks the name
    make = {Role.NODE: _node, Role.SCHEDULER: _scheduler, Role.OBSERVER: _observer}[role]
    return make(name, inbox, subjects)


def _node(name: str, inbox: str, subjects: Subjects) -> Permissions:
    prefix, events, commands = subjects.prefix, subjects.event_stream, subjects.command_stream
    pods, nodes = (f"KV_{bucket}" for bucket in (subjects.pod_bucket, subjects.node_bucket))
    own_pods, own_lease = f"$KV.{subjects.pod_bucket}.{name}.>", f"$KV.{subjects.node_bucket}.{name}"
    own_events = subjects.node_events(name)
    return Permissions(
        publish=(
            own_events,
            f"{prefix}.io.{name}.>",
            own_pods,
            own_lease,
            *_looks_at(events, commands, pods, nodes),
            *(f"$JS.API.STREAM.CREATE.{stream}" for stream in (events, commands, pods, nodes)),
            f"$JS.API.DIRECT.GET.{events}.{own_events}",
            f"$JS.API.DIRECT.GET.{nodes}.{own_lease}",
            f"$JS.API.CONSUMER.CREATE.{events}.{subjects.published_consumer(name)}.{own_events}",
            f"$JS.API.CONSUMER.DELETE.{events}.{subjects.published_consumer(name)}",
            f"$JS.API.CONSUMER.CREATE.{pods}.*.{own_pods}",
            f"$JS.API.CONSUMER.CREATE.{commands}.{name}.{subjects.node_commands(name)}",
            f"$JS.API.CONSUMER.INFO.{commands}.{name}",
            f"$JS.API.CONSUMER.DELETE.{commands}.{name}",
            f"$JS.API.CONSUMER.MSG.NEXT.{commands}.{name}",
            f"$JS.ACK.{commands}.{name}.>",
        ),
        subscribe=(
            f"{inbox}.>",
            f"{prefix}.rpc.{name}.>",
            f"{prefix}.all.>",
            f"{prefix}.io.{name}.>",
            "$SRV.>",
        ),
        inbox_prefix=inbox,
        responses=True,
    )


def _scheduler(name: str, inbox: str, subjects: Subjects) -> Permissions:
    prefix = subjects.prefix
    reading = _observer(name, inbox, subjects)
    return Permissions(
        publish=(
            f"{prefix}.rpc.>",
            f"{prefix}.cmd.>",
            f"{prefix}.all.>",
            f"{prefix}.io.>",
            "$SRV.>",
            *reading.publish,
        ),
        subscribe=(*reading.subscribe, f"{prefix}.io.>"),
        inbox_prefix=inbox,
    )


def _observer(name: str, inbox: str, subjects: Subjects) -> Permissions:
    events = subjects.event_stream
    buckets = [f"KV_{bucket}" for bucket in (subjects.pod_bucket, subjects.node_bucket)]
    return Permissions(
        publish=(
            *_looks_at(events, *buckets),
            *(f"$JS.API.CONSUMER.CREATE.{stream}" for stream in (events, *buckets)),
            *(f"$JS.API.CONSUMER.CREATE.{stream}.>" for stream in (events, *buckets)),
            *(
                f"$JS.API.CONSUMER.{act}.{stream}.*"
                for act in ("INFO", "DELETE")
                for stream in (events, *buckets)
            ),
            *(f"$JS.API.DIRECT.GET.{stream}.>" for stream in (events, *buckets)),
            f"$JS.FC.{events}.>",
            *(f"$JS.FC.{bucket}.>" for bucket in buckets),
        ),
        subscribe=(f"{inbox}.>", subjects.every_event),
        inbox_prefix=inbox,
    )


def _looks_at(*streams: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.STREAM.INFO.{stream}" for stream in streams)


def _quoted(subjects: tuple[str, ...]) -> str:
    return ", ".join(f'"{subject}"' for subject in subjects)
