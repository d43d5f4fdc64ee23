"""A process of a mock guest: carries out a program with streams, timers and no task."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Literal

from vcnode.drivers.agent.mock.shell import Cat, Program, Sleep, Step, Write
from vcnode.drivers.base import ProcessExit
from vcnode.errors import AgentError, InvalidArgumentError

OutputName = Literal["stdout", "stderr"]
SIGKILL = 9
BUFFER_BYTES = 256 * 1024
"""Unread input or output at which a process waits, like a full pipe."""
HARMLESS_SIGNALS = frozenset({17, 18, 19, 20, 21, 22, 23, 28})
"""SIGCHLD, SIGCONT, SIGURG, SIGWINCH, and those that would stop a process: a mock process ignores them."""


def check_signal(number: int) -> None:
    """Raise InvalidArgumentError unless *number* is a signal."""
    if not 1 <= number <= 64:
        raise InvalidArgumentError.field("signal", f"{number} is not a signal; use 1 to 64.")


ECHO_PORT = 7
"""The port on which a mock guest listens: what is sent there comes back."""


class MockProcess:
    """A `RunningProcess` that carries out *program* at once."""

    def __init__(self, program: Program) -> None:
        self._steps: deque[Step] = deque(program.steps)
        self._exit_code = program.exit_code
        self._exit: ProcessExit | None = None
        self._stdin = bytearray()
        self._stdin_ended = False
        self._unread: dict[OutputName, bytearray] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._lost: str | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._run()

    @property
    def has_ended(self) -> bool:
        """Whether the process is over, known or not."""
        return self._exit is not None or self._lost is not None

    # -- for the guest -----------------------------------------------------------------------------

    def kill(self, number: int) -> None:
        """End it by a signal, unless that is one that it ignores."""
        if number not in HARMLESS_SIGNALS:
            self._end(128 + number)

    def lose(self, reason: str) -> None:
        """The session is over: the process is killed, and nobody learns how it ended."""
        if self._exit is None:
            self._lost = reason
            self._stop_timer()
            self._wake()

    # -- RunningProcess ----------------------------------------------------------------------------

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`."""
        rest = memoryview(data)
        while rest and not self._stdin_ended and self._exit is None:
            self._check()
            changed = self._changed
            if (room := BUFFER_BYTES - len(self._stdin)) > 0:
                self._stdin += rest[:room]
                rest = rest[room:]
                self._run()
            else:
                await changed.wait()

    async def close_stdin(self) -> None:
        """See `RunningProcess.close_stdin`."""
        self._stdin_ended = True
        self._run()

    async def output(self) -> AsyncIterator[tuple[OutputName, bytes]]:
        """See `RunningProcess.output`."""
        while True:
            changed = self._changed
            if self._unread:
                name = next(iter(self._unread))
                data = bytes(self._unread.pop(name))
                self._run()
                yield name, data
            elif self._exit is not None:
                return
            else:
                self._check()
                await changed.wait()

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`."""
        check_signal(number)
        self.kill(number)

    async def resize(self, rows: int, columns: int) -> None:
        """See `RunningProcess.resize`; nobody looks."""

    async def wait(self) -> ProcessExit:
        """See `RunningProcess.wait`."""
        while self._exit is None:
            self._check()
            await self._changed.wait()
        return self._exit

    async def close(self) -> None:
        """See `RunningProcess.close`."""
        self._unread.clear()
        self._closed = True
        self.kill(SIGKILL)

    # -- the program -------------------------------------------------------------------------------

    def _run(self) -> None:
        """Go on with the steps as far as they go without waiting."""
        while self._exit is None and self._lost is None and self._timer is None:
            if not self._steps:
                self._end(self._exit_code)
                return
            if not self._has_done(self._steps[0]):
                return
            self._steps.popleft()

    def _has_done(self, step: Step) -> bool:
        match step:
            case Write(name, data):
                self._put(name, data)
                return True
            case Sleep(seconds):
                if math.isfinite(seconds):
                    self._timer = asyncio.get_running_loop().call_later(seconds, self._slept)
                return False
            case Cat(name):
                room = BUFFER_BYTES - len(self._unread.get(name, b""))
                self._put(name, bytes(self._stdin[:room]))
                del self._stdin[:room]
                return self._stdin_ended and not self._stdin

    def _slept(self) -> None:
        self._timer = None
        self._steps.popleft()
        self._run()

    def _put(self, name: OutputName, data: bytes) -> None:
        if data and not self._closed:
            self._unread.setdefault(name, bytearray()).extend(data)
        self._wake()

    def _end(self, exit_code: int) -> None:
        if self._exit is None and self._lost is None:
            self._exit = ProcessExit(exit_code)
            self._stop_timer()
            self._wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self) -> None:
        if self._lost is not None:
            raise AgentError(f"The session with the mock guest was lost: {self._lost}")


class MockReceiver(MockProcess):
    """Takes its input to the end, and gives it to *keep*."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        self._keep = keep
        self._taken = bytearray()
        super().__init__(Program((Cat(),)))

    def _put(self, name: OutputName, data: bytes) -> None:
        self._taken += data
        self._wake()

    def _end(self, exit_code: int) -> None:
        if not exit_code:
            self._keep(bytes(self._taken))
        super()._end(exit_code)


class MockAttachment(MockProcess):
    """Somebody attached to a main process, which takes no time to read and writes nothing."""

    def __init__(self, signal: Callable[[int], None]) -> None:
        self._signal_main = signal
        super().__init__(Program((Sleep(math.inf),)))

    def main_ended(self, exit_code: int) -> None:
        """The main process has ended."""
        self._end(exit_code)

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`."""
        self._check()

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`."""
        check_signal(number)
        self._signal_main(number)

    async def close(self) -> None:
        """See `GuestSession.attach`: detach."""
        self._end(0)


class MockConnection(MockProcess):
    """A `GuestConnection` to somebody who sends everything back."""

    def __init__(self) -> None:
        super().__init__(Program((Cat(),)))

    async def write(self, data: bytes) -> None:
        """See `GuestConnection.write`."""
        await self.write_stdin(data)

    async def close_write(self) -> None:
        """See `GuestConnection.close_write`."""
        await self.close_stdin()

    async def received(self) -> AsyncIterator[bytes]:
        """See `GuestConnection.received`."""
        async for _, data in self.output():
            yield data
