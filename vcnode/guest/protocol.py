"""The guest protocol (contracts/guest-protocol.md) without any I/O; both ends of the port use it.

Bytes go in, events come out, bytes to send pile up::

    for event in end.receive_data(os.read(port, 65536)):
        ...                       # may call end.send_…() at once
    write_all(port, end.data_to_send())

`Host` opens sessions, `Guest` answers. Neither knows what a method means: they own the framing, checksums,
long messages, the hunt for the sync marker, the hello, and the credit of every stream.

What the peer gets wrong: `Host` raises `ProtocolError` (its session is over); `Guest` yields `SessionEnded`
and hunts for the next sync. What the caller gets wrong raises `LocalError` and sends nothing.

Events are parsed one at a time, while they are iterated: after each, the state is that of the moment just
after the frame that caused it, so a handler that opens a stream does so before the next frame is looked at.

This runs inside the guest too, where every import costs memory: no typing, enum or dataclasses at run time.
"""

from __future__ import annotations

import json
import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

VERSION = 1
PORT_NAME = "vcnode.agent.0"
MARKER = bytes.fromhex("f656434e4f44452d53594e430d0a1aff")
"""Starts a session in each direction. Its first byte is no valid kind, and it is not UTF-8."""

HELLO, REQUEST, REPLY, EVENT, DATA, EOF, CREDIT, RESET = range(1, 9)
MORE = 1

MAX_PAYLOAD = 32_768
"""Most bytes of payload in one frame."""
MAX_MESSAGE = 1 << 20
"""Most bytes of one JSON message, over all its frames."""
MAX_HELLO = 4_096
"""Most bytes of the payload of a HELLO, which is always one frame."""
MAX_WINDOW = 16 << 20
"""Largest window, in bytes, that an end may offer."""
MAX_REQUESTS = 1_024
"""Most requests without a reply."""
DEFAULT_WINDOW = 256 * 1024
"""About the bytes that the port moves in one round trip."""

_HEADER = struct.Struct(">BBHII")
_U32 = struct.Struct(">I")
_OVERHEAD = _HEADER.size + _U32.size
SYNC_ZEROS = bytes(MAX_PAYLOAD + _OVERHEAD)
"""Ends any half frame: longer than what can be missing of it."""

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
}
_KIND_NAMES = dict(
    zip(_LENGTHS, ("HELLO", "REQUEST", "REPLY", "EVENT", "DATA", "EOF", "CREDIT", "RESET"), strict=True)
)
_MAX_CROSSED = 3
_HEX = frozenset("0123456789abcdef")


class ProtocolError(Exception):
    """The peer broke the protocol; the text says how, and holds nothing that the peer wrote."""


class LocalError(Exception):
    """The caller asked for something that the protocol does not allow now; nothing was sent."""


class TooLargeError(LocalError):
    """The message is larger than the protocol can carry."""


class SessionStarted:
    """A session is open. ``hello`` is the peer's HELLO, checked; streams and requests start from nothing."""

    __match_args__ = __slots__ = ("hello",)

    def __init__(self, hello: dict[str, Any]) -> None:
        self.hello = hello


class SessionEnded:
    """Guest only: the session is over, with all its streams and requests. What was to be sent is dropped."""

    __match_args__ = __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class RequestReceived:
    """Guest only: answer with `Guest.send_reply` or `Guest.send_error`, giving this object back."""

    __match_args__ = ("method", "params")
    __slots__ = ("epoch", "id", "method", "params")

    def __init__(self, id: int, method: str, params: dict[str, Any], epoch: int) -> None:  # noqa: A002
        self.id = id
        self.method = method
        self.params = params
        self.epoch = epoch


class ReplyReceived:
    """Host only: the answer to a request; exactly one of ``result`` and ``error`` (code, message) is set."""

    __match_args__ = __slots__ = ("id", "result", "error")

    def __init__(self, id: int, result: dict[str, Any] | None, error: tuple[str, str] | None) -> None:  # noqa: A002
        self.id = id
        self.result = result
        self.error = error


class EventReceived:
    """Host only: something happened in the guest. ``fields`` are unchecked."""

    __match_args__ = __slots__ = ("name", "fields")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields


