"""A process over SSH, and a connection through it: one channel each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

import asyncssh

from vcnode.drivers.agent.sshd.script import Word
from vcnode.drivers.base import ProcessExit
from vcnode.errors import AgentError, FailedPreconditionError, InvalidArgumentError

OutputName = Literal["stdout", "stderr"]
WINDOW_BYTES = 256 * 1024
"""Output of one process that is kept until it is read; then the guest waits."""
SIGKILL = 9
_SIGNALS = {"ABRT": 6, "ALRM": 14, "FPE": 8, "HUP": 1, "ILL": 4, "INT": 2, "KILL": 9, "PIPE": 13, "QUIT": 3}
_SIGNALS |= {"SEGV": 11, "TERM": 15, "USR1": 10, "USR2": 12, "BUS": 7, "TRAP": 5, "SYS": 31, "XCPU": 24}
"""Names in ``exit-signal``. Source: RFC 4254, 6.10; signal(7). Servers send others as ``SIG<number>@…``."""


class Channel(asyncssh.SSHClientSession[bytes]):
    """The state of one channel; waiters look again at each change."""

    def __init__(self, on_close: Callable[[Channel], None] | None = None) -> None:
        self._on_close = on_close
        self.chan: asyncssh.SSHClientChannel[bytes] | None = None
        self.pieces: deque[tuple[OutputName, bytes]] = deque()
        self.held_bytes = 0
        self.code: int | None = None
        self.ended = False
        """No output will come."""
        self.lost: Exception | None = None
        self._writable = True
        self._changed = asyncio.Event()

    # -- called by asyncssh --------------------------------------------------------------------------------

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """The channel is open."""
        self.chan = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        """Output has come."""
        self.keep("stderr" if datatype == asyncssh.EXTENDED_DATA_STDERR else "stdout", data)

    def eof_received(self) -> bool:
        """Both outputs have ended; input goes on."""
        self.ended = True
        self.wake()
        return True

    def exit_status_received(self, status: int) -> None:
        """The process has ended."""
        self.code = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        """A signal has ended the process."""
        digits = signal.partition("@")[0].removeprefix("SIG")
        self.code = 128 + _SIGNALS.get(signal, int(digits) if digits.isdecimal() and len(digits) < 3 else 0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed, in good order or not."""
        self.ended = True
        if self.code is None:
            self.lost = exc or ConnectionResetError("closed without an exit status")
        self.wake()
        if self._on_close is not None:
            self._on_close(self)

    def pause_writing(self) -> None:
        """The guest takes no more input now."""
        self._writable = False

    def resume_writing(self) -> None:
        """It does again."""
        self._writable = True
        self.wake()

    # -- called by the owner -------------------------------------------------------------------------------

    def keep(self, name: OutputName, data: bytes) -> None:
        """Keep output until it is read; the guest waits when there is much."""
        if data:
            self.pieces.append((name, data))
            self.held_bytes += len(data)
        if self.chan is not None and self.held_bytes >= WINDOW_BYTES:
            self.chan.pause_reading()
        self.wake()

    def take(self) -> tuple[OutputName, bytes] | None:
        """The next piece, if there is one."""
        if not self.pieces:
            return None
        name, data = self.pieces.popleft()
        self.held_bytes -= len(data)
        if self.chan is not None and self.held_bytes < WINDOW_BYTES:
            self.chan.resume_reading()
        return name, data

    def wake(self) -> None:
        """Let all waiters look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until *condition* holds."""
        while not condition():
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """Send; waits while the guest does not read. Dropped once the channel is closed."""
        if self.chan is None or self.over:
            return
        try:
            self.chan.write(data)
        except BrokenPipeError:
            return  # it has ended just now
        await self.until(lambda: self._writable or self.over)

    def write_eof(self) -> None:
        """Send no more. Idempotent."""
        if self.chan is not None and not self.over:
            with contextlib.suppress(BrokenPipeError):  # sent already, or the channel is being closed
                self.chan.write_eof()

    @property
    def over(self) -> bool:
        """Whether the process has ended, or is out of reach."""
        return self.code is not None or self.lost is not None


