"""The virtio-serial port, and the protocol session on it.

The port tells of hang-up for as long as the host is away, so it is watched edge-triggered: the driver wakes
its waiters when data has come, when there is room to write, and when the host opens or closes its end, and an
agent whose host is away sleeps. Source: Linux drivers/char/virtio_console.c, port_fops_poll and
handle_control_message.
"""

from __future__ import annotations

import mmap
import os
import select
import time

from vcnode.guest import protocol
from vcnode.guest.agent import uevents
from vcnode.guest.agent.failures import INTERNAL, Failure
from vcnode.guest.agent.loop import EDGE, HUP, IN, OUT
from vcnode.guest.agent.params import invalid
from vcnode.guest.agent.relay import Relay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from vcnode.guest.agent.loop import Loop, Timer

    class Listener(Protocol):
        """Who carries out what comes over the port."""

        def request(self, answer: Answer, method: str, params: dict[str, Any]) -> None:
            """Answer it, now or later."""

        def data(self, stream: int, pieces: list[bytes | memoryview]) -> None:
            """Bytes of a stream. Views may be written over after this call."""

        def eof(self, stream: int) -> None:
            """End of a stream."""

        def credit(self, stream: int) -> None:
            """More may be sent on a stream."""

        def reset(self, stream: int) -> None:
            """No more is wanted of a stream."""

        def resume_all(self) -> None:
            """There is room to send again."""

        def end_session(self) -> None:
            """The session is over."""


NAME = protocol.PORT_NAME
SYS_PORTS = "/sys/class/virtio-ports"
APPEARS_WITHIN_S = 10.0
"""How long the port may take to appear after its driver was loaded."""
WINDOW = protocol.DEFAULT_WINDOW
"""Bytes of input that the agent holds for a process at most."""
QUEUE_BYTES = 512 * 1024
"""While more than this waits to be sent, no output is read and no request taken."""
HANG_UP_S = 0.05
"""How long a hang-up must last to count: see contracts/guest-protocol.md, Sync and hello."""
_READ_BYTES = 256 * 1024
_SPACE_BYTES = 2 << 20
"""Several reads: what has come of a frame stays where it is until the rest has."""
_BUFFER_BYTES = 4096
"""Bytes that one read(2) of the port gives at most: those of one buffer of its queue (virtio_console.c)."""


def find(name: str = NAME, sys_ports: str = SYS_PORTS) -> str | None:
    """The device file of the port called *name*; None while there is none."""
    if not os.path.isdir(sys_ports):
        return None
    for entry in sorted(os.listdir(sys_ports)):
        try:
            with open(f"{sys_ports}/{entry}/name", encoding="utf-8") as file:
                found = file.read().strip()
        except FileNotFoundError:
            continue  # its name has not come yet
        if found == name:
            return f"/dev/{entry}"
    return None


def wait_for(name: str = NAME) -> str:
    """The device file of the port; waits for it, for ports get their names from the host, one by one.

    Raises:
        FileNotFoundError: It did not come within `APPEARS_WITHIN_S`.
    """
    deadline = time.monotonic() + APPEARS_WITHIN_S
    fd = uevents.listen()
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while (path := find(name)) is None:
            if (left_s := deadline - time.monotonic()) <= 0:
                raise FileNotFoundError(f"No virtio-serial port is called {name}.")
            poll.poll(left_s * 1000)
            uevents.drain(fd)
        return path
    finally:
        os.close(fd)


class Answer:
    """The one answer that a request gets; without effect when its session is over by then."""

    __slots__ = ("_guest", "_request")

    def __init__(self, guest: protocol.Guest, request: protocol.RequestReceived) -> None:
        self._guest = guest
        self._request = request

    def result(self, result: dict[str, Any]) -> None:
        """It was done."""
        try:
            self._guest.send_reply(self._request, result)
        except protocol.LocalError as exc:
            self._guest.send_error(self._request, INTERNAL, str(exc))

    def failure(self, failure: Failure) -> None:
        """It was not."""
        self._guest.send_error(self._request, failure.code, failure.message)


