"""Checks of what a request carries. A host is trusted to be the host, not to be free of mistakes."""

from __future__ import annotations

from vcnode.guest.agent.failures import INVALID_ARGUMENT, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

_MISSING = object()


def invalid(field: str, problem: str) -> Failure:
    """Build the failure for one bad *field* (dotted path)."""
    return Failure(INVALID_ARGUMENT, f"{field}: {problem}.")


class Params:
    """Takes the fields of a JSON object one by one; what nobody took is refused by `done`.

    All takers raise `Failure` with the code ``invalid_argument`` and the dotted path of the field.
    """

    def __init__(self, content: dict[str, Any], path: str = "") -> None:
        self._left = dict(content)
        self._path = path

    def path(self, field: str) -> str:
        """The dotted path of *field*."""
        return f"{self._path}.{field}" if self._path else field

    def _take(self, field: str, kind: type[T], default: T | object) -> T:
        value = self._left.pop(field, default)
        if value is _MISSING:
            raise invalid(self.path(field), "is missing")
        # bool is an int in Python, not in JSON.
        if value is not default and (type(value) is not kind):
            raise invalid(self.path(field), f"must be of type {kind.__name__}")
        return value  # type: ignore[return-value]

    def has(self, field: str) -> bool:
        """Whether *field* has a value. One that is null counts as missing, and is taken by this."""
        if self._left.get(field) is None:
            self._left.pop(field, None)
            return False
        return True

    def text(self, field: str, default: str | object = _MISSING, *, longest: int = 4096) -> str:
        """A string without NUL, of at most *longest* bytes in UTF-8."""
        value = self._take(field, str, default)
        encoded(value, self.path(field), longest)
        return value

    def optional_text(self, field: str, *, longest: int = 4096) -> str | None:
        """A string as in `text`, or None when it is null or missing."""
        return self.text(field, longest=longest) if self.has(field) else None

    def integer(self, field: str, least: int, most: int, default: int | object = _MISSING) -> int:
        """An integer between *least* and *most*, both included."""
        value = self._take(field, int, default)
        return checked_integer(value, self.path(field), least, most)

    def optional_integer(self, field: str, least: int, most: int) -> int | None:
        """An integer as in `integer`, or None when it is null or missing."""
        return self.integer(field, least, most) if self.has(field) else None

    def flag(self, field: str, default: bool | object = _MISSING) -> bool:
        """A boolean."""
        return self._take(field, bool, default)

    def object(self, field: str) -> Params:
        """An object, to be taken apart in its turn; empty when missing."""
        return Params(self._take(field, dict, {}), self.path(field))

    def array(self, field: str, check: Callable[[Any, str], T], *, longest: int) -> tuple[T, ...]:
        """An array of at most *longest* items, each put through *check* with its path; empty when missing."""
        items = self._take(field, list, [])
        if len(items) > longest:
            raise invalid(self.path(field), f"has {len(items)} items; at most {longest} are allowed")
        path = self.path(field)
        return tuple(check(item, f"{path}[{index}]") for index, item in enumerate(items))

    def fields(self) -> dict[str, Any]:
        """The fields that nobody took yet, as they came."""
        return dict(self._left)

    def done(self) -> None:
        """Refuse what nobody took."""
        for field in self._left:
            raise invalid(self.path(field), "is not known")


def encoded(value: Any, path: str, longest: int = 131_072) -> bytes:
    """Check a string that goes to the kernel, and give it as bytes."""
    if type(value) is not str:
        raise invalid(path, "must be of type str")
    try:
        raw = value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell lone surrogates, which no file name can hold.
        raise invalid(path, "is not valid Unicode") from None
    if len(raw) > longest:
        raise invalid(path, f"has {len(raw)} bytes; at most {longest} are allowed")
    if b"\0" in raw:
        raise invalid(path, "holds a NUL character")
    return raw


def checked_integer(value: Any, path: str, least: int, most: int) -> int:
    """Check an integer's type and bounds."""
    if type(value) is not int:
        raise invalid(path, "must be of type int")
    if not least <= value <= most:
        raise invalid(path, f"must be between {least} and {most}, not {value}")
    return value
