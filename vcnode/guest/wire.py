"""The guest protocol (contracts/guest-protocol.md) on the wire: frames, JSON objects, the sync marker."""

from __future__ import annotations

import json
import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

VERSION = 1
PORT_NAME = "vcnode.agent.0"
MARKER = bytes.fromhex("f656434e4f44452d53594e430d0a1aff")
"""Starts a session in each direction. Its first byte is no valid kind, and it is not UTF-8."""

HELLO, REQUEST, REPLY, EVENT, DATA, EOF, CREDIT, RESET, BULK = range(1, 10)
MORE = 1

MAX_PAYLOAD = 32_768
"""Most bytes of payload in one frame, BULK frames excepted."""
MAX_BULK_TO_HOST = 1 << 20
"""Most bytes of payload in one BULK frame to the host: each costs the guest's agent a turn of its loop."""
MAX_BULK_TO_GUEST = 1 << 20
"""The same for a frame to the guest, which keeps all of it until its end has come."""
MAX_MESSAGE = 1 << 20
"""Most bytes of one JSON message, over all its frames."""
MAX_HELLO = 4_096
"""Most bytes of the payload of a HELLO, which is always one frame."""

_HEADER = struct.Struct(">BBHII")
_U32 = struct.Struct(">I")
OVERHEAD = _HEADER.size + _U32.size
"""Bytes of a frame besides its payload."""
HEADER_BYTES = _HEADER.size
"""Bytes of a frame before its payload."""
SYNC_ZEROS = bytes(MAX_PAYLOAD + OVERHEAD)
"""Ends any half frame but one of BULK: longer than what can be missing of it."""
LONG_SYNC_ZEROS = bytes(MAX_BULK_TO_GUEST + OVERHEAD)
"""Ends any half frame."""

# Least and greatest length of the payload of each kind.
_LENGTHS = {
    HELLO: (2, MAX_HELLO),
    REQUEST: (2, MAX_PAYLOAD),
    REPLY: (2, MAX_PAYLOAD),
    EVENT: (2, MAX_PAYLOAD),
    DATA: (1, MAX_PAYLOAD),
    EOF: (0, 0),
    CREDIT: (4, 4),
    RESET: (0, 0),
    BULK: (1, max(MAX_BULK_TO_HOST, MAX_BULK_TO_GUEST)),
}
_NAMES = ("HELLO", "REQUEST", "REPLY", "EVENT", "DATA", "EOF", "CREDIT", "RESET", "BULK")
KIND_NAMES = dict(zip(_LENGTHS, _NAMES, strict=True))


class ProtocolError(Exception):
    """The peer broke the protocol; the text says how, and holds nothing that the peer wrote."""


class LocalError(Exception):
    """The caller asked for something that the protocol does not allow now; nothing was sent."""


class TooLargeError(LocalError):
    """The message is larger than the protocol can carry."""


def encode_frame(kind: int, stream: int, payload: bytes | memoryview, flags: int = 0) -> bytes:
    """One frame, checksum included. The caller keeps to the lengths."""
    header = _HEADER.pack(kind, flags, 0, stream, len(payload))
    return b"".join((header, payload, _U32.pack(zlib.crc32(payload, zlib.crc32(header)))))


def around_bulk(stream: int, length: int) -> tuple[bytes, bytes]:
    """What comes before and after the payload of a BULK frame. The caller keeps to the lengths."""
    header = _HEADER.pack(BULK, 0, 0, stream, length)
    return header, _U32.pack(zlib.crc32(header))


def check_bulk_end(buffer: bytes | bytearray | memoryview, pos: int, stream: int, length: int) -> None:
    """See that the 4 bytes at *pos* end such a frame.

    Raises:
        ProtocolError: They do not: what was taken for its payload is something else.
    """
    if buffer[pos : pos + _U32.size] != around_bulk(stream, length)[1]:
        raise ProtocolError("a frame's checksum is wrong")


