"""From the bytes of a request to its model, or to one error that says what would be right. Pure."""

from __future__ import annotations

import difflib
import functools
import json
import re
import types
import typing
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from vcnode.errors import InvalidArgumentError
from vcnode.models.base import ID_PATTERN, Request

MAX_VIOLATIONS = 20
"""Most violations that one error lists."""
MAX_REMEMBERED_BYTES = 256
"""Longest body that `decode_again` remembers."""
_MAX_SHOWN = 40
_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")

R = TypeVar("R", bound=Request)


def decode(model: type[R], body: bytes) -> R:
    """Make a request of *body*; an empty body counts as ``{}``.

    Raises:
        InvalidArgumentError: Not a JSON object (RFC 8259, UTF-8, no NaN, no name twice in an object), or
            not this model; ``violations`` has the fields' paths as the caller wrote them.
    """
    text = _text(body)
    _check_json(text)
    try:
        return model.model_validate_json(text)
    except ValidationError as exc:
        raise _invalid(model, exc) from exc


def decode_again(model: type[R], body: bytes) -> R:
    """As `decode`, for bodies that come over and over, such as questions for the status of one pod."""
    if len(body) > MAX_REMEMBERED_BYTES:
        return decode(model, body)
    return _remembered(model, body)  # type: ignore[return-value]  # requests do not change: one serves all


@functools.lru_cache(maxsize=1024)
def _remembered(model: type[Request], body: bytes) -> Request:
    return decode(model, body)


def _bad_body(message: str) -> InvalidArgumentError:
    """An error about the body as a whole."""
    return InvalidArgumentError(
        f"{message[:1].upper()}{message[1:]}.", violations=[{"field": "", "message": message}]
    )


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8") or "{}"
    except UnicodeDecodeError as exc:
        raise _bad_body(f"the body is not UTF-8 (byte {exc.start})") from exc


def _check_json(text: str) -> None:
    """See what pydantic's own parser would let pass: NaN, and names given twice (the last would win)."""
    try:
        value = _DECODER.decode(text)
    except InvalidArgumentError:
        raise
    except RecursionError as exc:
        raise _bad_body("the body is nested too deeply") from exc
    except ValueError as exc:  # JSONDecodeError, and numbers of thousands of digits
        where = f" at line {exc.lineno}, column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else ""
        raise _bad_body(f"the body is not valid JSON{where}") from exc
    if not isinstance(value, dict):
        raise _bad_body(f"the body must be a JSON object, not {_json_type(value)}")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidArgumentError.field(_shorten(twice), "the name is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _bad_body(f"the body holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_names, parse_constant=_no_constant)


def _invalid(model: type[BaseModel], exc: ValidationError) -> InvalidArgumentError:
    found = exc.errors(include_url=False)
    violations = [
        {"field": path_of(error["loc"]), "message": _message(model, error)}
        for error in found[:MAX_VIOLATIONS]
    ]
    first = violations[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    where = f"{first['field']}: " if first["field"] else ""
    return InvalidArgumentError(f"{where}{first['message']}{more}.", violations=violations)


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
            path += f"[{_shorten(part)!r}]"
    return path


def _message(model: type[BaseModel], error: Any) -> str:
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
        right = (
            "must be 1 to 64 of a-z, 0-9, '-' and '_', beginning and ending with a letter or digit"
            if pattern == ID_PATTERN
            else f"must match {pattern}"
        )
        return f"{right}, not {_show(given)}"
    if kind == "json_invalid":
        return f"not valid JSON ({error['ctx']['error']})"
    text = str(error["msg"]).replace("Input should be", "must be").replace("valid ", "")
    text = text[:1].lower() + text[1:]
    return f"{text}, not {_show(given)}"


def _unknown_field(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    owner = _model_at(model, loc[:-1])
    if owner is None:
        return "is not a known field"
    known = sorted(owner.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if near:
        return f"is not a known field; did you mean {near[0]!r}?"
    return f"is not a known field; known are {', '.join(known)}" if known else "takes no fields"


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that holds the field behind *loc*, None where there is none."""
    current: type[BaseModel] | None = model
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
        return _json_type(value)
    return _shorten(json.dumps(value, default=str))


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", tuple: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
