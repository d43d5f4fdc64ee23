"""hyperstart's wire protocol, without I/O: commands and answers on one channel, streams on the other.

A command is ``u32 code | u32 length | payload``, a piece of a stream ``u64 seq | u32 length | payload``, all
big endian; a length counts its header. The guest answers each command in order with ACK or ERROR, says with
NEXT how many bytes of commands it has read, and tells at any time what has ended.

Nothing that a guest sends raises anything but `ProtocolError`, and nothing makes us keep more than a bound.
Source: hyperstart src/api.h, src/init.c, src/event.c; virtcontainers 1.0.8 pkg/hyperstart/types.go.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

CONTROL = struct.Struct(">II")
STREAM = struct.Struct(">QI")
_WORD = struct.Struct(">I")

CHUNK_BYTES = 512
"""Most bytes of commands that are under way: the guest has said NEXT to all before. As runv does."""
PIECE_BYTES = 500
"""Most bytes of input in one frame: the guest keeps 512 for each process and drops what does not fit."""
MAX_COMMAND_BYTES = 16 << 20
"""Longest command; the guest makes room for it."""
MAX_ANSWER_BYTES = 64 * 1024
"""Longest answer to a command that expects no file."""
MAX_EVENT_BYTES = 64 * 1024
MAX_FRAME_BYTES = 64 * 1024
"""Longest piece of a stream; a guest's buffer has 10 KiB."""
MAX_BEFORE_ANSWER = 128 * 1024
"""Bytes that may precede the answer to the first command: what an earlier session has left of messages."""
MAX_BEFORE_SYNC = 1 << 20
"""The same of streams."""
MAX_ID_CHARS = 256
MAX_SEQ = (1 << 63) - 1
"""The guest reads numbers in JSON as signed."""


class ProtocolError(Exception):
    """The guest broke the protocol; the session is over. The text goes into a sentence."""


class Code(IntEnum):
    """Commands, and what the guest says, as hyperhq has them; `Dialect` knows what differs."""

    VERSION = 0
    STARTPOD = 1
    DESTROYPOD = 4
    EXECCMD = 6
    READY = 8
    ACK = 9
    ERROR = 10
    WINSIZE = 11
    PING = 12
    FINISHPOD = 13
    NEXT = 14
    WRITEFILE = 15
    READFILE = 16
    NEWCONTAINER = 17
    KILLCONTAINER = 18
    ONLINECPUMEM = 19
    SETUPINTERFACE = 20
    SETUPROUTE = 21
    REMOVECONTAINER = 22
    PROCESSASYNCEVENT = 23
    SIGNALPROCESS = 24


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between versions of the protocol."""

    version: int
    """As VERSION tells it; below 1000000 both sides must have the same."""
    event_code: int | None
    """PROCESSASYNCEVENT; None: the end of a process is told on its stream only."""
    named_processes: bool
    """Whether processes have ids, by which WINSIZE and SIGNALPROCESS find them."""
    exit_on_stream: bool
    """Whether an exit code may follow the end of a stream."""
    more_interface: bool
    """Whether an interface may have several addresses and an MTU."""
    guest_exec: bool
    """Whether commands can run in the guest itself."""
    cleans_up: bool
    """Whether the guest forgets pod and containers when the last container has ended."""
    signal_deaths_are_zero: bool = False
    """Whether a process that a signal has ended is told to have ended with 0."""
    privileges: bool = False
    """Whether resource limits, capabilities and no_new_privs can be given."""
    kills_all: bool = False
    """Whether KILLCONTAINER can reach every process."""


DIALECTS = {
    4242: Dialect(4242, None, False, True, False, False, True, signal_deaths_are_zero=True),
    4243: Dialect(4243, 23, True, False, True, True, False),
    4244: Dialect(4244, 23, True, False, True, True, False),
}
"""hyperhq's, by what VERSION says."""


def clearcontainers(version: int) -> Dialect:
    """The fork that virtcontainers 1.0.8 speaks with; VERSION does not tell it from hyperhq's."""
    return Dialect(version, 24, False, True, True, False, True, privileges=True, kills_all=True)


