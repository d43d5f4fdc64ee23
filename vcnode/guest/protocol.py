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

Data may be views of what was received, which the caller may want to use again: see `Guest.keep`.

This runs inside the guest too, where every import costs memory: no typing, enum or dataclasses at run time.
"""

from __future__ import annotations

from vcnode.guest.events import (
    BulkReceived,
    CreditReceived,
    DataReceived,
    EofReceived,
    Event,
    EventReceived,
    ReplyReceived,
    RequestReceived,
    ResetReceived,
    SessionEnded,
    SessionStarted,
)
from vcnode.guest.streams import DEFAULT_WINDOW, MAX_WINDOW, Streams
from vcnode.guest.wire import (
    BULK,
    CREDIT,
    DATA,
    EOF,
    EVENT,
    HEADER_BYTES,
    HELLO,
    KIND_NAMES,
    LONG_SYNC_ZEROS,
    MARKER,
    MAX_BULK_TO_GUEST,
    MAX_BULK_TO_HOST,
    MAX_HELLO,
    MAX_MESSAGE,
    MAX_PAYLOAD,
    MORE,
    OVERHEAD,
    PORT_NAME,
    REPLY,
    REQUEST,
    RESET,
    SYNC_ZEROS,
    VERSION,
    LocalError,
    ProtocolError,
    TooLargeError,
    around_bulk,
    check_bulk_end,
    decode_object,
    encode_frame,
    encode_object,
    find_hello,
    parse_frame,
    parse_header,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

__all__ = [
    "BULK",
    "CREDIT",
    "DATA",
    "DEFAULT_WINDOW",
    "EOF",
    "EVENT",
    "HELLO",
    "MARKER",
    "MAX_BULK_TO_GUEST",
    "MAX_BULK_TO_HOST",
    "MAX_HELLO",
    "MAX_MESSAGE",
    "MAX_PAYLOAD",
    "MAX_REQUESTS",
    "MAX_WINDOW",
    "MORE",
    "PORT_NAME",
    "REPLY",
    "REQUEST",
    "RESET",
    "SYNC_ZEROS",
    "VERSION",
    "BulkReceived",
    "CreditReceived",
    "DataReceived",
    "EofReceived",
    "Event",
    "EventReceived",
    "Guest",
    "Host",
    "LocalError",
    "ProtocolError",
    "ReplyReceived",
    "RequestReceived",
    "ResetReceived",
    "SessionEnded",
    "SessionStarted",
    "TooLargeError",
    "decode_object",
    "encode_frame",
    "encode_object",
]

MAX_REQUESTS = 1_024
"""Most requests without a reply."""
_HEX = frozenset("0123456789abcdef")


def _is_int(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


class _End(Streams):
    """What both ends share.

    Args:
        window: See `Streams`.
        most_bulk: Most bytes of a BULK frame that this end takes.
    """

    def __init__(self, window: int, most_bulk: int) -> None:
        super().__init__(window)
        self._most_bulk = most_bulk
        self._incoming: bytes | memoryview = b""
        self._pos = 0
        self._bulk: tuple[int, int] | None = None
        """Stream and length of the BULK frame that is coming in."""
        self._bulk_left = 0

    def _begin(self) -> None:
        super()._begin()
        self._partial = bytearray()
        self._partial_kind = 0

    # -- bytes out ---------------------------------------------------------------------------------

    def _send_message(self, kind: int, content: Mapping[str, Any]) -> None:
        if not self.established:
            raise LocalError("No session is open.")
        rest = memoryview(encode_object(content))
        while len(rest) > MAX_PAYLOAD:
            self._send(encode_frame(kind, 0, rest[:MAX_PAYLOAD], MORE))
            rest = rest[MAX_PAYLOAD:]
        self._send(encode_frame(kind, 0, rest))

    # -- bytes in ----------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take bytes from the port; iterate over the result to its end to have them parsed."""
        if self._incoming:
            self._compact()
            self._incoming = b"".join((self._incoming, data))
        else:
            self._incoming = data if type(data) is bytes else memoryview(data)
        return self._events()

    def _compact(self) -> None:
        """Let go of what was parsed, and of views that others may write to.

        Views that went out in events stay what they are.
        """
        if self._pos or type(self._incoming) is not bytes:
            self._incoming, self._pos = bytes(self._incoming[self._pos :]), 0

    def _events(self) -> Iterator[Event]:
        raise NotImplementedError

    def _hunt(self) -> dict[str, Any] | None:
        """Drop everything before an acceptable HELLO, and take that."""
        self._compact()
        hello, self._pos = find_hello(bytes(self._incoming), 0, self._is_for_us)
        self._compact()
        return hello

    def _is_for_us(self, hello: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _take_frame(self) -> tuple[int, int, int, bytes | memoryview] | None:
        """The next frame: (kind, flags, stream, payload); None while it is incomplete.

        Of a BULK frame the payload is empty: its pieces went to `_keep_piece` one by one.
        """
        if self._bulk is None:
            header = parse_header(self._incoming, self._pos)
            if header is None or header[0] != BULK:
                return self._take_whole()
            _, _, stream, length = header
            if length > self._most_bulk:
                raise ProtocolError("a BULK frame has a bad length")
            self._bulk, self._bulk_left = (stream, length), length
            self._pos += HEADER_BYTES
            self._begin_bulk(length)
        stream, length = self._bulk
        if piece := memoryview(self._incoming)[self._pos : self._pos + self._bulk_left]:
            self._keep_piece(piece)
            self._bulk_left -= len(piece)
            self._pos += len(piece)
        if self._bulk_left or len(self._incoming) - self._pos < OVERHEAD - HEADER_BYTES:
            self._compact()
            return None
        check_bulk_end(self._incoming, self._pos, stream, length)
        self._pos += OVERHEAD - HEADER_BYTES
        self._bulk = None
        return BULK, 0, stream, b""

    def _begin_bulk(self, length: int) -> None:
        """A BULK frame begins."""

    def _keep_piece(self, piece: memoryview) -> None:
        """Keep a piece of it until it is whole."""
        raise NotImplementedError

    def _take_whole(self) -> tuple[int, int, int, bytes] | None:
        frame = parse_frame(self._incoming, self._pos)
        if frame is None:
            self._compact()
        else:
            self._pos += OVERHEAD + len(frame[3])
        return frame

    def _drop_incoming(self) -> None:
        self._incoming = b""
        self._pos = 0
        self._bulk = None

    def _check_whole(self) -> None:
        if self._partial_kind:
            raise ProtocolError("a message was interrupted by another frame")

    def _assemble(self, kind: int, flags: int, payload: bytes | memoryview) -> dict[str, Any] | None:
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
            return decode_object(bytes(payload))
        whole, self._partial, self._partial_kind = self._partial + payload, bytearray(), 0
        return decode_object(whole)


class Host(_End):
    """The host's end of one connection to a guest. Made anew for each connection.

    Args:
        session: 32 hex digits, fresh and random: stale bytes of an earlier session cannot contain them.
        window: Bytes that the guest may send on a stream before credit is granted.
    """

    def __init__(self, session: str, window: int = DEFAULT_WINDOW) -> None:
        super().__init__(window, MAX_BULK_TO_HOST)
        self.session = session
        self._unanswered_syncs = 0
        self._next_id = 1
        self._asked: set[int] = set()
        self._error: ProtocolError | None = None
        self._frame = bytearray()
        """The payload of the BULK frame that is coming in."""

    def send_sync(self) -> None:
        """Ask for a session. May be repeated until `SessionStarted`: the guest answers each one.

        The first sync is short, for it is on the way of every start, and too short for a guest that was cut
        off in a BULK frame and has not noticed that; one that is repeated is not.

        Raises:
            LocalError: The session is open already.
        """
        if self.established:
            raise LocalError("The session is open already.")
        hello = {"version": VERSION, "session": self.session, "window": self.window, "bulk": MAX_BULK_TO_HOST}
        self._send(LONG_SYNC_ZEROS if self._unanswered_syncs else SYNC_ZEROS)
        self._unanswered_syncs += 1
        self._send(MARKER + encode_frame(HELLO, 0, encode_object(hello)))

    def bulk_space(self) -> memoryview | None:
        """Where the next bytes go when they are payload of a BULK frame: see `bulk_received`."""
        if self._bulk is None or not self._bulk_left or self._incoming:
            return None
        return memoryview(self._frame)[-self._bulk_left :]

    def bulk_received(self, count: int) -> Iterator[Event]:
        """So many bytes were put into `bulk_space`; as `receive_data`."""
        self._bulk_left -= count
        return self._events()

    def _begin_bulk(self, length: int) -> None:
        self._frame = bytearray(length)

    def _keep_piece(self, piece: memoryview) -> None:
        at = len(self._frame) - self._bulk_left
        self._frame[at : at + len(piece)] = piece

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
            self._drop_incoming()
            raise self._error
        try:
            while (event := self._next_event()) is not None:
                yield event
        except ProtocolError as exc:
            self._error = exc
            self.established = False
            self._begin()
            self._drop_unsent()
            self._drop_incoming()
            raise

    def _next_event(self) -> Event | None:
        if not self.established:
            hello = self._hunt()
            return None if hello is None else self._on_hello(hello)
        while True:
            # The guest answers every sync that it gets, also one that was repeated in vain.
            answer_may_come = self._unanswered_syncs and self._bulk is None
            if answer_may_come and self._incoming[self._pos : self._pos + 1] == MARKER[:1]:
                if self._skip_answer():
                    continue
                return None
            if (frame := self._take_frame()) is None:
                return None
            kind, flags, stream, payload = frame
            if kind >= DATA:
                self._check_whole()
                if kind == BULK:
                    payload, self._frame = memoryview(self._frame), bytearray()
                event = self._on_stream(kind, stream, payload)
            elif kind in (REPLY, EVENT):
                event = self._on_message(kind, self._assemble(kind, flags, payload))
            else:
                raise ProtocolError(f"the guest sent a {KIND_NAMES[kind]} inside a session")
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
        bulk = hello.get("bulk")
        if bulk is not None and not _is_int(bulk, 1, MAX_BULK_TO_GUEST):
            raise ProtocolError("the guest's hello has a bad bulk")
        self._peer_window = window
        self.peer_bulk = bulk or 0
        self._unanswered_syncs -= 1
        self.established = True
        return SessionStarted(hello)

    def _skip_answer(self) -> bool:
        """Drop the answer to a repeated sync; False while it is incomplete."""
        start = self._pos + len(MARKER)
        head = bytes(self._incoming[self._pos : start])
        if not MARKER.startswith(head):
            raise ProtocolError("a frame has an unknown kind")
        if len(head) < len(MARKER) or (frame := parse_frame(self._incoming, start)) is None:
            self._compact()
            return False
        if frame[0] != HELLO or not self._is_for_us(decode_object(frame[3])):
            raise ProtocolError("the guest started another session")
        self._unanswered_syncs -= 1
        self._pos = start + OVERHEAD + len(frame[3])
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
        super().__init__(window, MAX_BULK_TO_GUEST)
        self.identity = identity
        self._epoch = 0
        self._requests: set[int] = set()
        self._pieces: list[bytes | memoryview] = []
        """What has come of a BULK frame that is not whole yet."""

    @property
    def holds_views(self) -> bool:
        """Whether something is kept of what was received, without a copy: see `keep`."""
        return bool(self._pieces)

    def keep(self) -> None:
        """Copy what is kept of what was received. To be called before that is written over."""
        if self._pieces:
            self._pieces = [b"".join(self._pieces)]

    def hang_up(self, reason: str = "the host hung up") -> SessionEnded | None:
        """Drop the session, any half frame and all that was to be sent; None when no session was open.

        Only for a hang-up that lasts: one that is over may belong to an earlier connection, and the session
        may be the new one's already (contracts/guest-protocol.md, Sync and hello).
        """
        self._drop_incoming()
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
                    self._put_back_bulk()
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
            answer |= {"window": self.window, "bulk": MAX_BULK_TO_GUEST, **self.identity}
        self._drop_unsent()
        self._send(MARKER + encode_frame(HELLO, 0, encode_object(answer)))
        if not fits:
            return None
        self._begin()
        self._requests.clear()
        self._epoch += 1
        bulk = hello.get("bulk")
        self._peer_window = window or 0
        self.peer_bulk = bulk if bulk is not None and _is_int(bulk, 1, MAX_BULK_TO_HOST) else 0
        self.established = True
        return SessionStarted(hello)

    def _put_back_bulk(self) -> None:
        """Have a BULK frame that is none parsed anew, as something else."""
        if self._bulk is not None:
            rest = memoryview(self._incoming)[self._pos :]
            self._incoming = b"".join((around_bulk(*self._bulk)[0], *self._pieces, rest))
            self._pos, self._bulk = 0, None
        self._pieces.clear()

    def _keep_piece(self, piece: memoryview) -> None:
        # Not to be used before it is whole: it may be half a frame of an earlier session, completed by the
        # zeros of a sync.
        self._pieces.append(piece)

    def _on_bulk(self, stream: int) -> Event | None:
        """Account for a BULK frame, whole now."""
        pieces, self._pieces = self._pieces, []
        events = [self._on_stream(BULK, stream, piece) for piece in pieces]
        return None if None in events else BulkReceived(stream, pieces)

    def _drop_incoming(self) -> None:
        super()._drop_incoming()
        self._pieces.clear()

    def _next_event(self) -> Event | None:
        while (frame := self._take_frame()) is not None:
            kind, flags, stream, payload = frame
            if kind >= DATA:
                self._check_whole()
                event = self._on_bulk(stream) if kind == BULK else self._on_stream(kind, stream, payload)
            elif kind == REQUEST:
                event = self._on_request(self._assemble(kind, flags, payload))
            else:
                raise ProtocolError(f"the host sent a {KIND_NAMES[kind]} inside a session")
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
