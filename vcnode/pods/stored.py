"""A reply as it is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """A reply as it was sent."""

    ok: bool
    """Whether the command succeeded."""
    body: bytes
    """The reply's body, or the error's."""
    code: str | None = None
    """The error's code, such as ``not_found``; None if it succeeded."""
    number: int | None = None
    """The error's number, such as 404; None if it succeeded."""
