"""The input and output of a container's main process, and who is attached to them.

What it writes goes to its log and to everybody who is attached. One of those who does not read holds the
process up, like the reader of a pipe; whoever is not attached holds up nobody.
"""

from __future__ import annotations

import os
import socket

from vcnode.guest.agent import ttys
from vcnode.guest.agent.execs import Input
from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure
from vcnode.guest.agent.logs import STDERR, STDOUT, Pipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.logs import Log
    from vcnode.guest.agent.loop import Loop
    from vcnode.guest.agent.port import Port

SIZE = (24, 80)
"""Rows and columns of a terminal that nobody has attached to yet."""


class MainIo:
    """Descriptors of one run of a main process; the `logs.Listeners` of its outputs.

    Args:
        loop: Where to wait.
        log: Gets all output.
        stdin: Whether its input can be written to; otherwise it is /dev/null.
        tty: Whether it has a terminal: then all output is STDOUT.
    """

    def __init__(self, loop: Loop, log: Log, *, stdin: bool, tty: bool) -> None:
        self._loop = loop
        self._log = log
        self._stdin = stdin
        self.tty = tty
        self._sock: socket.socket | None = None
        self._reading: dict[int, int] = {}
        """Descriptors that are not read yet."""
        self._outputs: dict[int, Pipe] = {}
        self._input = -1
        self._attached: list[Attachment] = []

    def open(self) -> list[int]:
        """Make the descriptors of the child's stdin, stdout and stderr; the caller closes them."""
        theirs: list[int] = []
        try:
            if self.tty:
                self._sock, there = socket.socketpair()
                self._sock.setblocking(False)
                theirs.append(there.detach())
                theirs += [os.dup(theirs[0]), os.dup(theirs[0])]
                return theirs
            if self._stdin:
                read_end, self._input = os.pipe()
                os.set_blocking(self._input, False)
                theirs.append(read_end)
            else:
                theirs.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            for kind in (STDOUT, STDERR):
                read_end, write_end = os.pipe()
                theirs.append(write_end)
                os.set_blocking(read_end, False)
                self._reading[kind] = read_end
        except OSError:
            for fd in theirs:
                os.close(fd)
            self.close()
            raise
        return theirs

    def begin(self) -> None:
        """The child is there: read what it writes."""
        for kind, fd in self._reading.items():
            self._outputs[kind] = Pipe(self._loop, fd, self._log, kind, self)
        self._reading.clear()

    def take_terminal(self) -> None:
        """The program runs: its terminal has come. Raises `Failure` when it has not."""
        if self._sock is None:
            return
        sock, self._sock = self._sock, None
        with sock:
            self._reading[STDOUT] = fd = ttys.receive(sock)
        if self._stdin:
            self._input = os.dup(fd)
        self.begin()

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        for fd in self._reading.values():
            os.close(fd)
        self._reading.clear()
        for pipe in self._outputs.values():
            pipe.close()
        self.close_input()

    # -- output ------------------------------------------------------------------------------------

    @property
    def are_full(self) -> bool:
        """See `logs.Listeners.are_full`."""
        return any(attachment.is_full for attachment in self._attached)

    def feed(self, kind: int, data: bytes) -> None:
        """See `logs.Listeners.feed`."""
        for attachment in self._attached:
            attachment.feed(kind, data)

    def resume(self) -> None:
        """Somebody who was full may have room again."""
        if not self.are_full:
            for pipe in self._outputs.values():
                pipe.resume()

    def drain(self) -> None:
        """The main process has ended: take what it has written.

        Its outputs may be held by others still, outside its namespace; they are read on, for the log alone.
        """
        for pipe in self._outputs.values():
            pipe.drain()

    def ended(self, exit_code: int) -> None:
        """All of its output was taken: tell those who are attached."""
        self.close_input()
        attached, self._attached = self._attached, []
        for attachment in attached:
            attachment.ended(exit_code)
        self.resume()
        if self.tty:
            self.close()

    # -- input -------------------------------------------------------------------------------------

    def input_fd(self) -> int | None:
        """Another descriptor that leads to its input; None when it has none, or that was ended."""
        return os.dup(self._input) if self._input >= 0 else None

    def close_input(self) -> None:
        """End its input, as far as it is ours. Idempotent."""
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, if it has one."""
        if self.tty and (pipe := self._outputs.get(STDOUT)) is not None and pipe.fd >= 0:
            ttys.set_size(pipe.fd, rows, columns)

    # -- attachments -------------------------------------------------------------------------------

    def attach(self, attachment: Attachment) -> None:
        """Give it what comes from now on."""
        self._attached.append(attachment)

    def detach(self, attachment: Attachment) -> None:
        """Give it no more. Idempotent."""
        if attachment in self._attached:
            self._attached.remove(attachment)
            self.resume()


class Attachment:
    """One who is attached: what the host has not taken yet waits here, at most one piece for each stream."""

    def __init__(
        self,
        loop: Loop,
        port: Port,
        io: MainIo,
        number: int,
        streams: tuple[int, int, int | None],
        forget: Callable[[Attachment], None],
    ) -> None:
        self.number = number
        self.io = io
        self.signal: Callable[[int], None] = lambda _: None
        """Signals the main process."""
        self._port = port
        self._stdin, self._streams = streams[0], {STDOUT: streams[1], STDERR: streams[2]}
        self._pending: dict[int, bytearray] = {s: bytearray() for s in streams[1:] if s is not None}
        self._exit_code: int | None = None
        self._forget = forget
        self._eof = False
        fd = io.input_fd()
        self.input = None if fd is None else Input(loop, port, streams[0], fd, self._input_ended)

    @property
    def streams(self) -> tuple[int, ...]:
        """All its streams."""
        return (self._stdin, *(stream for stream in self._streams.values() if stream is not None))

    @property
    def is_full(self) -> bool:
        """Whether it takes no more for now."""
        return any(self._pending.values())

    def feed(self, kind: int, data: bytes) -> None:
        """Output of the process."""
        stream = self._streams[kind]
        if stream is not None and stream in self._pending:
            self._pending[stream] += data
            self._flush(stream)

    def _flush(self, stream: int) -> None:
        pending = self._pending[stream]
        while pending and (room := self._port.room(stream)) > 0:
            part = bytes(pending[:room])
            self._port.send_data(stream, part)
            del pending[: len(part)]
        if not pending and self._exit_code is not None:
            del self._pending[stream]
            self._port.send_eof(stream)
            self._maybe_finish()

    def credit(self) -> None:
        """The host takes more."""
        for stream in list(self._pending):
            self._flush(stream)
        self.io.resume()

    def reset(self, stream: int) -> None:
        """The host wants no more of an output."""
        if self._pending.pop(stream, None) is not None:
            self._port.send_eof(stream)
            self.io.resume()
            self._maybe_finish()

    def eof(self) -> None:
        """The host has ended the input: of the process, too."""
        self._eof = True
        if self.input is not None:
            self.input.eof()

    def _input_ended(self) -> None:
        if self._eof and not self.io.tty:
            self.io.close_input()

    def ended(self, exit_code: int) -> None:
        """The process has ended, or the host has enough: tell it so once it has all."""
        self._exit_code = exit_code
        for stream in list(self._pending):
            self._flush(stream)
        self._maybe_finish()

    def detach(self) -> None:
        """The host has enough."""
        self.io.detach(self)
        for pending in self._pending.values():
            pending.clear()
        self.ended(0)

    def _maybe_finish(self) -> None:
        if self._exit_code is None or self._pending:
            return
        self.close_input()
        self._port.send_reset(self._stdin)
        self._port.send_event("process_exited", {"process_id": self.number, "exit_code": self._exit_code})
        self._forget(self)

    def close_input(self) -> None:
        """Let go of the process's input, without ending it. Idempotent."""
        if self.input is not None:
            self._eof = False
            self.input.close()