def parse_header(buffer: bytes | bytearray | memoryview, pos: int) -> tuple[int, int, int, int] | None:
    """Read the header at *pos*: (kind, flags, stream, length of the payload); None while it is incomplete.

    Raises:
        ProtocolError: It is no valid header.
    """
    if len(buffer) - pos < _HEADER.size:
        # Do not wait for a whole header of something that cannot be one.
        if len(buffer) > pos and buffer[pos] not in _LENGTHS:
            raise ProtocolError("a frame has an unknown kind")
        return None
    kind, flags, reserved, stream, length = _HEADER.unpack_from(buffer, pos)
    least, most = _LENGTHS.get(kind, (1, 0))
    if not least <= length <= most:
        name = KIND_NAMES.get(kind)
        raise ProtocolError(f"a {name} frame has a bad length" if name else "a frame has an unknown kind")
    if flags > MORE or reserved or (stream == 0) != (kind < DATA):
        raise ProtocolError("a frame has a bad header")
    # A part that is not the last one is full, or empty parts could come for ever.
    if flags and (length != MAX_PAYLOAD or kind not in (REQUEST, REPLY, EVENT)):
        raise ProtocolError("a frame is marked MORE and must not be")
    return kind, flags, stream, length


def parse_frame(buffer: bytes | bytearray | memoryview, pos: int) -> tuple[int, int, int, bytes] | None:
    """Read the frame that begins at *pos*: (kind, flags, stream, payload); None while it is incomplete.

    Not for BULK frames, which are taken in pieces.

    Raises:
        ProtocolError: It is no valid frame. A bad header is noticed before its payload is there.
    """
    if (header := parse_header(buffer, pos)) is None:
        return None
    kind, flags, stream, length = header
    start = pos + _HEADER.size
    end = start + length
    if len(buffer) < end + _U32.size:
        return None
    with memoryview(buffer) as view:
        if zlib.crc32(view[pos:end]) != _U32.unpack_from(buffer, end)[0]:
            raise ProtocolError("a frame's checksum is wrong")
        return kind, flags, stream, bytes(view[start:end])


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode_json = json.JSONDecoder(parse_constant=_no_constant).decode
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def decode_object(payload: bytes | bytearray) -> dict[str, Any]:
    """Read a JSON object, and nothing else.

    Raises:
        ProtocolError: Not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        found = _decode_json(payload.decode("utf-8"))
    # RecursionError: "[[[[…" ; ValueError covers bad UTF-8, bad JSON and numbers of thousands of digits.
    except (ValueError, RecursionError):
        raise ProtocolError("a message is not valid JSON") from None
    if type(found) is not dict:
        raise ProtocolError("a message is not a JSON object")
    return found


def encode_object(content: Mapping[str, Any]) -> bytes:
    """Write a JSON object in ASCII.

    Raises:
        TooLargeError: It is larger than a message may be.
    """
    encoded = _encode_json(content).encode("ascii")
    if len(encoded) > MAX_MESSAGE:
        raise TooLargeError(f"A message of {len(encoded)} bytes is over the limit of {MAX_MESSAGE}.")
    return encoded


def find_hello(
    buffer: bytes | bytearray, pos: int, is_wanted: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any] | None, int]:
    """Look, from *pos* on, for a marker that is followed by a HELLO which *is_wanted*.

    Every marker in sight is tried, for stale output can hold markers too, followed by what looks like the
    start of a frame; waiting for its end would swallow the real one.

    Returns:
        The HELLO, and the position after it; or None, and the position before which nothing is needed any
        more: what remains is little more than MAX_HELLO bytes.
    """
    keep, at = -1, pos
    while (at := buffer.find(MARKER, at)) >= 0:
        start = at + len(MARKER)
        at += 1
        if len(buffer) > start and buffer[start] != HELLO:
            continue
        try:
            if (frame := parse_frame(buffer, start)) is None:
                keep = start - len(MARKER) if keep < 0 else keep
            elif is_wanted(hello := decode_object(frame[3])):
                return hello, start + OVERHEAD + len(frame[3])
        except ProtocolError:
            continue  # not the one; whatever it was is dropped
    # What may be the start of a marker is kept.
    return None, keep if keep >= 0 else max(pos, len(buffer) - len(MARKER) + 1)
