"""The API reference for people: every command, event, error and type on one page, made from the schemas."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from vcnode.contracts.schemas import payloads, schema
from vcnode.errors import CleanupError, DriverError, NodeError, RequestError, VcnodeError
from vcnode.models import wire
from vcnode.models.base import JsonObject
from vcnode.models.commands import BROADCAST, COMMANDS, Command
from vcnode.models.events import EventKind

_HEAD = f"""# API reference

Every command, event, error and type. This page is made from the models by `vcnode contracts generate`; a
check fails when they differ. For programs the same is in [contracts/](../contracts/README.md), as JSON
Schemas and an AsyncAPI document, with [examples](../contracts/examples/good) of every request.

A command is a NATS request with a JSON body, on `PREFIX.rpc.NODE.VERB` (the answer comes at once) or, where
it says *durable*, on `PREFIX.cmd.NODE.VERB` (JetStream keeps it until it is done; the outcome is an event
`command.done`). By default the prefix is `vcnode`. Fields that a request's table does not name are refused;
readers of replies and events ignore what they do not know.

    nats request vcnode.rpc.NODE.pod.status '{{"pod_id": "web-1"}}'

Headers: `{wire.COMMAND_ID}` makes a command safe to send again, `{wire.DEADLINE}` is when the caller
stops waiting, `{wire.EXPECTED_REVISION}` refuses what was decided on an older state. See
[durable.md](durable.md).
"""


def render() -> str:
    """The whole page, as Markdown."""
    lines = [_HEAD, "## Contents", ""]
    groups = _groups()
    for group, commands in groups.items():
        verbs = ", ".join(f"[{c.verb}](#{anchor(c.verb)})" for c in commands)
        lines.append(f"- **{group}**: {verbs}")
    lines.append("- **[Events](#events)**, **[Errors](#errors)**, **[Types](#types)**")
    lines += ["", "## Commands"]
    for commands in groups.values():
        for command in commands:
            lines += _command(command)
    lines += _events()
    lines += _errors()
    lines += _types()
    return "\n".join(lines) + "\n"


def _groups() -> dict[str, list[Command]]:
    """The commands by the first word of their verbs."""
    groups: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        groups.setdefault(command.verb.partition(".")[0], []).append(command)
    return groups


def _command(command: Command) -> list[str]:
    facts = ["durable" if command.mutates else "reads only"]
    if command.verb in BROADCAST:
        facts.append(f"also on `PREFIX.all.{command.verb}`, for every node")
    facts.append(f"at most {command.default_timeout_s:g} s when the caller sets no deadline")
    lines = ["", f"### {command.verb}", "", f"{command.summary} *({'; '.join(facts)})*", "", "Request:", ""]
    lines += _fields(schema(f"{command.verb}.request"), request=True)
    reply = schema(f"{command.verb}.reply")
    # Most replies are a status that other replies are, too: it stands once, among the types.
    if (name := command.reply.__name__) in _definitions():
        return [*lines, "", f"Reply: [{name}](#{anchor(name)})."]
    return [*lines, "", "Reply:", "", *_fields(reply, request=False)]


def _events() -> list[str]:
    lines = ["", "## Events", ""]
    lines += [
        "CloudEvents 1.0, on `PREFIX.evt.NODE.KIND` and then `.POD` or `.POD.CONTAINER` for what is about",
        "one. All share this envelope; `data` depends on the kind:",
        "",
    ]
    kinds = list(EventKind)
    lines += _fields(schema(f"event.{kinds[0].value}"), request=False, skip={"data", "type"})
    lines += ["", "| kind | data |", "|---|---|"]
    for kind in kinds:
        data = schema(f"event.{kind.value}")["properties"]["data"]
        lines.append(f"| `{kind.value}` | {_type(data)} |")
    return lines


def _errors() -> list[str]:
    lines = ["", "## Errors", ""]
    lines += [
        "The reply of a command that failed is an [ErrorReply](#errorreply). The number is in the header",
        f"`{wire.SERVICE_ERROR_CODE}`. *Again* says whether the same command, with the same id, may succeed",
        "later.",
        "",
        "| code | number | again | meaning |",
        "|---|---|---|---|",
    ]
    for error in _error_classes():
        again = "yes" if error.retryable else "no"
        meaning = _line(inspect.cleandoc(error.__doc__ or ""))
        lines.append(f"| `{error.code}` | {error.number} | {again} | {meaning} |")
    return lines


def _error_classes() -> Iterator[type[VcnodeError]]:
    """One class for each code: the one that says what the code means."""
    found: dict[str, type[VcnodeError]] = {}
    pending: list[type[VcnodeError]] = [RequestError, NodeError]
    while pending:
        error = pending.pop(0)
        pending += [c for c in error.__subclasses__() if c is not CleanupError and c is not DriverError]
        if error is not RequestError:
            found.setdefault(error.code, error)
    return iter(sorted(found.values(), key=lambda error: (error.number, error.code)))


def _types() -> list[str]:
    lines = ["", "## Types"]
    for name, definition in sorted(_definitions().items()):
        lines += ["", f"### {name}", ""]
        if description := definition.get("description"):
            lines += [_line(description), ""]
        if "enum" in definition:
            lines.append("One of " + ", ".join(f"`{value}`" for value in definition["enum"]) + ".")
        elif "properties" in definition:
            lines += _fields(definition, request="additionalProperties" in definition)
        else:
            lines.append(f"{_type(definition)}.")
    return lines


def _definitions() -> JsonObject:
    """Every type that has a name, from all payloads.

    Raises:
        ValueError: Two payloads mean different things by one name: a page could not show both.
    """
    found: JsonObject = {}
    for payload in payloads():
        whole = schema(payload.name)
        named = dict(whole.get("$defs", {}))
        if payload.name == "error":
            named["ErrorReply"] = whole
        for name, definition in named.items():
            head = {key: value for key, value in definition.items() if not key.startswith("$")}
            if name == "ErrorReply":
                head.pop("title", None)
            if name in found and found[name] != head and name != "ErrorReply":
                raise ValueError(f"{payload.name}: another {name} than that of an earlier payload")
            found.setdefault(name, head)
    return found


def _fields(definition: JsonObject, *, request: bool, skip: set[str] | None = None) -> list[str]:
    """A table of an object's fields; what must be given first says so in requests only."""
    properties = {k: v for k, v in definition.get("properties", {}).items() if k not in (skip or set())}
    if not properties:
        return ["No fields."]
    required = set(definition.get("required", ()))
    head = "| field | type | default | meaning |" if request else "| field | type | meaning |"
    rows = [head, "|---|---|---|---|" if request else "|---|---|---|"]
    for name, field in properties.items():
        cells = [f"`{name}`", _type(field)]
        if request:
            cells.append("**required**" if name in required else _default(field))
        cells.append(_line(field.get("description", "")))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _default(field: JsonObject) -> str:
    value = field.get("default")
    if value in (None, [], {}, ""):
        return ""
    return _code(json.dumps(value, ensure_ascii=False))