class ShellChannel(Channel):
    """A channel on which the word of `script.start` comes first, on standard error or on the terminal."""

    def __init__(self, token: str, *, tty: bool) -> None:
        super().__init__()
        self.word = Word(token.encode())
        self._on: OutputName = "stdout" if tty else "stderr"

    def keep(self, name: OutputName, data: bytes) -> None:
        """Keep output, but for the word."""
        super().keep(name, self.word.take(data) if name == self._on else data)

    def eof_received(self) -> bool:
        """No word will come any more: what was said instead is the process's output."""
        self._give_up()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As `eof_received`, which a server may leave out."""
        self._give_up()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.word.pid is None and (said := self.word.before):
            self.word.before = b""
            super().keep(self._on, said)

    async def started(self) -> None:
        """Wait for the word, or the end."""
        await self.until(lambda: self.word.pid is not None or self.code is not None or self.lost is not None)


class SshdProcess:
    """A `RunningProcess` on a channel.

    Args:
        channel: Its channel; the word has come, or the end.
        tty: Whether it has a terminal.
        send_signal: Sends a signal to the process of that id and its session.
        lost: The error for a connection that was lost.
    """

    def __init__(
        self,
        channel: ShellChannel,
        *,
        tty: bool,
        send_signal: Callable[[int, int], Awaitable[None]],
        lost: Callable[[], AgentError],
    ) -> None:
        self._channel = channel
        self._tty = tty
        self._send_signal = send_signal
        self._lost = lost
        self._closed = False

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`."""
        await self._channel.write(data)

    async def close_stdin(self) -> None:
        """See `RunningProcess.close_stdin`. Of a terminal nothing ends."""
        if not self._tty:
            self._channel.write_eof()

    async def output(self) -> AsyncIterator[tuple[OutputName, bytes]]:
        """See `RunningProcess.output`."""
        channel = self._channel
        while True:
            await channel.until(lambda: bool(channel.pieces) or channel.ended or self._closed)
            piece = None if self._closed else channel.take()
            if piece is None:
                return
            yield piece

    async def resize(self, rows: int, columns: int) -> None:
        """See `RunningProcess.resize`."""
        if self._tty and not self._channel.over and self._channel.chan is not None:
            self._channel.chan.change_terminal_size(columns, rows)

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`."""
        if not 1 <= number <= 64:
            raise InvalidArgumentError.field("signal", f"{number} is not a signal; use 1 to 64.")
        pid = self._channel.word.pid
        if pid is not None and not self._channel.over:
            await self._send_signal(pid, number)

    async def wait(self) -> ProcessExit:
        """See `RunningProcess.wait`."""
        channel = self._channel
        await channel.until(lambda: channel.code is not None or channel.lost is not None)
        if channel.code is None:
            raise self._lost() from channel.lost
        return ProcessExit(channel.code)

    async def close(self) -> None:
        """See `RunningProcess.close`."""
        if not self._closed:
            self._closed = True
            self._channel.wake()
            try:
                await self.signal(SIGKILL)
            finally:
                if self._channel.chan is not None:
                    self._channel.chan.close()


class SshdConnection:
    """A `GuestConnection` through the server: a ``direct-tcpip`` channel."""

    def __init__(self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connection: asyncssh.SSHClientConnection, port: int) -> SshdConnection:
        """Connect to a port of the guest's loopback.

        Raises:
            FailedPreconditionError: Nobody listens there.
            AgentError: The server forwards nothing.
        """
        try:
            reader, writer = await connection.open_connection("127.0.0.1", port, encoding=None)
        except asyncssh.ChannelOpenError as exc:
            if exc.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                raise AgentError("The guest's SSH server does not forward connections.") from exc
            raise FailedPreconditionError(f"Nobody listens on port {port} of the guest.", port=port) from exc
        return cls(reader, writer)

    async def write(self, data: bytes) -> None:
        """See `GuestConnection.write`."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (BrokenPipeError, ConnectionError, asyncssh.Error):
            return  # the other side has closed: dropped

    async def close_write(self) -> None:
        """See `GuestConnection.close_write`."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    async def received(self) -> AsyncIterator[bytes]:
        """See `GuestConnection.received`."""
        while True:
            try:
                data = await self._reader.read(32 * 1024)
            except (ConnectionError, asyncssh.Error):
                return
            if not data:
                return
            yield data

    async def close(self) -> None:
        """See `GuestConnection.close`."""
        self._writer.close()