@dataclass(frozen=True, slots=True)
class Ready:
    """The guest has opened the channel."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a command."""

    ticket: int
    """As `Control.send` gave it."""
    ok: bool
    payload: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A process has ended."""

    container: str
    process: str
    status: int


@dataclass(frozen=True, slots=True)
class PodFinished:
    """The last container has ended."""

    exit_codes: tuple[int, ...]


ControlEvent = Ready | Answer | ProcessEnded | PodFinished
_TELLS = frozenset({Code.READY, Code.ACK, Code.ERROR, Code.NEXT, Code.FINISHPOD})
_EVENT_CODES = frozenset({23, 24})
"""PROCESSASYNCEVENT of both; no guest sends anything else by these."""


class Control:
    """The channel of commands, one at a time; more wait here."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._dropped = 0
        self._waiting: deque[tuple[int, bytes, int]] = deque()
        self._under_way: tuple[int, int] | None = None
        """Ticket and longest answer of the command that the guest has, or gets."""
        self._unsent = b""
        self._unread = 0
        """Bytes that were sent, and that the guest has not said NEXT to."""
        self._tickets = 0
        self.synced = False
        """Whether the guest has answered: until then anything may come."""

    def send(self, code: int, payload: bytes = b"", *, max_answer: int = MAX_ANSWER_BYTES) -> int:
        """Queue a command; returns the ticket of its answer.

        Raises:
            ValueError: It is longer than `MAX_COMMAND_BYTES`.
        """
        length = CONTROL.size + len(payload)
        if length > MAX_COMMAND_BYTES:
            raise ValueError(f"a command of {length} bytes is too long")
        self._tickets += 1
        self._waiting.append((self._tickets, CONTROL.pack(code, length) + payload, max_answer))
        return self._tickets

    def data_to_send(self) -> bytes:
        """What the guest may get now; to be asked again after each `send` and `receive_data`."""
        if self._under_way is None and self._waiting:
            ticket, self._unsent, max_answer = self._waiting.popleft()
            self._under_way = (ticket, max_answer)
        if self._unread or not self._unsent:
            return b""
        chunk, self._unsent = self._unsent[:CHUNK_BYTES], self._unsent[CHUNK_BYTES:]
        self._unread = len(chunk)
        return chunk

    def receive_data(self, data: bytes) -> list[ControlEvent]:
        """Take what came; returns what it says. Raises ProtocolError."""
        self._received += data
        events: list[ControlEvent] = []
        while len(self._received) >= CONTROL.size:
            code, length = CONTROL.unpack_from(self._received)
            if (problem := self._problem(code, length)) is not None:
                if self.synced:
                    raise ProtocolError(problem)
                self._drop(1)
                continue
            if len(self._received) < length:
                break
            payload = bytes(self._received[CONTROL.size : length])
            del self._received[:length]
            event = self._take(code, payload)
            if event is not None:
                events.append(event)
        return events

    def _problem(self, code: int, length: int) -> str | None:
        """What is wrong with a header; judged before anything of its payload is kept."""
        if code == Code.ACK and self._under_way is not None:
            most = max(self._under_way[1], MAX_ANSWER_BYTES)
        elif code in _TELLS or code in _EVENT_CODES:
            most = MAX_EVENT_BYTES
        else:
            return f"message of unknown code {code}"
        if not CONTROL.size <= length <= CONTROL.size + most:
            return f"message {code} of {length} bytes"
        if (code == Code.READY and length != CONTROL.size) or (
            code == Code.NEXT and length != CONTROL.size + _WORD.size
        ):
            return f"message {code} of {length} bytes"
        return None

    def _drop(self, count: int) -> None:
        del self._received[:count]
        self._dropped += count
        if self._dropped > MAX_BEFORE_ANSWER:
            raise ProtocolError("too much before its first answer")

    def _take(self, code: int, payload: bytes) -> ControlEvent | None:
        if code == Code.READY:
            if self.synced:
                raise ProtocolError("its agent has started anew")
            return Ready()
        if code == Code.NEXT:
            self._next(_WORD.unpack(payload)[0])
            return None
        if code == Code.FINISHPOD:
            if len(payload) % _WORD.size:
                raise ProtocolError("exit codes of half a word")
            return PodFinished(tuple(number for (number,) in _WORD.iter_unpack(payload)))
        if code in _EVENT_CODES:
            return parse_event(payload)
        return self._answer(code, payload)

    def _next(self, count: int) -> None:
        if count > self._unread:
            if self.synced:
                raise ProtocolError(f"NEXT to {count} bytes of {self._unread}")
            return  # of what an earlier session has sent
        self._unread -= count

    def _answer(self, code: int, payload: bytes) -> Answer | None:
        if not self.synced:
            # The first command is VERSION: only a number answers it, whatever else is left from before.
            if code != Code.ACK or len(payload) != _WORD.size or self._under_way is None:
                return None
            self.synced = True
        if self._under_way is None or self._unsent:
            raise ProtocolError("an answer to no command")
        ticket, _ = self._under_way
        # A guest that has answered has read all of it: a NEXT that its port had no room for is lost.
        self._under_way, self._unread = None, 0
        return Answer(ticket, code == Code.ACK, payload)