def _type(field: JsonObject) -> str:
    """What may stand in a field, in the fewest words that are still true."""
    if ref := field.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    if options := field.get("anyOf") or field.get("oneOf"):
        kinds = [_type(option) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field:
        return _code(json.dumps(field["const"]))
    if "enum" in field:
        return ", ".join(_code(json.dumps(value)) for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        items: JsonObject = field.get("items") or {}
        return f"list of {_type(items)}" + _bounds(field, "minItems", "maxItems")
    if kind == "object":
        values = field.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    if kind in ("integer", "number"):
        return f"{kind}{_bounds(field, 'minimum', 'maximum')}"
    if kind == "string":
        return {"date-time": "time"}.get(field.get("format", ""), "string")
    return str(kind or "any")


def _bounds(field: JsonObject, least: str, most: str) -> str:
    low: Any = field.get(least, field.get("exclusiveMinimum"))
    high: Any = field.get(most, field.get("exclusiveMaximum"))
    if low is not None and least not in field:
        return f", above {low}" + ("" if high is None else f", at most {high}")
    if low is not None and high is not None:
        return f", {low} to {high}"
    if high is not None:
        return f", at most {high}"
    return "" if low is None else f", at least {low}"


def anchor(heading: str) -> str:
    """The name of a heading in a link, as GitHub makes it."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"
