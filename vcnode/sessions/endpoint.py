"""One end of a session's streams, without I/O: nothing is lost, doubled or reordered over a bus that may.

Frames go in (`Endpoint.receive`), what they mean comes out, and frames to send pile up
(`Endpoint.take_outgoing`). All positions are absolute, so any frame may be lost, doubled or late:

- A sender keeps what its peer has not *consumed*, at most one window, and so never sends more.
- A receiver that sees a gap says so once; its peer sends again from there.
- What was lost at the very end shows by probes: the answer to a probe tells what of all that was sent
  before it has arrived.

The reliable messages of a session (`send_message`) are streams too, one JSON object a frame.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vcnode.sessions import frames
from vcnode.sessions.frames import ALL, CONTROL_DOWN, CONTROL_UP, Channel, Data, Parts, State

MIN_WINDOW = 64 * 1024
"""Smallest window: the messages need one too."""
MAX_PIECES = 1024
"""Most pieces that a sender keeps, however small they are."""
MAX_MESSAGE_BYTES = 32 * 1024
"""Largest reliable message; well below any server's max_payload."""
ACK_S = 0.1
"""After so many seconds the peer hears of what was consumed, however little that is."""
PROBE_S = (0.5, 4.0)
"""Seconds without progress until a probe, at first and at most (doubled each time)."""
HEARTBEAT_S = 2.5
"""A state is sent at least so often."""


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes of a stream, in order; call `Endpoint.consumed` once they are used."""

    stream: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Ended:
    """The last byte of a stream was given before."""

    stream: int


@dataclass(frozen=True, slots=True)
class Writable:
    """A stream may take more, or is over."""

    stream: int


@dataclass(frozen=True, slots=True)
class Message:
    """A reliable message; it counts as consumed."""

    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The node says that the session, or this attachment, is over."""

    code: str
    message: str


Event = Received | Ended | Writable | Message | Dismissed


class _Sender:
    """What is on its way in one stream: pieces from `base` (not consumed by the peer) to `end`."""

    __slots__ = ("base", "end", "ended", "pieces", "received", "sent")

    def __init__(self, start: int) -> None:
        self.base = self.received = self.sent = self.end = start
        self.ended = False
        self.pieces: deque[tuple[int, memoryview | bytes]] = deque()

    @property
    def last(self) -> int:
        """Where it is over: the end counts as a byte."""
        return self.end + 1 if self.ended else self.end

    def drop_consumed(self) -> None:
        while self.pieces and self.pieces[0][0] + len(self.pieces[0][1]) <= self.base:
            self.pieces.popleft()


class _Receiver:
    """What has come of one stream."""

    __slots__ = ("consumed", "gap_told_at", "received", "told")

    def __init__(self, start: int) -> None:
        self.received = self.consumed = self.told = start
        self.gap_told_at = -1


