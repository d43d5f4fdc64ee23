"""What the headers of a request say. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from vcnode.errors import InvalidArgumentError
from vcnode.models import wire

_COMMAND_ID = re.compile(wire.COMMAND_ID_PATTERN)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_REVISION = re.compile(r"[1-9]\d{0,17}", re.ASCII)
_ACTOR = re.compile(r"[\x20-\x7e]{1,256}", re.ASCII)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Meta:
    """What comes with a request besides its body."""

    command_id: str | None = None
    """As given; None: the node makes one."""
    deadline: datetime | None = None
    expected_revision: int | None = None
    traceparent: str | None = None
    actor: str | None = None
    """What the sender says of himself."""
    request_info: str | None = None
    """What the NATS server says of the sender, as JSON."""


_NOTHING = Meta()


def parse(headers: Mapping[str, str]) -> Meta:
    """Read the headers; names in any case, unknown ones ignored.

    Raises:
        InvalidArgumentError: A header of ours has a value that cannot be right. A malformed traceparent is
            ignored instead (W3C Trace Context, 3.2.2.3: restart the trace).
    """
    if not headers:
        return _NOTHING
    given = {name.lower(): value.strip() for name, value in headers.items()}

    def value_of(name: str) -> str | None:
        return given.get(name.lower())

    command_id = value_of(wire.COMMAND_ID)
    if command_id is not None and not _COMMAND_ID.fullmatch(command_id):
        raise InvalidArgumentError.field(
            wire.COMMAND_ID, "must be 1 to 128 letters, digits and . _ : - beginning with a letter or digit"
        )
    revision = value_of(wire.EXPECTED_REVISION)
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InvalidArgumentError.field(wire.EXPECTED_REVISION, "must be a positive decimal number")
    if (actor := value_of(wire.ACTOR)) is not None and not _ACTOR.fullmatch(actor):
        raise InvalidArgumentError.field(wire.ACTOR, "must be 1 to 256 printable ASCII characters")
    trace = value_of(wire.TRACEPARENT)
    return Meta(
        command_id=command_id,
        deadline=_deadline(value_of(wire.DEADLINE)),
        expected_revision=None if revision is None else int(revision),
        traceparent=trace if trace is not None and _TRACEPARENT.fullmatch(trace) else None,
        actor=actor,
        request_info=value_of(wire.REQUEST_INFO),
    )


def _deadline(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if _RFC3339.fullmatch(text):
            return datetime.fromisoformat(text.upper())
    except ValueError:
        pass  # the 31st of a shorter month, and the like: answered below
    raise InvalidArgumentError.field(
        wire.DEADLINE, "must be an RFC 3339 time with a zone, such as 2025-01-31T12:00:00Z"
    )
