"""One process in the guest with its streams, and the main processes that several may be attached to.

All streams of a guest share one channel, and nothing on it holds up one process alone: while a reader is
behind by more than `MAX_UNREAD_BYTES`, the whole channel waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vcnode.drivers.base import ProcessExit
from vcnode.errors import InvalidArgumentError

OutputName = Literal["stdout", "stderr"]
MAX_UNREAD_BYTES = 1 << 20
"""Unread output of one reader at which the channel is read no more; twice as much can be kept."""
SIGKILL = 9
DEATH_BY_SIGNAL = 128


class Owner(Protocol):
    """What a process needs of its session."""

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        ...

    async def write_input(self, running: Running, data: memoryview) -> None:
        """Send input, each piece once the guest has taken the one before."""
        ...

    def end_input(self, running: Running) -> None:
        """Send the end of input."""
        ...

    async def signal_process(self, running: Running, number: int) -> None:
        """Send a signal and wait for the answer."""
        ...

    async def resize_process(self, running: Running, rows: int, columns: int) -> None:
        """Set the size of a terminal and wait for the answer."""
        ...

    def kill_unasked(self, running: Running) -> None:
        """Send SIGKILL without waiting for the answer."""
        ...

    def look_at_readers(self) -> None:
        """Read the channel, or not, as the readers are."""
        ...


class Reader:
    """Output on its way to somebody who reads it."""

    def __init__(self) -> None:
        self.unread: deque[tuple[OutputName, bytes]] = deque()
        self.size = 0
        self.ended = False
        self.closed = False
        self.changed = asyncio.Event()

    def add(self, name: OutputName, data: bytes) -> None:
        """Keep a piece until it is read."""
        if not self.closed:
            self.unread.append((name, data))
            self.size += len(data)
            self.wake()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self.wake()

    def close(self) -> None:
        """Nobody reads any more."""
        self.closed = True
        self.unread.clear()
        self.size = 0
        self.wake()

    def wake(self) -> None:
        """Let waiters look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def is_behind(self) -> bool:
        """Whether the channel has to wait for it."""
        return self.size > MAX_UNREAD_BYTES


@dataclass(eq=False)
class Running:
    """A process of the guest, from the command that starts it to its end."""

    container_id: str
    process_id: str
    stdio: int
    stderr: int
    """0: all output comes by ``stdio``."""
    terminal: bool
    readers: list[Reader] = field(default_factory=list)
    on_output: Callable[[OutputName, bytes], None] | None = None
    """Gets each piece as well."""
    on_end: Callable[[int], None] | None = None
    """Called with the exit code, once all output is there."""
    started: bool = False
    """Whether the guest has said that it runs."""
    killed: bool = False
    """Whether SIGKILL was sent to it."""
    eof: bool = False
    code: int | None = None
    exit: ProcessExit | None = None
    """Once it has ended and all of its output is there."""
    input_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    input_ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seqs(self) -> tuple[int, ...]:
        """Numbers of its streams."""
        return (self.stdio, self.stderr) if self.stderr else (self.stdio,)

    def take(self, seq: int, data: bytes) -> None:
        """Output came."""
        name: OutputName = "stderr" if seq == self.stderr else "stdout"
        for reader in self.readers:
            # Nothing waits for the readers of what is being killed, so they miss what they are behind with.
            if not (self.killed and reader.is_behind):
                reader.add(name, data)
        if self.on_output is not None:
            self.on_output(name, data)

    def finish(self, *, signal_deaths_are_zero: bool) -> None:
        """It has ended, and nothing more comes. Only the first call counts."""
        if self.exit is not None:
            return
        code = self.code or 0
        if code == 0 and self.killed and signal_deaths_are_zero:
            code = DEATH_BY_SIGNAL + SIGKILL
        self.exit = ProcessExit(code)
        for reader in self.readers:
            reader.end()
        self.wake()
        if self.on_end is not None:
            self.on_end(code)

    def wake(self) -> None:
        """Let waiters look again: it has ended, or the session is over."""
        self.changed.set()
        self.changed = asyncio.Event()
        for reader in self.readers:
            reader.wake()


class HyperProcess:
    """A `RunningProcess`."""

    def __init__(self, owner: Owner, running: Running) -> None:
        self._owner = owner
        self._running = running
        self._reader = Reader()
        self._left: ProcessExit | None = None
        running.readers.append(self._reader)

    @property
    def running(self) -> Running:
        """The process."""
        return self._running

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`. What the process leaves unread is lost (docs/agents.md)."""
        running = self._running
        async with running.input_lock:
            if running.exit is None and not running.input_ended and not self._reader.closed:
                self._owner.check()
                await self._owner.write_input(running, memoryview(data))

    async def close_stdin(self) -> None:
        """See `RunningProcess.close_stdin`. A terminal knows no end of input."""
        running = self._running
        async with running.input_lock:
            if running.exit is None and not running.input_ended and not running.terminal:
                running.input_ended = True
                self._owner.end_input(running)

    async def output(self) -> AsyncIterator[tuple[OutputName, bytes]]:
        """See `RunningProcess.output`. Ends early after ``close``; AgentError when the session was lost."""
        reader = self._reader
        while True:
            changed = reader.changed
            if reader.unread:
                name, data = reader.unread.popleft()
                reader.size -= len(data)
                self._owner.look_at_readers()
                yield name, data
                continue
            if reader.closed or reader.ended:
                return
            self._owner.check()
            await changed.wait()

    async def resize(self, rows: int, columns: int) -> None:
        """See `RunningProcess.resize`."""
        if self._running.exit is None and self._running.terminal:
            await self._owner.resize_process(self._running, rows, columns)

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`."""
        if not 1 <= number <= 64:
            raise InvalidArgumentError.field("signal", f"{number} is not a signal; use 1 to 64.")
        if self._running.exit is None:
            await self._owner.signal_process(self._running, number)

    async def wait(self) -> ProcessExit:
        """See `RunningProcess.wait`. AgentError when the session was lost before."""
        while (exit_ := self._running.exit or self._left) is None:
            changed = self._running.changed
            self._owner.check()
            await changed.wait()
        return exit_

    async def close(self) -> None:
        """See `RunningProcess.close`. The kill is on its way on return; ``wait`` still tells the end."""
        self.discard()

    def discard(self) -> None:
        """Nobody wants it any more: drop its output, and kill it. Idempotent."""
        if not self._reader.closed:
            self._let_go()
            self._owner.look_at_readers()

    def _let_go(self) -> None:
        self._reader.close()
        if self._running.exit is None:
            self._owner.kill_unasked(self._running)


class HyperAttachment(HyperProcess):
    """The main process of a container: closing this lets go of it, and ends nothing in it."""

    def _let_go(self) -> None:
        self._left = ProcessExit(0)
        if self._reader in self._running.readers:
            self._running.readers.remove(self._reader)
        self._reader.close()
        self._running.wake()