class Endpoint:
    """One end.

    Args:
        client: Whether this is the client's end; it sends the even streams, the node the odd ones.
        epoch: Number of the attachment; frames of others are ignored.
        window: Bytes of a stream that may be under way or unread.
        chunk: Most bytes of one DATA frame.
        now: The present, in seconds of any clock that the caller sticks to.
    """

    def __init__(self, *, client: bool, epoch: int, window: int, chunk: int, now: float) -> None:
        self._client = client
        self.epoch = epoch
        self._window = window
        self._chunk = chunk
        self._senders: dict[int, _Sender] = {}
        self._receivers: dict[int, _Receiver] = {}
        self._over: set[int] = set()
        """Receivers that are over and of which the peer is to hear."""
        self._highest = -1
        self._out: deque[tuple[Channel, bytes]] = deque()
        self._attached = client
        self._probe = 0
        self._probed: dict[int, int] = {}
        self._echo_due = 0
        self._gaps: set[int] = set()
        self._ack_at: float | None = now if client else None  # the node waits to hear its client
        self._state_at = now
        self._probe_at: float | None = None
        self._probe_s = PROBE_S[0]
        self.heard_at = now
        """When the peer was heard last."""
        self.own_control = CONTROL_UP if client else CONTROL_DOWN
        """The stream of the messages that this end sends."""
        self._peer_control = CONTROL_DOWN if client else CONTROL_UP

    # -- streams -----------------------------------------------------------------------------------

    def open(self, stream: int, start: int = 0) -> None:
        """Open a stream at an offset; the parity of its number tells its direction."""
        self._highest = max(self._highest, stream)
        if (stream & 1 == 0) == self._client:
            self._senders[stream] = _Sender(start)
        else:
            self._receivers[stream] = _Receiver(start)

    def is_sending(self, stream: int) -> bool:
        """Whether *stream* takes bytes: it is open, and has not been ended or refused."""
        sender = self._senders.get(stream)
        return sender is not None and not sender.ended

    def is_receiving(self, stream: int) -> bool:
        """Whether more may come of *stream*."""
        return stream in self._receivers

    def room(self, stream: int) -> int:
        """Bytes that `send` takes now; 0 too when the stream is over."""
        sender = self._senders.get(stream)
        if sender is None or sender.ended or len(sender.pieces) >= MAX_PIECES:
            return 0
        return max(0, self._window - (sender.end - sender.base))

    def send(self, stream: int, data: memoryview, now: float) -> None:
        """Queue *data*, at most `room` bytes; it must not change afterwards."""
        sender = self._senders[stream]
        for at in range(0, len(data), self._chunk):
            piece = data[at : at + self._chunk]
            sender.pieces.append((sender.end, piece))
            sender.end += len(piece)
        self._expect_progress(now)

    def end(self, stream: int, now: float) -> None:
        """No more bytes will be sent. Idempotent."""
        sender = self._senders.get(stream)
        if sender is not None and not sender.ended:
            sender.ended = True
            self._expect_progress(now)

    def abandon(self, stream: int) -> None:
        """Forget a sending stream: the peer has said that it wants no more of it. Idempotent."""
        self._senders.pop(stream, None)

    def refuse(self, stream: int, now: float) -> None:
        """Take no more of a receiving stream, or have seen its end. Idempotent."""
        if self._receivers.pop(stream, None) is not None:
            self._over.add(stream)
            self._ack_at = now

    def consumed(self, stream: int, count: int, now: float) -> None:
        """The user has taken *count* bytes."""
        receiver = self._receivers.get(stream)
        if receiver is None:
            return
        receiver.consumed += count
        if receiver.consumed - receiver.told >= self._window // 4:
            self._ack_at = now
        elif self._ack_at is None:
            self._ack_at = now + ACK_S

    def send_message(self, content: Mapping[str, Any], now: float) -> None:
        """Send a reliable message; it counts against a window of its own, see `message_room`."""
        encoded = json.dumps(content, separators=(",", ":")).encode()
        if len(encoded) > MAX_MESSAGE_BYTES:
            raise ValueError(f"A message of {len(encoded)} bytes is too large.")
        sender = self._senders[self.own_control]
        sender.pieces.append((sender.end, encoded))
        sender.end += len(encoded)
        self._expect_progress(now)

    def end_messages(self, now: float) -> None:
        """No more messages will be sent."""
        self.end(self.own_control, now)

    @property
    def message_room(self) -> bool:
        """Whether another message may be sent now."""
        return self.room(self.own_control) >= MAX_MESSAGE_BYTES

    def is_pending(self, stream: int) -> bool:
        """Whether the peer has yet to consume something of *stream*."""
        sender = self._senders.get(stream)
        return sender is not None and sender.base < sender.last

    @property
    def all_consumed(self) -> bool:
        """Whether the peer has consumed everything that was sent, ends included."""
        return all(sender.base == sender.last for sender in self._senders.values())

    # -- attachments -------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the peer of this epoch has been heard; the node sends nothing before."""
        return self._attached

    def detach(self) -> None:
        """The client is gone: send nothing until one of the next epoch is heard."""
        self._attached = False
        self._out.clear()

    def next_epoch(self) -> dict[int, int]:
        """Node: begin a new attachment.

        Returns:
            Each open stream with the offset at which the new client goes on.
        """
        self.epoch += 1
        self.detach()
        self._probed, self._echo_due = {}, 0
        for sender in self._senders.values():
            sender.sent = sender.received = sender.base
        positions = {number: sender.base for number, sender in self._senders.items()}
        positions |= {number: receiver.received for number, receiver in self._receivers.items()}
        return positions

    # -- in ----------------------------------------------------------------------------------------

    def receive(self, raw: bytes, now: float) -> Iterator[Event]:
        """Take a frame.

        Raises:
            FrameError: It is none, or breaks the rules.
        """
        frame = frames.decode(raw)
        if isinstance(frame, State):
            if frame.from_client == self._client:
                return  # our own: both ends hear what is said on the control subject
            if frame.epoch == self.epoch:
                self.heard_at = now
                yield from self._on_state(frame, now)
        elif isinstance(frame, Data):
            if (frame.stream & 1 == 0) == self._client or frame.epoch != self.epoch:
                return
            self.heard_at = now
            yield from self._on_data(frame, now)
        elif self._client and frame.epoch in (0, self.epoch):
            yield Dismissed(frame.code, frame.message)

    def _on_state(self, state: State, now: float) -> Iterator[Event]:
        self._attached = True
        if state.probe:
            self._echo_due = state.probe
            self._ack_at = now
        answered = bool(state.echo) and state.echo == self._probe
        for stream, received, consumed in state.positions:
            sender = self._senders.get(stream)
            if sender is None:
                continue
            if received == ALL:
                received = consumed = sender.last
                if not sender.ended:
                    del self._senders[stream]  # refused
                    yield Writable(stream)
                    continue
            if consumed > sender.last or received > sender.last:
                raise frames.FrameError("more was received than was sent")
            progress = consumed > sender.base or received > sender.received
            sender.received = max(sender.received, received)
            lost = state.gap or (answered and received < self._probed.get(stream, 0))
            if lost and received == sender.received:
                sender.sent = min(sender.sent, max(received, sender.base))
            if consumed > sender.base:
                sender.base = consumed
                sender.sent = max(sender.sent, min(consumed, sender.last))
                sender.drop_consumed()
                if sender.ended and consumed == sender.last:
                    del self._senders[stream]
                yield Writable(stream)
            if progress:
                self._probe_s = PROBE_S[0]
                self._probe_at = now + self._probe_s
        if answered:
            self._resend_unheard({stream for stream, _, _ in state.positions})
            self._probed = {}
        if self.all_consumed:
            self._probe_at = None

    def _resend_unheard(self, told: set[int]) -> None:
        """The peer answered a probe and said nothing of a stream: it may know none of it."""
        for stream, sent in self._probed.items():
            sender = self._senders.get(stream)
            if stream not in told and sender is not None and sender.base < sent:
                sender.sent = min(sender.sent, sender.base)

    def _on_data(self, frame: Data, now: float) -> Iterator[Event]:
        receiver = self._receivers.get(frame.stream)
        if receiver is None:
            if frame.stream <= self._highest:
                self._over.add(frame.stream)
                self._ack_at = now
            return
        if frame.offset > receiver.received:
            if receiver.gap_told_at != receiver.received:
                receiver.gap_told_at = receiver.received
                self._gaps.add(frame.stream)
            return
        fresh = frame.payload[receiver.received - frame.offset :]
        end = frame.offset + len(frame.payload)
        if end > receiver.consumed + self._window + MAX_MESSAGE_BYTES:
            raise frames.FrameError("more came than the window allows")
        if fresh:
            receiver.received = end
            if frame.stream == self._peer_control:
                yield self._message(fresh, now)
            else:
                yield Received(frame.stream, fresh)
        if frame.ends and receiver.received == end:
            receiver.received += 1
            yield Ended(frame.stream)

    def _message(self, raw: memoryview, now: float) -> Message:
        try:
            content = json.loads(bytes(raw))
        except (ValueError, RecursionError):
            content = None
        if type(content) is not dict:
            raise frames.FrameError("a message is not a JSON object")
        self.consumed(self._peer_control, len(raw), now)
        self._ack_at = now
        return Message(content)

    # -- out and time ------------------------------------------------------------------------------

    def acknowledge(self, now: float) -> None:
        """Tell the peer at once what was consumed."""
        self._ack_at = now

    def probe_now(self, now: float) -> None:
        """Ask the peer at once what it has: the connection was lost and is back."""
        self._probe_at = now
        self._probe_s = PROBE_S[0]

    def due_at(self) -> float:
        """When `take_outgoing` has something to say at the latest."""
        due = self._state_at + HEARTBEAT_S
        for at in (self._ack_at, self._probe_at):
            if at is not None:
                due = min(due, at)
        return due

    @property
    def has_outgoing(self) -> bool:
        """Whether there are frames to send now, besides those that are due later."""
        return self._attached and (
            bool(self._gaps) or any(sender.sent < sender.last for sender in self._senders.values())
        )

    def take_outgoing(self, now: float, limit_bytes: int = 1 << 20) -> list[tuple[Channel, Parts]]:
        """Frames to send, at most about *limit_bytes*; call again while `has_outgoing`."""
        if not self._attached:
            return []
        made: list[tuple[Channel, Parts]] = []
        if self._gaps:
            gaps = [self._position(stream) for stream in self._gaps if stream in self._receivers]
            made.append(("control", (self._state(gaps, gap=True),)))
            self._gaps.clear()
        self._add_state(made, now)
        for stream, sender in self._senders.items():
            limit_bytes -= self._add_data(made, stream, sender, limit_bytes)
            if limit_bytes <= 0:
                break
        return made

    def _add_data(
        self, made: list[tuple[Channel, Parts]], stream: int, sender: _Sender, limit_bytes: int
    ) -> int:
        """Add what was not sent yet of one stream; returns how many bytes that was."""
        if sender.sent >= sender.last:
            return 0
        added = 0
        channel = frames.channel_of(stream)
        for offset, size, pieces in _grouped(_from(sender.pieces, sender.sent), self._most(stream)):
            if added >= limit_bytes:
                return added
            end = offset + size
            last = sender.ended and end == sender.end
            made.append((channel, frames.encode_data(self.epoch, stream, offset, *pieces, ends=last)))
            sender.sent = end + 1 if last else end
            added += size
        if sender.ended and sender.sent == sender.end:
            made.append((channel, frames.encode_data(self.epoch, stream, sender.end, ends=True)))
            sender.sent += 1
        return added

    def _most(self, stream: int) -> int:
        """Bytes up to which pieces go in one frame; a message is a frame of its own."""
        return 0 if stream == self.own_control else self._chunk

    def _add_state(self, made: list[tuple[Channel, Parts]], now: float) -> None:
        heartbeat = now >= self._state_at + HEARTBEAT_S
        probing = self._probe_at is not None and now >= self._probe_at
        acking = self._ack_at is not None and now >= self._ack_at
        if not (heartbeat or probing or acking):
            return
        full = heartbeat or probing or self._echo_due
        positions = [
            self._position(number)
            for number, receiver in self._receivers.items()
            if full or receiver.consumed != receiver.told
        ]
        positions += [(number, ALL, ALL) for number in self._over]
        self._over.clear()
        if heartbeat or probing:
            self._probe = (self._probe + 1) & 0xFFFF_FFFF or 1
            # A heartbeat proves nothing: on the bus it may have overtaken what is on another subject.
            self._probed = (
                {number: sender.sent for number, sender in self._senders.items()} if probing else {}
            )
            self._state_at = now
        if probing:
            self._probe_s = min(2 * self._probe_s, PROBE_S[1])
            self._probe_at = None if self.all_consumed else now + self._probe_s
        probe = self._probe if heartbeat or probing else 0
        for at in range(0, len(positions) or 1, frames.MAX_ENTRIES):
            part = positions[at : at + frames.MAX_ENTRIES]
            made.append(("control", (self._state(part, probe=probe, echo=self._echo_due),)))
            probe = 0
        self._echo_due = 0
        self._ack_at = None

    def _position(self, stream: int) -> tuple[int, int, int]:
        receiver = self._receivers[stream]
        receiver.told = receiver.consumed
        return stream, receiver.received, receiver.consumed

    def _state(
        self, positions: list[tuple[int, int, int]], *, gap: bool = False, probe: int = 0, echo: int = 0
    ) -> bytes:
        return frames.encode_state(
            self.epoch, positions, from_client=self._client, gap=gap, probe=probe, echo=echo
        )

    def _expect_progress(self, now: float) -> None:
        if self._probe_at is None:
            self._probe_at = now + self._probe_s


def _from(
    pieces: deque[tuple[int, memoryview | bytes]], offset: int
) -> Iterator[tuple[int, memoryview | bytes]]:
    """The pieces from the one that holds *offset* on."""
    skip = 0
    for at, piece in reversed(pieces):
        if at + len(piece) <= offset:
            break
        skip += 1
    for index in range(len(pieces) - skip, len(pieces)):
        yield pieces[index]


def _grouped(
    pieces: Iterator[tuple[int, memoryview | bytes]], most: int
) -> Iterator[tuple[int, int, list[memoryview | bytes]]]:
    """Offset, size and pieces of each frame: as many as fit into *most* bytes, at least one."""
    start, size = 0, 0
    group: list[memoryview | bytes] = []
    for offset, piece in pieces:
        if group and size + len(piece) > most:
            yield start, size, group
            group, size = [], 0
        if not group:
            start = offset
        group.append(piece)
        size += len(piece)
    if group:
        yield start, size, group