def parse_event(payload: bytes) -> ProcessEnded | None:
    """What a PROCESSASYNCEVENT tells; None: nothing that this version knows. Raises ProtocolError."""
    try:
        fields = json.loads(payload.rstrip(b"\0"))
    except (ValueError, RecursionError) as exc:
        raise ProtocolError("an event that is not JSON") from exc
    if not isinstance(fields, dict) or not isinstance(fields.get("event"), str):
        raise ProtocolError("an event without a name")
    if fields["event"] != "finished":
        return None
    container, process = (_name(fields.get(key)) for key in ("container", "process"))
    status = fields.get("status", 0)
    if type(status) is not int or not -1 <= status <= 255:
        raise ProtocolError("an exit code that is none")
    return ProcessEnded(container, process, status & 0xFF)


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_ID_CHARS:
        raise ProtocolError("an event of nothing that has a name")
    return value


def parse_version(payload: bytes) -> int:
    """The number in the answer to VERSION. Raises ProtocolError."""
    if len(payload) != _WORD.size:
        raise ProtocolError(f"a version of {len(payload)} bytes")
    number: int = _WORD.unpack(payload)[0]
    return number


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a stream; without data it is its end, or says that nobody has such a stream."""

    seq: int
    data: bytes


class Streams:
    """The channel of streams.

    A session that begins may hear the rest of a frame first. So a frame of a number that nobody has is sent,
    to which the guest answers with an empty one; until then only frames of known streams count.
    """

    def __init__(self, probe: int, known: Collection[int] = ()) -> None:
        self._received = bytearray()
        self._probe = probe
        self._anchors = tuple(seq.to_bytes(8, "big") for seq in (probe, *known))
        self._dropped = 0
        self.synced = False
        """Whether the answer to the probe has come."""

    def receive_data(self, data: bytes) -> list[Piece]:
        """Take what came. Raises ProtocolError."""
        self._received += data
        pieces: list[Piece] = []
        at = 0
        while len(self._received) - at >= STREAM.size:
            seq, length = STREAM.unpack_from(self._received, at)
            good = STREAM.size <= length <= MAX_FRAME_BYTES
            if not self.synced and not (good and seq.to_bytes(8, "big") in self._anchors):
                at = self._next_anchor(at + 1)
                continue
            if not good:
                raise ProtocolError(f"a frame of {length} bytes")
            if len(self._received) - at < length:
                break
            if seq == self._probe and length == STREAM.size:
                self.synced = True
            else:
                pieces.append(Piece(seq, bytes(self._received[at + STREAM.size : at + length])))
            at += length
        del self._received[:at]
        return pieces

    def _next_anchor(self, at: int) -> int:
        """Where the next known number may begin; all before is dropped."""
        found = [i for a in self._anchors if (i := self._received.find(a, at)) >= 0]
        then = min(found, default=max(at, len(self._received) - STREAM.size + 1))
        self._dropped += then - at + 1
        if self._dropped > MAX_BEFORE_SYNC:
            raise ProtocolError("too much before its first answer")
        return then


def frame(seq: int, data: bytes = b"") -> bytes:
    """A piece of input for the guest; without data it is the end."""
    return STREAM.pack(seq, STREAM.size + len(data)) + data


def pieces_of(data: memoryview) -> Sequence[memoryview]:
    """Input cut so that none of it is more than a guest keeps."""
    return [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