class DataReceived:
    """Bytes of a stream. Call ``consumed`` once the user has taken them, or the peer stops sending."""

    __match_args__ = __slots__ = ("stream", "data")

    def __init__(self, stream: int, data: bytes) -> None:
        self.stream = stream
        self.data = data


class EofReceived:
    """The peer has sent the last byte of this stream; the stream is finished."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class CreditReceived:
    """More may be sent on this stream."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class ResetReceived:
    """The peer wants no more of this stream. EOF was sent in answer; the stream is finished."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


if TYPE_CHECKING:
    Event = (
        SessionStarted
        | SessionEnded
        | RequestReceived
        | ReplyReceived
        | EventReceived
        | DataReceived
        | EofReceived
        | CreditReceived
        | ResetReceived
    )


class _Receiver:
    """What one receiving stream may still get."""

    __slots__ = ("consumed", "discard", "granted")

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.consumed = 0
        self.discard = False


def encode_frame(kind: int, stream: int, payload: bytes | memoryview, flags: int = 0) -> bytes:
    """One frame, checksum included. The caller keeps to the lengths."""
    header = _HEADER.pack(kind, flags, 0, stream, len(payload))
    return b"".join((header, payload, _U32.pack(zlib.crc32(payload, zlib.crc32(header)))))


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


class _End:
    """What both ends share."""

    def __init__(self, window: int) -> None:
        if not 1 <= window <= MAX_WINDOW:
            raise LocalError(f"A window is 1 to {MAX_WINDOW} bytes, not {window}.")
        self.window = window
        """Bytes that the peer may send on a stream before credit is granted."""
        self.established = False
        """Whether a session is open."""
        self.pending_bytes = 0
        """Bytes that wait for `data_to_send`."""
        self._outgoing: list[bytes] = []
        self._incoming = bytearray()
        self._pos = 0
        self._begin()

    def _begin(self) -> None:
        """Forget everything that belongs to one session."""
        self._peer_window = 0
        self._partial = bytearray()
        self._partial_kind = 0
        self._senders: dict[int, int] = {}
        self._receivers: dict[int, _Receiver] = {}
        self._last_stream = 0
        self._crossed = 0

    # -- bytes out ---------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        self._outgoing.append(frame)
        self.pending_bytes += len(frame)

    def _drop_unsent(self) -> None:
        self._outgoing.clear()
        self.pending_bytes = 0

    def data_to_send(self) -> bytes:
        """Take all that is to be sent. Whoever cannot write it at once keeps the rest, in order."""
        data = b"".join(self._outgoing)
        self._drop_unsent()
        return data

    def _send_message(self, kind: int, content: Mapping[str, Any]) -> None:
        if not self.established:
            raise LocalError("No session is open.")
        rest = memoryview(encode_object(content))
        while len(rest) > MAX_PAYLOAD:
            self._send(encode_frame(kind, 0, rest[:MAX_PAYLOAD], MORE))
            rest = rest[MAX_PAYLOAD:]
        self._send(encode_frame(kind, 0, rest))

    # -- streams -----------------------------------------------------------------------------------

    def _open(self, stream: int) -> None:
        if not self.established:
            raise LocalError("No session is open.")
        if not 0 < stream < 1 << 32 or stream in self._senders or stream in self._receivers:
            raise LocalError(f"Stream {stream} is not a number that can be opened.")
        self._last_stream = max(self._last_stream, stream)

    def open_sender(self, stream: int) -> None:
        """Make *stream* one on which this end sends."""
        self._open(stream)
        self._senders[stream] = self._peer_window

    def open_receiver(self, stream: int) -> None:
        """Make *stream* one on which this end receives."""
        self._open(stream)
        self._receivers[stream] = _Receiver(self.window)

    def forget(self, stream: int) -> None:
        """Undo an open of which the peer knows nothing (its request failed)."""
        self._senders.pop(stream, None)
        self._receivers.pop(stream, None)

    def credit(self, stream: int) -> int:
        """Bytes that may be sent on *stream* now; 0 too when it is finished."""
        return self._senders.get(stream, 0)

    def is_sending(self, stream: int) -> bool:
        """Whether *stream* is open for sending."""
        return stream in self._senders

    def send_data(self, stream: int, data: bytes | bytearray | memoryview) -> int:
        """Queue as much of *data* as the credit allows; returns how many bytes that were.

        Raises:
            LocalError: The stream is not open for sending.
        """
        if (credit := self._senders.get(stream)) is None:
            raise LocalError(f"Stream {stream} is not open for sending.")
        rest = memoryview(data)[:credit]
        count = len(rest)
        while rest:
            self._send(encode_frame(DATA, stream, rest[:MAX_PAYLOAD]))
            rest = rest[MAX_PAYLOAD:]
        self._senders[stream] = credit - count
        return count

    def send_eof(self, stream: int) -> None:
        """Say that nothing more comes; the stream is finished. No effect on one that is finished."""
        if self._senders.pop(stream, None) is not None:
            self._send(encode_frame(EOF, stream, b""))

    def send_reset(self, stream: int) -> None:
        """Say that no more is wanted; what still comes is dropped here. No effect on a finished stream."""
        receiver = self._receivers.get(stream)
        if receiver is not None and not receiver.discard:
            receiver.discard = True
            self._send(encode_frame(RESET, stream, b""))

    def consumed(self, stream: int, count: int) -> None:
        """The user has taken *count* bytes of *stream*: let the peer send as many more.

        Credit goes out when half of the window is due, so that small reads do not cost a frame each.
        """
        receiver = self._receivers.get(stream)
        if receiver is None or receiver.discard:
            return
        receiver.consumed += count
        if receiver.consumed * 2 >= self.window:
            self._send(encode_frame(CREDIT, stream, _U32.pack(receiver.consumed)))
            receiver.granted += receiver.consumed
            receiver.consumed = 0

    # -- bytes in ----------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take bytes from the port; iterate over the result to its end to have them parsed."""
        self._incoming += data
        return self._events()

    def _events(self) -> Iterator[Event]:
        raise NotImplementedError

    def _compact(self) -> None:
        if self._pos:
            del self._incoming[: self._pos]
            self._pos = 0

    def _parse_frame(self, pos: int) -> tuple[int, int, int, bytes] | None:
        """Read the frame at *pos*: (kind, flags, stream, payload); None while it is incomplete.

        Raises:
            ProtocolError: It is no valid frame. A bad header is noticed before its payload is there.
        """
        buffer = self._incoming
        if len(buffer) - pos < _HEADER.size:
            # Do not wait for a whole header of something that cannot be one.
            if len(buffer) > pos and buffer[pos] not in _LENGTHS:
                raise ProtocolError("a frame has an unknown kind")
            return None
        kind, flags, reserved, stream, length = _HEADER.unpack_from(buffer, pos)
        least, most = _LENGTHS.get(kind, (1, 0))
        if not least <= length <= most:
            name = _KIND_NAMES.get(kind)
            raise ProtocolError(f"a {name} frame has a bad length" if name else "a frame has an unknown kind")
        if flags > MORE or reserved or (stream == 0) != (kind < DATA):
            raise ProtocolError("a frame has a bad header")
        # A part that is not the last one is full, or empty parts could come for ever.
        if flags and (length != MAX_PAYLOAD or kind not in (REQUEST, REPLY, EVENT)):
            raise ProtocolError("a frame is marked MORE and must not be")
        end = pos + _HEADER.size + length
        if len(buffer) < end + _U32.size:
            return None
        with memoryview(buffer) as view:
            if zlib.crc32(view[pos:end]) != _U32.unpack_from(buffer, end)[0]:
                raise ProtocolError("a frame's checksum is wrong")
            return kind, flags, stream, bytes(view[pos + _HEADER.size : end])

    def _hunt(self) -> dict[str, Any] | None:
        """Look for a marker that is followed by an acceptable HELLO; drop everything before it.

        Every marker in sight is tried, for stale output can hold markers too, followed by what looks like
        the start of a frame; waiting for its end would swallow the real one.
        """
        buffer, keep, at = self._incoming, -1, self._pos
        while (at := buffer.find(MARKER, at)) >= 0:
            start = at + len(MARKER)
            at += 1
            if len(buffer) > start and buffer[start] != HELLO:
                continue
            try:
                if (frame := self._parse_frame(start)) is None:
                    keep = start - len(MARKER) if keep < 0 else keep
                elif self._is_for_us(hello := decode_object(frame[3])):
                    self._pos = start + _OVERHEAD + len(frame[3])
                    return hello
            except ProtocolError:
                continue  # not the one; whatever it was is dropped
        # An incomplete HELLO is kept (little more than MAX_HELLO), else what may be the start of a marker.
        self._pos = keep if keep >= 0 else max(self._pos, len(buffer) - len(MARKER) + 1)
        self._compact()
        return None

    def _is_for_us(self, hello: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _take_frame(self) -> tuple[int, int, int, bytes] | None:
        frame = self._parse_frame(self._pos)
        if frame is None:
            self._compact()
            return None
        self._pos += _OVERHEAD + len(frame[3])
        return frame

    def _assemble(self, kind: int, flags: int, payload: bytes) -> dict[str, Any] | None:
        """Add a frame to a message; returns the message once it is whole."""
        if self._partial_kind not in (0, kind):
            raise ProtocolError("a message was interrupted by another frame")
        if len(self._partial) + len(payload) > MAX_MESSAGE:
            raise ProtocolError("a message is over the limit")
        if flags & MORE:
            self._partial_kind = kind
            self._partial += payload
            return None
        if not self._partial_kind:
            return decode_object(payload)
        whole, self._partial, self._partial_kind = self._partial + payload, bytearray(), 0
        return decode_object(whole)

    def _on_stream(self, kind: int, stream: int, payload: bytes) -> Event | None:
        """Account for a frame of a stream."""
        if self._partial_kind:
            raise ProtocolError("a message was interrupted by another frame")
        if stream > self._last_stream:
            raise ProtocolError("a frame is for a stream that was never opened")
        if kind in (DATA, EOF):
            return self._on_receiver(kind, stream, payload)
        if (credit := self._senders.get(stream)) is None:
            # It crossed our EOF on the wire: two halves of a window and a RESET at most.
            self._crossed += 1
            if self._crossed > _MAX_CROSSED * self._last_stream:
                raise ProtocolError("too many frames came for finished streams")
            return None
        if kind == RESET:
            self.send_eof(stream)
            return ResetReceived(stream)
        more = _U32.unpack(payload)[0]
        if not 0 < more <= self._peer_window - credit:
            raise ProtocolError("more credit was granted than was used")
        self._senders[stream] = credit + more
        return CreditReceived(stream)

    def _on_receiver(self, kind: int, stream: int, payload: bytes) -> Event | None:
        if (receiver := self._receivers.get(stream)) is None:
            raise ProtocolError("data came on a finished stream")
        if kind == EOF:
            del self._receivers[stream]
            return None if receiver.discard else EofReceived(stream)
        receiver.granted -= len(payload)
        if receiver.granted < 0:
            raise ProtocolError("more data came than credit was granted")
        return None if receiver.discard else DataReceived(stream, payload)


def _is_int(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


class Host(_End):
    """The host's end of one connection to a guest. Made anew for each connection.

    Args:
        session: 32 hex digits, fresh and random: stale bytes of an earlier session cannot contain them.
        window: Bytes that the guest may send on a stream before credit is granted.
    """

    def __init__(self, session: str, window: int = DEFAULT_WINDOW) -> None:
        super().__init__(window)
        self.session = session
        self._unanswered_syncs = 0
        self._next_id = 1
        self._asked: set[int] = set()
        self._error: ProtocolError | None = None

    def send_sync(self) -> None:
        """Ask for a session. May be repeated until `SessionStarted`: the guest answers each one.

        Raises:
            LocalError: The session is open already.
        """
        if self.established:
            raise LocalError("The session is open already.")
        self._unanswered_syncs += 1
        hello = {"version": VERSION, "session": self.session, "window": self.window}
        self._send(SYNC_ZEROS)
        self._send(MARKER + encode_frame(HELLO, 0, encode_object(hello)))

    def send_request(self, method: str, params: Mapping[str, Any]) -> int:
        """Ask the guest; returns the id that the reply will carry.

        Raises:
            TooLargeError: The message is too large.
            LocalError: No session, or too many requests are without a reply.
        """
        if len(self._asked) >= MAX_REQUESTS:
            raise LocalError(f"{MAX_REQUESTS} requests are without a reply.")
        self._send_message(REQUEST, {"id": self._next_id, "method": method, "params": params})
        self._asked.add(self._next_id)
        self._next_id += 1
        return self._next_id - 1

    def new_stream(self, *, sending: bool) -> int:
        """Open the next stream, to be named in a request. Send nothing on it before the reply."""
        stream = self._last_stream + 1
        if sending:
            self.open_sender(stream)
        else:
            self.open_receiver(stream)
        return stream

    def _is_for_us(self, hello: dict[str, Any]) -> bool:
        return hello.get("session") == self.session

    def _events(self) -> Iterator[Event]:
        """Parse what is there.

        Raises:
            ProtocolError: The guest broke the protocol; nothing more is parsed, and each call raises again.
        """
        if self._error is not None:
            self._incoming.clear()
            raise self._error
        try:
            while (event := self._next_event()) is not None:
                yield event
        except ProtocolError as exc:
            self._error = exc
            self.established = False
            self._begin()
            self._drop_unsent()
            self._incoming.clear()
            self._pos = 0
            raise

    def _next_event(self) -> Event | None:
        if not self.established:
            hello = self._hunt()
            return None if hello is None else self._on_hello(hello)
        while True:
            # The guest answers every sync that it gets, also one that was repeated in vain.
            if self._unanswered_syncs and self._incoming.startswith(MARKER[:1], self._pos):
                if self._skip_answer():
                    continue
                return None
            if (frame := self._take_frame()) is None:
                return None
            kind, flags, stream, payload = frame
            if kind >= DATA:
                event = self._on_stream(kind, stream, payload)
            elif kind in (REPLY, EVENT):
                event = self._on_message(kind, self._assemble(kind, flags, payload))
            else:
                raise ProtocolError(f"the guest sent a {_KIND_NAMES[kind]} inside a session")
            if event is not None:
                return event

    def _on_hello(self, hello: dict[str, Any]) -> Event:
        if not _is_int(version := hello.get("version"), 0, 1 << 31):
            raise ProtocolError("the guest's hello has no version")
        if version != VERSION:
            raise ProtocolError(f"the guest speaks version {version} of the protocol, not {VERSION}")
        window: Any = hello.get("window")
        if not _is_int(window, 1, MAX_WINDOW):
            raise ProtocolError("the guest's hello has a bad window")
        for name in ("agent_version", "boot_id", "kernel"):
            if type(text := hello.get(name)) is not str or len(text) > 256:
                raise ProtocolError(f"the guest's hello has a bad {name}")
        self._peer_window = window
        self._unanswered_syncs -= 1
        self.established = True
        return SessionStarted(hello)

    def _skip_answer(self) -> bool:
        """Drop the answer to a repeated sync; False while it is incomplete."""
        start = self._pos + len(MARKER)
        head = self._incoming[self._pos : start]
        if not MARKER.startswith(head):
            raise ProtocolError("a frame has an unknown kind")
        if len(head) < len(MARKER) or (frame := self._parse_frame(start)) is None:
            self._compact()
            return False
        if frame[0] != HELLO or not self._is_for_us(decode_object(frame[3])):
            raise ProtocolError("the guest started another session")
        self._unanswered_syncs -= 1
        self._pos = start + _OVERHEAD + len(frame[3])
        return True

    def _on_message(self, kind: int, message: dict[str, Any] | None) -> Event | None:
        if message is None:
            return None
        if kind == EVENT:
            if type(name := message.pop("event", None)) is not str:
                raise ProtocolError("an event has no name")
            return EventReceived(name, message)
        number: Any = message.get("id")
        result, error = message.get("result"), message.get("error")
        if type(number) is not int or number not in self._asked:
            raise ProtocolError("a reply answers no request")
        self._asked.discard(number)
        if type(result) is dict and error is None:
            return ReplyReceived(number, result, None)
        if type(error) is dict and result is None:
            code, text = error.get("code"), error.get("message")
            if type(code) is str and type(text) is str:
                return ReplyReceived(number, None, (code, text))
        raise ProtocolError("a reply has neither a result nor an error")


class Guest(_End):
    """The guest's end of the port, for all sessions one after another.

    Args:
        identity: ``agent_version``, ``boot_id`` and ``kernel``; read anew for each hello: change it at will.
        window: Bytes that the host may send on a stream before credit is granted.
    """

    def __init__(self, identity: dict[str, str], window: int = DEFAULT_WINDOW) -> None:
        super().__init__(window)
        self.identity = identity
        self._epoch = 0
        self._requests: set[int] = set()

    def hang_up(self, reason: str = "the host hung up") -> SessionEnded | None:
        """Drop the session, any half frame and all that was to be sent; None when no session was open.

        Only for a hang-up that lasts: one that is over may belong to an earlier connection, and the session
        may be the new one's already (contracts/guest-protocol.md, Sync and hello).
        """
        self._incoming.clear()
        self._pos = 0
        return self._end(reason)

    def send_reply(self, request: RequestReceived, result: Mapping[str, Any]) -> None:
        """Answer *request*; dropped silently when its session is over.

        Raises:
            TooLargeError: The reply is too large; send an error instead.
            LocalError: It was answered already.
        """
        if self._is_open(request):
            self._send_message(REPLY, {"id": request.id, "result": result})
            self._requests.discard(request.id)

    def send_error(self, request: RequestReceived, code: str, message: str) -> None:
        """Answer *request* with an error; as `send_reply`."""
        if self._is_open(request):
            error = {"code": code, "message": message[:1000]}
            self._send_message(REPLY, {"id": request.id, "error": error})
            self._requests.discard(request.id)

    def send_event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Tell the host; dropped silently while no session is open (it asks for the state when it comes)."""
        if self.established:
            self._send_message(EVENT, {"event": name, **fields})

    def _is_open(self, request: RequestReceived) -> bool:
        if not self.established or request.epoch != self._epoch:
            return False
        if request.id not in self._requests:
            raise LocalError(f"Request {request.id} was answered already.")
        return True

    def _end(self, reason: str) -> SessionEnded | None:
        self._drop_unsent()
        self._requests.clear()
        self._begin()
        was, self.established = self.established, False
        return SessionEnded(reason) if was else None

    def _is_for_us(self, hello: dict[str, Any]) -> bool:
        session = hello.get("session")
        return (
            type(session) is str
            and len(session) == 32
            and _HEX.issuperset(session)
            and _is_int(hello.get("version"), 0, 1 << 31)
        )

    def _events(self) -> Iterator[Event]:
        while True:
            if self.established:
                try:
                    event = self._next_event()
                except ProtocolError as exc:
                    # The frame stays in the buffer: a marker may stand right there.
                    event = self._end(str(exc))
            else:
                if (hello := self._hunt()) is None:
                    return
                event = self._on_hello(hello)
                if event is None:
                    continue
            if event is None:
                return
            yield event

    def _on_hello(self, hello: dict[str, Any]) -> Event | None:
        """Answer; None when the host speaks another version, which leaves no session open."""
        window = hello.get("window")
        answer: dict[str, Any] = {"version": VERSION, "session": hello["session"]}
        fits = hello["version"] == VERSION and _is_int(window, 1, MAX_WINDOW)
        if fits:
            answer |= {"window": self.window, **self.identity}
        self._drop_unsent()
        self._send(MARKER + encode_frame(HELLO, 0, encode_object(answer)))
        if not fits:
            return None
        self._begin()
        self._requests.clear()
        self._epoch += 1
        self._peer_window = window or 0
        self.established = True
        return SessionStarted(hello)

    def _next_event(self) -> Event | None:
        while (frame := self._take_frame()) is not None:
            kind, flags, stream, payload = frame
            if kind >= DATA:
                event = self._on_stream(kind, stream, payload)
            elif kind == REQUEST:
                event = self._on_request(self._assemble(kind, flags, payload))
            else:
                raise ProtocolError(f"the host sent a {_KIND_NAMES[kind]} inside a session")
            if event is not None:
                return event
        return None

    def _on_request(self, message: dict[str, Any] | None) -> Event | None:
        if message is None:
            return None
        number: Any = message.get("id")
        method, params = message.get("method"), message.get("params")
        if not _is_int(number, 1, 1 << 62) or number in self._requests or len(self._requests) >= MAX_REQUESTS:
            raise ProtocolError("a request has a bad id")
        if type(method) is not str or type(params) is not dict:
            raise ProtocolError("a request has no method or no params")
        self._requests.add(number)
        return RequestReceived(number, method, params, self._epoch)
