"""JSON Schemas (2020-12) of the payloads, made from the models."""

from __future__ import annotations

import functools
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from vcnode.contracts.payloads import PAYLOADS, Payload
from vcnode.models.base import JsonObject

DIALECT = "https://json-schema.org/draft/2020-12/schema"
VERSION = 1
"""Of the contract as a whole; see contracts/README.md for what makes it grow."""


class _Generator(GenerateJsonSchema):
    """Pydantic's own, without the titles that it makes of field names: they say nothing."""

    schema_dialect = DIALECT

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@functools.cache
def schema(name: str) -> JsonObject:
    """The schema of the payload *name*; complete in itself.

    Raises:
        KeyError: There is no such payload.
    """
    payload = PAYLOADS[name]
    mode: JsonSchemaMode = "validation" if payload.direction == "to_node" else "serialization"
    made = payload.model.model_json_schema(mode=mode, schema_generator=_Generator)
    made.pop("title", None)
    head = {"$schema": DIALECT, "$id": f"urn:vcnode:{VERSION}:{name}", "title": payload.summary}
    readable: JsonObject = _markdown(made)
    return {**head, **readable}


def _markdown(node: Any) -> Any:
    """Descriptions as Markdown in one line each; docstrings are reStructuredText, and wrapped."""
    if isinstance(node, dict):
        made = {key: _markdown(value) for key, value in node.items()}
        if isinstance(text := node.get("description"), str):
            made["description"] = " ".join(text.replace("``", "`").split())
        return made
    if isinstance(node, list):
        return [_markdown(item) for item in node]
    return node


def strict(name: str) -> JsonObject:
    """The schema, with every field that it does not name refused: for checks of what the node itself sends.

    Not for consumers, who must ignore what they do not know.
    """
    closed: JsonObject = _closed(schema(name))
    if name.startswith("event."):
        # CloudEvents extensions of later versions may stand beside ours.
        closed.pop("additionalProperties", None)
    return closed


def _closed(node: Any) -> Any:
    if isinstance(node, dict):
        made = {key: _closed(value) for key, value in node.items()}
        if isinstance(node.get("properties"), dict):
            made["additionalProperties"] = False
        return made
    if isinstance(node, list):
        return [_closed(item) for item in node]
    return node


def payloads() -> list[Payload]:
    """All payloads, in the order of their names."""
    return [PAYLOADS[name] for name in sorted(PAYLOADS)]
