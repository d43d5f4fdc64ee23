"""The messages of a session on the wire (docs/streams.md). Pure."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

DATA, CLIENT_STATE, NODE_STATE, BYE = 1, 2, 3, 4

END = 1
"""Flag of DATA: the stream ends after these bytes; the end counts as one more byte."""
GAP = 1
"""Flag of a state: bytes behind ``received`` are missing, send them again."""
ALL = (1 << 64) - 1
"""Position of a stream that is over: everything of it was received and consumed."""
MAX_BYE = 4096

FIRST_CONNECTION = 4
"""Number of the first connection of a port-forward; its streams are 8 and 9."""
CONTROL_UP, CONTROL_DOWN, STDIN, STDOUT, STDERR = 0, 1, 2, 3, 5
"""Streams by their numbers: even ones go to the node, odd ones come from it."""

Channel = Literal["stdin", "stdout", "stderr", "control"]
Parts = tuple[bytes | memoryview, ...]
"""A frame to send, in pieces, for what is long is not to be copied more often than it must."""

_HEADER = struct.Struct(">BBHIQ")
_ENTRY = struct.Struct(">IQQ")
HEADER_BYTES = _HEADER.size
MAX_ENTRIES = 1024
"""Most streams in one state."""


class FrameError(Exception):
    """Not a frame of a session."""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream."""

    epoch: int
    stream: int
    offset: int
    ends: bool
    payload: memoryview


@dataclass(frozen=True, slots=True)
class State:
    """What one end has received and consumed; ``probe`` asks for an answer, ``echo`` is one."""

    epoch: int
    from_client: bool
    gap: bool
    probe: int
    echo: int
    positions: tuple[tuple[int, int, int], ...]
    """Stream, bytes received without a gap, bytes consumed."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The node knows no such session, or no longer this attachment of it."""

    epoch: int
    code: str
    message: str


Frame = Data | State | Bye


def channel_of(stream: int) -> Channel:
    """The subject on which a stream travels."""
    if stream in (CONTROL_UP, CONTROL_DOWN):
        return "control"
    if stream == STDERR:
        return "stderr"
    return "stdout" if stream & 1 else "stdin"


def encode_data(epoch: int, stream: int, offset: int, *pieces: bytes | memoryview, ends: bool) -> Parts:
    """A DATA frame."""
    return _HEADER.pack(DATA, END if ends else 0, epoch, stream, offset), *pieces


def encode_state(
    epoch: int,
    positions: Iterable[tuple[int, int, int]],
    *,
    from_client: bool,
    gap: bool = False,
    probe: int = 0,
    echo: int = 0,
) -> bytes:
    """A state frame."""
    kind = CLIENT_STATE if from_client else NODE_STATE
    head = _HEADER.pack(kind, GAP if gap else 0, epoch, probe, echo)
    return b"".join((head, *(_ENTRY.pack(*entry) for entry in positions)))


def encode_bye(epoch: int, code: str, message: str) -> bytes:
    """A BYE frame."""
    body = json.dumps({"code": code, "message": message[:1000]}).encode()
    return _HEADER.pack(BYE, 0, epoch, 0, 0) + body


def decode(raw: bytes) -> Frame:
    """Read a frame.

    Raises:
        FrameError: It is none; the text holds nothing that the sender wrote.
    """
    if len(raw) < HEADER_BYTES:
        raise FrameError("a frame is too short")
    kind, flags, epoch, stream, offset = _HEADER.unpack_from(raw)
    rest = memoryview(raw)[HEADER_BYTES:]
    if flags & ~1:
        raise FrameError("a frame has unknown flags")
    if kind == DATA:
        if not rest and not flags:
            raise FrameError("a frame carries nothing")
        if offset + len(rest) >= ALL:
            raise FrameError("a frame lies beyond the end of any stream")
        return Data(epoch, stream, offset, bool(flags & END), rest)
    if kind in (CLIENT_STATE, NODE_STATE):
        if len(rest) % _ENTRY.size or len(rest) > MAX_ENTRIES * _ENTRY.size:
            raise FrameError("a state has a bad length")
        entries = tuple(_ENTRY.iter_unpack(rest))
        if any(consumed > received for _, received, consumed in entries):
            raise FrameError("a state has consumed more than it has received")
        return State(epoch, kind == CLIENT_STATE, bool(flags & GAP), stream, offset, entries)
    if kind == BYE:
        return _bye(epoch, rest)
    raise FrameError("a frame has an unknown kind")


def _bye(epoch: int, body: memoryview) -> Bye:
    try:
        found: Any = json.loads(bytes(body[:MAX_BYE]))
        code, message = found["code"], found["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FrameError("a bye has no code or message") from None
    if type(code) is not str or type(message) is not str:
        raise FrameError("a bye has no code or message")
    return Bye(epoch, code, message)
