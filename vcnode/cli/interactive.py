"""Running a session at the user's terminal: what ``exec``, ``attach`` and ``session resume`` share."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vcnode.cli import terminal
from vcnode.cli.exits import UsageError

if TYPE_CHECKING:
    from vcnode.client.sessions import ProcessStream

SIGHUP_EXIT, SIGPIPE_EXIT, SIGTERM_EXIT = 129, 141, 143
FORWARDED = (signal.SIGINT, signal.SIGQUIT)
"""Signals to us that go to the process, where no terminal is raw."""


def check_terminal(*, wanted: bool) -> None:
    """See that there is a terminal where one is to be used. Raises UsageError."""
    if wanted and not sys.stdin.isatty():
        raise UsageError("Standard input is no terminal; leave out -t.")


async def interact(process: ProcessStream, *, stdin: bool) -> int:
    """Connect an entered session with standard input and output until it ends; returns the exit code.

    With a terminal at the other end ours is raw, its size follows ours, and Ctrl-P Ctrl-Q detaches.
    """
    tty = process.info.tty and sys.stdin.isatty()
    task = asyncio.current_task()
    ended: list[int] = []
    detached = asyncio.Event()

    def end(code: int) -> None:
        ended.append(code)
        if task is not None:
            task.cancel()

    async with contextlib.AsyncExitStack() as stack:
        handlers: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: lambda: end(SIGTERM_EXIT),
            signal.SIGHUP: lambda: end(SIGHUP_EXIT),
        }
        if tty:
            stack.enter_context(terminal.raw())
            handlers[signal.SIGWINCH] = lambda: process.resize_soon(*terminal.size())
        else:
            # What it is attached to is not ours to end: Ctrl-C leaves it, as everywhere.
            if process.info.kind == "exec":
                handlers |= {number: _sender(process, number) for number in FORWARDED}
        stack.enter_context(terminal.signals(handlers))
        if tty:
            process.resize_soon(*terminal.size())
        if stdin or tty:
            terminal.read_input(_input(process, detached, tty=tty))
        else:
            await process.stdin.close()
        try:
            code = await _show(process, detached)
        except asyncio.CancelledError:
            if not ended or task is None:
                raise
            task.uncancel()
            return ended[0]
    if code is None:
        resumable = process.info.kind == "exec"
        how = f"; go on with: vcnode session resume {process.session_id}" if resumable else ""
        print(f"\nvcnode: detached{how}", file=sys.stderr)
        return 0
    return code


def _sender(process: ProcessStream, number: signal.Signals) -> Callable[[], object]:
    return lambda: process.signal_soon(number)


def _input(process: ProcessStream, detached: asyncio.Event, *, tty: bool) -> terminal.Taker:
    keys = terminal.DetachKeys()

    async def take(data: bytes) -> None:
        leave = False
        if tty:
            data, leave = keys.feed(data) if data else (b"", False)
        if data:
            await process.stdin.write(data)
        elif not leave and not tty:
            await process.stdin.close()
        if leave:
            detached.set()

    return take


async def _show(process: ProcessStream, detached: asyncio.Event) -> int | None:
    """Print the output to its end; the exit code, or None when the user has detached."""
    printer = terminal.Printer()
    fds = {"stdout": sys.stdout.fileno(), "stderr": sys.stderr.fileno()}
    sys.stdout.flush()

    async def printing() -> int:
        async for name, chunk in process.output():
            await printer.write(fds[name], chunk)
        return await process.wait()

    # No task group: what goes wrong must come out as the error that it is.
    shown, leaving = asyncio.create_task(printing()), asyncio.create_task(detached.wait())
    try:
        await asyncio.wait({shown, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if shown.done():
            return shown.result()
        await process.detach()
        return None
    except BrokenPipeError:
        return SIGPIPE_EXIT  # as with `exec … | head`; the session is left, and so the process ended
    finally:
        shown.cancel()
        leaving.cancel()
        await asyncio.wait({shown, leaving})
