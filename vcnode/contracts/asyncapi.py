"""The AsyncAPI 3.0 document: every subject, and what travels on it.

It is written from the node's side: it *receives* commands and *sends* events. Subjects hold two variables,
the prefix and the node's name, and those of events the ids that they are about.

Source: AsyncAPI specification 3.0.0; the NATS subject of a channel is its ``address``.
"""

from __future__ import annotations

import vcnode
from vcnode.contracts.schemas import VERSION
from vcnode.models import wire
from vcnode.models.base import JsonObject
from vcnode.models.commands import BROADCAST, COMMANDS, Command
from vcnode.models.events import EventKind
from vcnode.models.subjects import PARTS, SHARES

_PARAMETERS: dict[str, str] = {
    "prefix": "First token of every subject; the setting `nats.prefix`, by default `vcnode`.",
    "node": "Name of the node.",
    "pod": "Id of the pod.",
    "container": "Id of the container, unique within its pod.",
    "share": f"0 to {SHARES - 1}; see docs/fleet.md.",
    "part": f"0 to {PARTS - 1}.",
}

_REQUEST_HEADERS: dict[str, JsonObject] = {
    wire.COMMAND_ID: {
        "type": "string",
        "pattern": f"^{wire.COMMAND_ID_PATTERN}$",
        "description": "Idempotency key: the same id gets the same reply, and is carried out once. Made by "
        "the node when absent.",
    },
    wire.DEADLINE: {
        "type": "string",
        "format": "date-time",
        "description": "When the caller stops waiting; the command is then undone.",
    },
    wire.EXPECTED_REVISION: {
        "type": "string",
        "pattern": "^[0-9]{1,18}$",
        "description": "The command is refused unless the pod has this revision.",
    },
    wire.TRACEPARENT: {"type": "string", "description": "W3C trace context."},
    wire.ACTOR: {
        "type": "string",
        "pattern": "^[ -~]{1,256}$",
        "description": "Who sends it, by his own word; audit events have it as a claim.",
    },
    wire.REQUEST_INFO: {
        "type": "string",
        "description": "Who sends it, as JSON; added by the NATS server to what comes from another account.",
    },
}
_REPLY_HEADERS: dict[str, JsonObject] = {
    wire.COMMAND_ID: {"type": "string", "description": "Id of the command, given or made."},
    wire.DUPLICATE: {
        "type": "string",
        "const": "true",
        "description": "Present when the id had been seen before: nothing was done for this message.",
    },
}
_ERROR_HEADERS: dict[str, JsonObject] = {
    **_REPLY_HEADERS,
    wire.SERVICE_ERROR: {"type": "string", "description": "The error's message (NATS ADR-32)."},
    wire.SERVICE_ERROR_CODE: {
        "type": "string",
        "pattern": "^[0-9]{3}$",
        "description": "The error's number (NATS ADR-32).",
    },
}
_EVENT_HEADERS: dict[str, JsonObject] = {
    "Nats-Msg-Id": {
        "type": "string",
        "description": "The event's id and time: JetStream stores a message of the same id once.",
    },
}


def document() -> JsonObject:
    """The whole document, as data."""
    made: JsonObject = {
        "asyncapi": "3.0.0",
        "id": "urn:vcnode",
        "info": {
            "title": "vcnode",
            "version": f"{VERSION}.0.0",
            "description": "What a vcnode node agent takes and sends over NATS. Bodies are JSON. What makes "
            f"a change a breaking one stands in contracts/README.md. As of vcnode {vcnode.__version__}.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "nats-server 2.10 or later; JetStream for durable commands and kept events.",
            }
        },
        "channels": {},
        "operations": {},
        "components": {"messages": {}},
    }
    messages = made["components"]["messages"]
    messages["error"] = _message("error", _ERROR_HEADERS)
    for command in COMMANDS.values():
        _add_command(made, command)
    for kind in EventKind:
        _add_event(made, kind)
    _add_buckets(made)
    return made


