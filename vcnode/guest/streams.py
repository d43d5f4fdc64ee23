"""The streams of one end of the guest protocol, their credit, and the bytes that wait to be sent."""

from __future__ import annotations

from vcnode.guest.events import CreditReceived, DataReceived, EofReceived, Event, ResetReceived
from vcnode.guest.wire import (
    BULK,
    CREDIT,
    DATA,
    EOF,
    MAX_PAYLOAD,
    RESET,
    LocalError,
    ProtocolError,
    around_bulk,
    encode_frame,
)

MAX_WINDOW = 16 << 20
"""Largest window, in bytes, that an end may offer."""
DEFAULT_WINDOW = 2 << 20
"""Two of the longest frames: one is on its way while the other is used."""
BULK_FROM = 4096
"""Bytes from which on data go in a BULK frame, if the peer takes those: it costs nobody a checksum."""
_MAX_CROSSED = 3
"""Frames that may cross the EOF of a stream on the wire: two halves of a window, and a RESET."""


class _Receiver:
    """What one receiving stream may still get."""

    __slots__ = ("consumed", "discard", "granted")

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.consumed = 0
        self.discard = False


class Streams:
    """What both ends have in common once a session is open.

    A stream carries bytes in one direction. Its sender is known here by the bytes that it may still send, its
    receiver by those that may still come.
    """

    def __init__(self, window: int) -> None:
        if not 1 <= window <= MAX_WINDOW:
            raise LocalError(f"A window is 1 to {MAX_WINDOW} bytes, not {window}.")
        self.window = window
        """Bytes that the peer may send on a stream before credit is granted."""
        self.established = False
        """Whether a session is open."""
        self.pending_bytes = 0
        """Bytes that wait for `data_to_send`."""
        self._outgoing: list[bytes | memoryview] = []
        self._begin()

    def _begin(self) -> None:
        """Forget everything that belongs to one session."""
        self._peer_window = 0
        self.peer_bulk = 0
        self._senders: dict[int, int] = {}
        self._receivers: dict[int, _Receiver] = {}
        self._last_stream = 0
        self._crossed = 0

    def _send(self, frame: bytes | memoryview) -> None:
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

        It must not change until `data_to_send` was called.

        Raises:
            LocalError: The stream is not open for sending.
        """
        if (credit := self._senders.get(stream)) is None:
            raise LocalError(f"Stream {stream} is not open for sending.")
        rest = memoryview(data)[:credit]
        count = len(rest)
        while rest:
            if len(rest) >= BULK_FROM and self.peer_bulk:
                piece = rest[: self.peer_bulk]
                head, tail = around_bulk(stream, len(piece))
                self._send(head)
                self._send(piece)
                self._send(tail)
            else:
                piece = rest[:MAX_PAYLOAD]
                self._send(encode_frame(DATA, stream, piece))
            rest = rest[len(piece) :]
        self._senders[stream] = credit - count
        return count

    def bulk_room(self, stream: int) -> int:
        """Most bytes of the next `begin_bulk`; 0 when the peer takes no BULK frames."""
        return min(self.peer_bulk, self._senders.get(stream, 0))

    def begin_bulk(self, stream: int, count: int) -> tuple[bytes, bytes]:
        """Account for a BULK frame whose *count* bytes, at most `bulk_room`, the caller sends itself.

        Returns:
            What comes before and after them. All that was queued before must have been sent by then.

        Raises:
            LocalError: So much may not be sent.
        """
        if not 0 < count <= self.bulk_room(stream):
            raise LocalError(f"A BULK frame of {count} bytes cannot be sent on stream {stream}.")
        self._senders[stream] -= count
        return around_bulk(stream, count)

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
            self._send(encode_frame(CREDIT, stream, receiver.consumed.to_bytes(4, "big")))
            receiver.granted += receiver.consumed
            receiver.consumed = 0

    def _on_stream(self, kind: int, stream: int, payload: bytes | memoryview) -> Event | None:
        """Account for a frame of a stream."""
        if stream > self._last_stream:
            raise ProtocolError("a frame is for a stream that was never opened")
        if kind in (DATA, EOF, BULK):
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
        more = int.from_bytes(payload, "big")
        if not 0 < more <= self._peer_window - credit:
            raise ProtocolError("more credit was granted than was used")
        self._senders[stream] = credit + more
        return CreditReceived(stream)

    def _on_receiver(self, kind: int, stream: int, payload: bytes | memoryview) -> Event | None:
        if (receiver := self._receivers.get(stream)) is None:
            raise ProtocolError("data came on a finished stream")
        if kind == EOF:
            del self._receivers[stream]
            return None if receiver.discard else EofReceived(stream)
        receiver.granted -= len(payload)
        if receiver.granted < 0:
            raise ProtocolError("more data came than credit was granted")
        return None if receiver.discard else DataReceived(stream, payload)
