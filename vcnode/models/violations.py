"""What pydantic found wrong, in words that say what would be right. Pure."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from vcnode.models.base import ID_PATTERN

_MAX_SHOWN = 40
_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_RIGHT = {
    ID_PATTERN: "must be 1 to 64 of a-z, 0-9, '-' and '_', beginning and ending with a letter or digit",
    r"^/[^\x00]{0,4094}$": "must be an absolute path",
    r"^/[^\x00]*$": "must be an absolute path",
    r"^[^\x00]*$": "must not contain NUL",
}
"""Patterns in words."""


def violations_of(exc: ValidationError, model: type[BaseModel] | None = None) -> list[dict[str, str]]:
    """Every wrong field, by its path as the caller wrote it (``field``), and what is wrong (``message``).

    Args:
        exc: What pydantic raised.
        model: What was to be made; with it, an unknown field is told the known ones.
    """
    return [
        {"field": path_of(error["loc"]), "message": _message(model, error)}
        for error in exc.errors(include_url=False)
    ]


def path_of(loc: tuple[int | str, ...]) -> str:
    """A field's path as people write it, such as ``pod.containers[0].labels['a b']``."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "[key]":
            continue
        elif _PLAIN.match(part):
            path += f".{part}" if path else part
        else:
            path += f"[{shorten(part)!r}]"
    return path


def _message(model: type[BaseModel] | None, error: Any) -> str:
    """One violation in words: what would be right, then what was given."""
    kind, loc, given = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_field(model, loc)
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        pattern = error["ctx"]["pattern"]
        right = _RIGHT.get(pattern, f"must match {pattern}")
        return f"{right}, not {_show(given)}"
    if kind in {"too_long", "too_short"} and isinstance(given, (dict, list, tuple)):
        bound = error["ctx"].get("max_length", error["ctx"].get("min_length"))
        return f"must have at {'most' if kind == 'too_long' else 'least'} {bound} items, not {len(given)}"
    if kind == "json_invalid":
        return f"not valid JSON ({error['ctx']['error']})"
    text = str(error["msg"]).replace("Input should be", "must be").replace("valid ", "")
    text = re.sub(r"\ba (?=[aeio])", "an ", text)
    text = text[:1].lower() + text[1:]
    return f"{text}, not {_show(given)}"


def _unknown_field(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> str:
    owner = _model_at(model, loc[:-1])
    if owner is None:
        return "is not a known field"
    known = sorted(owner.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if near:
        return f"is not a known field; did you mean {near[0]!r}?"
    return f"is not a known field; known are {', '.join(known)}" if known else "takes no fields"


def _model_at(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that holds the field behind *loc*, None where there is none."""
    current = model
    for part in loc:
        if isinstance(part, int):
            continue  # _model_in() looked through the tuple already
        if current is None or part not in current.model_fields:
            return None
        current = _model_in(current.model_fields[part].annotation)
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model``, ``Model | None``, ``tuple[Model, ...]`` or ``Annotated[Model, …]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for inner in typing.get_args(annotation):
        if (found := _model_in(inner)) is not None:
            return found
    return None


def _show(value: object) -> str:
    """*value* as JSON, shortened; containers only by their type."""
    if isinstance(value, (dict, list, tuple)):
        return json_type(value)
    return shorten(json.dumps(value, default=str))


def shorten(text: str) -> str:
    """*text*, cut where it is too long for a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def json_type(value: object) -> str:
    """What JSON calls the type of *value*."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", tuple: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