class Port:
    """Moves bytes between the descriptor *fd* (non-blocking; the caller closes it) and the protocol."""

    def __init__(self, loop: Loop, fd: int, identity: dict[str, str]) -> None:
        self._loop = loop
        self._fd = fd
        self._guest = protocol.Guest(identity, WINDOW)
        self._unsent = memoryview(b"")
        self._throttled = False
        self._hang_up: Timer | None = None
        self._relay = Relay()
        # One readv(2) takes as many of the queue's buffers as there are, as long as each fills its vector.
        # Mapped and not a bytearray, which is written to when it is made: most guests never use most of it.
        self._space = memoryview(mmap.mmap(-1, _SPACE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._vectors = [self._space[at : at + _BUFFER_BYTES] for at in range(0, _SPACE_BYTES, _BUFFER_BYTES)]
        self._next_vector = 0
        self.listener: Listener
        """To be set before `open`."""

    def open(self) -> None:
        """Begin to serve."""
        self._loop.watch(self._fd, IN | OUT | HUP | EDGE, self._on_ready)
        self._loop.before_wait = self._flush

    # -- bytes -------------------------------------------------------------------------------------

    @property
    def _queued_bytes(self) -> int:
        return self._guest.pending_bytes + len(self._unsent)

    def _read(self) -> memoryview:
        """What has come; to be used before the next read. Raises BlockingIOError."""
        begin = self._next_vector if self._guest.holds_views else 0
        end = begin + _READ_BYTES // _BUFFER_BYTES
        if end > len(self._vectors):
            self._guest.keep()
            begin, end = 0, end - begin
        count = os.readv(self._fd, self._vectors[begin:end])
        self._next_vector = begin + -(-count // _BUFFER_BYTES)
        return self._space[begin * _BUFFER_BYTES :][:count]

    def _on_ready(self, _events: int) -> None:
        """Read until there is nothing more: an edge comes once."""
        while True:
            self._flush()
            if self._queued_bytes > QUEUE_BYTES:
                self._throttled = True
                return
            try:
                data = self._read()
            except BlockingIOError:
                return
            if not data:
                # The driver's way to say that the host is not there.
                self._host_is_away()
                return
            for event in self._guest.receive_data(data):
                self._dispatch(event)

    def _host_is_away(self) -> None:
        if self._hang_up is None or not self._hang_up.pending:
            self._hang_up = self._loop.call_later(HANG_UP_S, self._look_again)

    def _look_again(self) -> None:
        """Drop the session if nobody is connected still; what has come meanwhile is served."""
        try:
            data = self._read()
        except BlockingIOError:
            return  # somebody is, and has not spoken yet
        if data:
            for event in self._guest.receive_data(data):
                self._dispatch(event)
            self._on_ready(0)
        elif (ended := self._guest.hang_up()) is not None:
            self._dispatch(ended)

    def _flush(self) -> None:
        if not self._relay.push(self._fd):
            return
        while True:
            if not self._unsent:
                # All frames of this round in one write: each write is an exit to the host.
                self._unsent = memoryview(self._guest.data_to_send())
                if not self._unsent:
                    break
            try:
                count = os.write(self._fd, self._unsent)
            except BlockingIOError:
                return
            self._unsent = self._unsent[count:]
        if self._throttled:
            self._throttled = False
            self.listener.resume_all()
            self._loop.call_later(0, lambda: self._on_ready(0))

    def when_sent(self, callback: Callable[[], None], *, timeout_s: float) -> None:
        """Call *callback*, once, when all that waits to be sent is with the host, or after *timeout_s*."""
        timer = self._loop.call_later(timeout_s, callback)

        def flush() -> None:
            self._flush()
            if not self._queued_bytes and not self._relay.busy:
                timer.run()

        self._loop.before_wait = flush

    def _dispatch(self, event: protocol.Event) -> None:
        if isinstance(event, protocol.RequestReceived):
            self.listener.request(Answer(self._guest, event), event.method, event.params)
        elif isinstance(event, protocol.DataReceived):
            self.listener.data(event.stream, [event.data])
        elif isinstance(event, protocol.BulkReceived):
            self.listener.data(event.stream, event.pieces)
        elif isinstance(event, protocol.EofReceived):
            self.listener.eof(event.stream)
        elif isinstance(event, protocol.CreditReceived):
            self.listener.credit(event.stream)
        elif isinstance(event, protocol.ResetReceived):
            self.listener.reset(event.stream)
        elif isinstance(event, (protocol.SessionStarted, protocol.SessionEnded)):
            self._unsent = memoryview(b"")
            self._relay.drop()
            self.listener.end_session()

    # -- what the agent sends ----------------------------------------------------------------------

    def open_stream(self, stream: int, *, sending: bool) -> None:
        """Open a stream that a request has named.

        Raises:
            Failure: ``invalid_argument``; the number is in use.
        """
        try:
            if sending:
                self._guest.open_sender(stream)
            else:
                self._guest.open_receiver(stream)
        except protocol.LocalError:
            raise invalid("streams", f"{stream} is no number for a new stream") from None

    def forget_stream(self, stream: int) -> None:
        """Undo `open_stream`: its request failed."""
        self._guest.forget(stream)

    def room(self, stream: int) -> int:
        """How many bytes may be sent on *stream* now, as far as the host and the queue allow."""
        if self._queued_bytes > QUEUE_BYTES or self._relay.busy:
            self._throttled = True
            return 0
        return self._guest.credit(stream)

    def credit(self, stream: int) -> int:
        """How many bytes the host takes on *stream* now; 0 when that is finished."""
        return self._guest.credit(stream)

    def send_data(self, stream: int, data: bytes | memoryview) -> None:
        """Send *data*, at most `room` bytes."""
        self._guest.send_data(stream, data)

    @property
    def takes_pipes(self) -> bool:
        """Whether the host takes what `send_pipe` sends."""
        return self._guest.peer_bulk > 0

    def send_pipe(self, stream: int, pipe: int, count: int) -> int:
        """Send of *count* bytes, which are in *pipe*, as many as can go now, without a copy.

        Returns:
            How many those were; 0 when there is no room: `Listener.resume_all` or `credit` is called later.
        """
        if not (count := min(count, self._guest.bulk_room(stream))):
            return 0
        self._flush()
        if self._queued_bytes or self._relay.busy:
            self._throttled = True
            return 0
        self._relay.begin(pipe, count, *self._guest.begin_bulk(stream, count))
        self._relay.push(self._fd)
        return count

    def send_eof(self, stream: int) -> None:
        """Finish a stream of output."""
        if self._guest.established:
            self._guest.send_eof(stream)

    def send_reset(self, stream: int) -> None:
        """Refuse more of a stream of input."""
        if self._guest.established:
            self._guest.send_reset(stream)

    def consumed(self, stream: int, count: int) -> None:
        """*count* bytes of input were taken by the process."""
        self._guest.consumed(stream, count)

    def send_event(self, name: str, fields: dict[str, Any]) -> None:
        """Tell the host, if it is there."""
        self._guest.send_event(name, fields)