def _message(name: str, headers: dict[str, JsonObject], **more: object) -> JsonObject:
    return {
        "name": name,
        "headers": {"type": "object", "properties": headers},
        "payload": {"$ref": f"./schemas/{name}.json"},
        **more,
    }


def _channel(address: str | None, messages: dict[str, str], description: str) -> JsonObject:
    made: JsonObject = {
        "address": address,
        "description": description,
        "messages": {key: {"$ref": f"#/components/messages/{name}"} for key, name in messages.items()},
    }
    if used := [name for name in _PARAMETERS if address and f"{{{name}}}" in address]:
        made["parameters"] = {name: {"description": _PARAMETERS[name]} for name in used}
    return made


def _add_command(made: JsonObject, command: Command) -> None:
    verb = command.verb
    request, reply = f"{verb}.request", f"{verb}.reply"
    messages, channels, operations = made["components"]["messages"], made["channels"], made["operations"]
    messages[request] = _message(request, _REQUEST_HEADERS, summary=command.summary)
    messages[reply] = _message(reply, _REPLY_HEADERS)
    channels[reply] = _channel(
        None, {"reply": reply, "error": "error"}, "The inbox that the request names as its reply subject."
    )
    ways = {"rpc": (f"{{prefix}}.rpc.{{node}}.{verb}", "Immediate: request and reply.")}
    if command.mutates:
        ways["cmd"] = (
            f"{{prefix}}.cmd.{{node}}.{verb}",
            "Durable: JetStream keeps it until it is done; the outcome is an event of kind `command.done`, "
            "`command.rejected` or `command.expired`.",
        )
    if verb in BROADCAST:
        ways["all"] = (f"{{prefix}}.all.{verb}", "Asks every node; each that can answers.")
        ways["share"] = (
            f"{{prefix}}.all.{verb}.{{share}}",
            "Asks the nodes of one share: those whose name's SHA-256 begins with this byte.",
        )
        ways["part"] = (
            f"{{prefix}}.all.{verb}.{{share}}.{{part}}",
            f"Asks the nodes of one part of a share: by the second byte modulo {PARTS}.",
        )
    for way, (address, description) in ways.items():
        channel = f"{way}.{verb}"
        channels[channel] = _channel(address, {"request": request}, description)
        operation: JsonObject = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": command.summary,
            "messages": [{"$ref": f"#/channels/{channel}/messages/request"}],
        }
        if way != "cmd":
            operation["reply"] = {
                "channel": {"$ref": f"#/channels/{reply}"},
                "messages": [
                    {"$ref": f"#/channels/{reply}/messages/reply"},
                    {"$ref": f"#/channels/{reply}/messages/error"},
                ],
            }
        operations[channel] = operation


def _add_event(made: JsonObject, kind: EventKind) -> None:
    name = f"event.{kind.value}"
    tail = {"pod": ".{pod}", "container": ".{pod}.{container}"}.get(kind.value.partition(".")[0], "")
    made["components"]["messages"][name] = _message(name, _EVENT_HEADERS)
    made["channels"][name] = _channel(
        f"{{prefix}}.evt.{{node}}.{kind.value}{tail}",
        {"event": name},
        "A status change, numbered per node without gaps; kept by the JetStream stream `{prefix}-events`.",
    )
    made["operations"][name] = {
        "action": "send",
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": [{"$ref": f"#/channels/{name}/messages/event"}],
    }


def _add_buckets(made: JsonObject) -> None:
    for name, key, what in (
        ("kv.pods", "{node}.{pod}", "Last status of every pod."),
        ("kv.nodes", "{node}", "Lease of every node; gone when it was not renewed in time."),
    ):
        bucket = name.removeprefix("kv.")
        made["components"]["messages"][name] = _message(name, {})
        made["channels"][name] = _channel(
            f"$KV.{{prefix}}-{bucket}.{key}",
            {"value": name},
            f"{what} JetStream KV bucket `{{prefix}}-{bucket}`.",
        )
        made["operations"][name] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/value"}],
        }
