"""The user's end of a session: standard input and output, and the terminal in raw mode.

Reading and writing block, so each has a thread of its own, which ends with the process: the session's
heartbeats go on while a pager holds our output up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import sys
import termios
import threading
import tty
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any

READ_BYTES = 64 * 1024
Taker = Callable[[bytes], Awaitable[None]]
DETACH = b"\x10\x11"
"""Ctrl-P, Ctrl-Q."""


def is_terminal() -> bool:
    """Whether standard input and output are one."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def size() -> tuple[int, int]:
    """Rows and columns of the terminal; 24 and 80 where that cannot be told."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 24, 80
    return max(1, found.lines), max(1, found.columns)


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Give the terminal's keys to the other side, until the block ends, however it ends."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def cbreak() -> Iterator[None]:
    """Get keys as they are typed, without showing them; Ctrl-C stays a signal. Until the block ends."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def signals(handlers: dict[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    """Call these when signals come, until the block ends."""
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


class DetachKeys:
    """Looks for the detach keys in what is typed."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What of *data* goes on, and whether the keys were typed; a prefix of them is held back."""
        whole = self._held + data
        self._held = b""
        at = whole.find(DETACH)
        if at >= 0:
            return whole[:at], True
        if whole.endswith(DETACH[:1]):
            self._held = DETACH[:1]
            return whole[:-1], False
        return whole, False


def read_input(take: Taker) -> None:
    """Read standard input in a thread; *take* gets each piece, at last an empty one."""
    loop = asyncio.get_running_loop()
    fd = sys.stdin.fileno()

    async def taking(data: bytes, done: Future[None]) -> None:
        try:
            await take(data)
        finally:
            done.set_result(None)

    def begin(data: bytes, done: Future[None]) -> None:
        # Made in the loop, which may end before it comes to this: a coroutine would be complained of.
        tasks.add(task := loop.create_task(taking(data, done)))
        task.add_done_callback(tasks.discard)

    tasks: set[asyncio.Task[None]] = set()

    def read() -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the loop is closed: nobody wants it any more
            data = b"x"
            while data:
                data = os.read(fd, READ_BYTES)
                done: Future[None] = Future()
                loop.call_soon_threadsafe(begin, data, done)
                done.result()

    def quietly() -> None:
        with contextlib.suppress(BaseException):
            read()

    threading.Thread(target=quietly, name="stdin", daemon=True).start()


class Printer:
    """Writes to standard output and error in a thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[int, bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="stdout", daemon=True).start()

    async def write(self, fd: int, data: bytes) -> None:
        """Write all of *data*; BrokenPipeError when nobody reads it any more."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._work.put((fd, data, done))
        await done

    def _run(self) -> None:
        while True:
            fd, data, done = self._work.get()
            problem: OSError | None = None
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(fd, rest) :]
            except OSError as exc:
                problem = exc
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_settle, done, problem)


def _settle(done: asyncio.Future[Any], problem: OSError | None) -> None:
    if done.done():
        return
    if problem is None:
        done.set_result(None)
    else:
        done.set_exception(problem)