class Attachments:
    """All who are attached, over the one session with the host."""

    def __init__(self, loop: Loop, port: Port, new_id: Callable[[], int]) -> None:
        self._loop = loop
        self._port = port
        self._new_id = new_id
        self._by_stream: dict[int, Attachment] = {}
        self._by_id: dict[int, Attachment] = {}

    def attach(
        self, io: MainIo, streams: tuple[int | None, int | None, int | None], signal: Callable[[int], None]
    ) -> int:
        """Attach to a running process; returns the id that stands for it.

        Raises:
            Failure: ``invalid_argument``; nothing is left.
        """
        stdin, stdout, stderr = streams
        if stdin is None or stdout is None or (stderr is None) != io.tty:
            raise Failure(FAILED_PRECONDITION, "The streams do not go with the process's terminal.")
        opened: list[int] = []
        try:
            for stream in (stdin, stdout, stderr):
                if stream is not None:
                    self._port.open_stream(stream, sending=stream != stdin)
                    opened.append(stream)
        except Failure:
            for stream in opened:
                self._port.forget_stream(stream)
            raise
        found = Attachment(self._loop, self._port, io, self._new_id(), (stdin, stdout, stderr), self._forget)
        found.signal = signal
        self._by_id[found.number] = found
        for stream in found.streams:
            self._by_stream[stream] = found
        io.attach(found)
        return found.number

    def _forget(self, attachment: Attachment) -> None:
        self._by_id.pop(attachment.number, None)
        for stream in attachment.streams:
            self._by_stream.pop(stream, None)

    def find(self, number: int) -> Attachment | None:
        """The one of that id."""
        return self._by_id.get(number)

    # -- what the host sends: True when the stream is one of these ------------------------------------

    def data(self, stream: int, pieces: list[bytes | memoryview]) -> bool:
        """Bytes for the input."""
        if (found := self._by_stream.get(stream)) is None:
            return False
        if found.input is not None:
            found.input.data(pieces)
        else:
            self._port.consumed(stream, sum(map(len, pieces)))
        return True

    def eof(self, stream: int) -> bool:
        """End of the input."""
        if (found := self._by_stream.get(stream)) is None:
            return False
        found.eof()
        return True

    def credit(self, stream: int) -> bool:
        """The host takes more."""
        if (found := self._by_stream.get(stream)) is None:
            return False
        found.credit()
        return True

    def reset(self, stream: int) -> bool:
        """The host wants no more of an output."""
        if (found := self._by_stream.get(stream)) is None:
            return False
        found.reset(stream)
        return True

    def resume_all(self) -> None:
        """The queue to the host has room again."""
        for found in list(self._by_id.values()):
            found.credit()

    def end_session(self) -> None:
        """The session with the host is over; the processes go on."""
        for found in list(self._by_id.values()):
            found.close_input()
            found.io.detach(found)
        self._by_id.clear()
        self._by_stream.clear()
