"""Everything that travels over the bus, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, create_model

from vcnode.models.commands import COMMANDS
from vcnode.models.events import Event, EventKind
from vcnode.models.facts import event_data
from vcnode.models.node import NodeLease
from vcnode.models.pod import PodStatus
from vcnode.models.wire import ErrorReply

Direction = Literal["to_node", "from_node"]


@dataclass(frozen=True, slots=True)
class Payload:
    """One kind of message body."""

    name: str
    """Names its schema: ``pod.run.request``, ``pod.run.reply``, ``event.pod.started``, ``error``, …"""
    model: type[BaseModel]
    """What it is in Python."""
    direction: Direction
    """``to_node``: unknown fields are refused. ``from_node``: readers ignore fields that they do not know."""
    summary: str
    """One sentence."""


def _event(kind: EventKind) -> type[BaseModel]:
    """The envelope with what the kind fixes of it."""
    name = "".join(word.title() for word in kind.value.replace("_", ".").split(".")) + "Event"
    fields: dict[str, Any] = {
        "type": (Literal[f"vcnode.{kind.value}"], ...),
        "data": (event_data(kind), ...),
    }
    return create_model(name, __base__=Event, __doc__=f"Event ``{kind.value}``, a CloudEvent.", **fields)


def _all() -> list[Payload]:
    found: list[Payload] = []
    for command in COMMANDS.values():
        found.append(
            Payload(f"{command.verb}.request", command.request, "to_node", f"Request: {command.summary}")
        )
        found.append(
            Payload(f"{command.verb}.reply", command.reply, "from_node", f"Reply of {command.verb}.")
        )
    found.extend(
        Payload(f"event.{kind.value}", _event(kind), "from_node", f"Event {kind.value}.")
        for kind in EventKind
    )
    found.append(Payload("error", ErrorReply, "from_node", "Reply of a command that failed."))
    found.append(Payload("kv.pods", PodStatus, "from_node", "Last status of a pod, in the bucket of pods."))
    found.append(Payload("kv.nodes", NodeLease, "from_node", "Lease of a node, in the bucket of nodes."))
    return found


PAYLOADS: dict[str, Payload] = {payload.name: payload for payload in _all()}
"""Every payload by its name."""
