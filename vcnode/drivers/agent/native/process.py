"""One process in the guest with its streams, as the native session hands it out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Literal, Protocol

from vcnode.drivers.base import ProcessExit
from vcnode.errors import InvalidArgumentError

OutputName = Literal["stdout", "stderr"]
Piece = bytes | bytearray | memoryview
SIGKILL = 9
_JOIN_BELOW = 16 * 1024
"""Pieces of fewer bytes are joined; no other keeps more than 16 times its size in memory."""


class Owner(Protocol):
    """What a process needs of its session."""

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        ...

    def send_data(self, stream: int, data: memoryview) -> int | None:
        """Send what credit allows; None when the guest takes no more of this stream, ever."""
        ...

    def send_eof(self, stream: int) -> None:
        """End a stream."""
        ...

    def send_reset(self, stream: int) -> None:
        """Refuse the rest of a stream."""
        ...

    def consumed(self, stream: int, count: int) -> None:
        """Let the guest send more of a stream."""
        ...

    async def writable(self) -> None:
        """Wait until the port takes more."""
        ...

    async def signal_process(self, process_id: int, number: int) -> None:
        """Send a signal and wait for the answer."""
        ...

    async def resize_process(self, process_id: int, rows: int, columns: int) -> None:
        """Set the size of a terminal and wait for the answer."""
        ...

    def detach_process(self, process_id: int) -> None:
        """Detach without waiting for the answer."""
        ...

    def kill_process(self, process_id: int) -> None:
        """Send SIGKILL without waiting for the answer."""
        ...


class NativeProcess:
    """A `RunningProcess`. Its output is kept here until it is read: at most one window for each stream.

    Small pieces of one stream are kept as one, so that a guest which sends them one by one cannot make us
    hold a thousand times their size.
    """

    def __init__(self, owner: Owner, *, stdin: int, stdout: int, stderr: int | None) -> None:
        self._owner = owner
        self._stdin = stdin
        self._names: dict[int, OutputName] = {stdout: "stdout"}
        if stderr is not None:
            self._names[stderr] = "stderr"
        self._streams: dict[OutputName, int] = {name: stream for stream, name in self._names.items()}
        self._unread: dict[OutputName, deque[Piece]] = {}
        self._ended: set[int] = set()
        self._process_id: int | None = None
        self._exit: ProcessExit | None = None
        self._closed = False
        self._stdin_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        """Something that a waiter may wait for has happened; each waiter looks for itself."""

    @property
    def streams(self) -> tuple[int, ...]:
        """Stream ids of stdin, stdout and, without a terminal, stderr."""
        return (self._stdin, *self._names)

    # -- called by the session ---------------------------------------------------------------------

    def started(self, process_id: int) -> None:
        """The guest has started it."""
        self._process_id = process_id
        if self._closed:
            self._let_go(process_id)

    def on_data(self, stream: int, data: bytes | memoryview) -> None:
        """Keep output until it is read; drop it when nobody will."""
        if self._closed:
            return
        held = self._unread.setdefault(self._names[stream], deque())
        if held and type(held[-1]) is bytearray and len(data) < _JOIN_BELOW:
            held[-1] += data
        else:
            # A small view would keep all in memory that it is a view of.
            held.append(data if len(data) >= _JOIN_BELOW else bytearray(data))
        self.wake()

    def on_eof(self, stream: int) -> None:
        """One output has ended."""
        self._ended.add(stream)
        self.wake()

    def on_exit(self, exit_code: int) -> None:
        """The process has ended."""
        self._exit = ProcessExit(exit_code)
        self.wake()

    def wake(self) -> None:
        """Let all waiters look again: credit came, the session is over, …"""
        self._changed.set()
        self._changed = asyncio.Event()

    def discard(self) -> None:
        """Nobody wants it any more: drop output, kill it now or once it has an id. Idempotent."""
        if not self._closed:
            self._closed = True
            self._unread.clear()
            self.wake()
            if self._process_id is not None:
                self._let_go(self._process_id)

    # -- RunningProcess ----------------------------------------------------------------------------

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`. Whole writes do not mix; a cancelled one may be half sent."""
        async with self._stdin_lock:
            rest = memoryview(data)
            while rest and not self._closed and self._exit is None:
                self._owner.check()
                changed = self._changed
                count = self._owner.send_data(self._stdin, rest)
                if count is None:
                    return
                rest = rest[count:]
                if rest and not count:
                    await changed.wait()
                await self._owner.writable()

    async def close_stdin(self) -> None:
        """See `RunningProcess.close_stdin`; comes after what is being written."""
        async with self._stdin_lock:
            self._owner.send_eof(self._stdin)

    async def output(self) -> AsyncIterator[tuple[OutputName, bytes | memoryview]]:
        """See `RunningProcess.output`. Ends early after ``close``; AgentError when the session was lost."""
        while True:
            changed = self._changed
            if self._unread:
                name = next(iter(self._unread))
                pieces = self._unread.pop(name)
                data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                self._owner.consumed(self._streams[name], len(data))
                yield name, data if type(data) is memoryview else bytes(data)
                continue
            if self._closed or self._exit is not None or len(self._ended) == len(self._names):
                return
            self._owner.check()
            await changed.wait()

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`."""
        if not 1 <= number <= 64:
            raise InvalidArgumentError.field("signal", f"{number} is not a signal; use 1 to 64.")
        if self._exit is None and self._process_id is not None:
            await self._owner.signal_process(self._process_id, number)

    async def resize(self, rows: int, columns: int) -> None:
        """See `RunningProcess.resize`."""
        if self._exit is None and self._process_id is not None:
            await self._owner.resize_process(self._process_id, rows, columns)

    async def wait(self) -> ProcessExit:
        """See `RunningProcess.wait`. AgentError when the session was lost before."""
        while self._exit is None:
            changed = self._changed
            self._owner.check()
            await changed.wait()
        return self._exit

    async def close(self) -> None:
        """See `RunningProcess.close`. The kill is on its way on return; ``wait`` still tells the end."""
        self.discard()

    def _let_go(self, process_id: int) -> None:
        if self._exit is None:
            self._owner.kill_process(process_id)
        self._owner.send_eof(self._stdin)
        for stream in self._names:
            self._owner.send_reset(stream)


class NativeAttachment(NativeProcess):
    """The main process of a container: closing this lets go of it, and ends nothing in it."""

    def _let_go(self, process_id: int) -> None:
        if self._exit is None:
            self._owner.detach_process(process_id)


class NativeConnection(NativeProcess):
    """A `GuestConnection`: streams without a process behind them."""

    def connected(self) -> None:
        """The guest has opened it."""
        if self._closed:
            self._let_go_of_streams()

    def discard(self) -> None:
        """Nobody wants it any more. Idempotent."""
        if not self._closed:
            super().discard()
            self._let_go_of_streams()

    def _let_go_of_streams(self) -> None:
        self._owner.send_eof(self._stdin)
        for stream in self._names:
            self._owner.send_reset(stream)

    async def write(self, data: bytes) -> None:
        """See `GuestConnection.write`."""
        await self.write_stdin(data)

    async def close_write(self) -> None:
        """See `GuestConnection.close_write`."""
        await self.close_stdin()

    async def received(self) -> AsyncIterator[bytes | memoryview]:
        """See `GuestConnection.received`."""
        async for _, data in self.output():
            yield data
