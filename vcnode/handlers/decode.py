"""From the bytes of a request to its model, or to one error that says what would be right. Pure."""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from vcnode.errors import InvalidArgumentError
from vcnode.models.base import Request
from vcnode.models.violations import json_type, shorten, violations_of

MAX_VIOLATIONS = 20
"""Most violations that one error lists."""
MAX_REMEMBERED_BYTES = 256
"""Longest body that `decode_again` remembers."""

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
        raise _bad_body(f"the body must be a JSON object, not {json_type(value)}")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidArgumentError.field(shorten(twice), "the name is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _bad_body(f"the body holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_names, parse_constant=_no_constant)


def _invalid(model: type[BaseModel], exc: ValidationError) -> InvalidArgumentError:
    violations = violations_of(exc, model)[:MAX_VIOLATIONS]
    first = violations[0]
    more = f" (and {exc.error_count() - 1} more)" if exc.error_count() > 1 else ""
    where = f"{first['field']}: " if first["field"] else ""
    return InvalidArgumentError(f"{where}{first['message']}{more}.", violations=violations)
