"""How a session at the user's terminal ends when it does not end by itself."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from vcnode.cli import terminal
from vcnode.cli.interactive import interact
from vcnode.errors import AbortedError


class Stdin:
    async def close(self) -> None:
        pass


class Process:
    """Writes something; then it goes on, or its session is lost with *error*."""

    info = SimpleNamespace(tty=False, kind="exec")
    stdin = Stdin()

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def output(self) -> AsyncIterator[tuple[str, bytes]]:
        yield "stdout", b"something\n"
        if self._error is None:
            await asyncio.Event().wait()

    async def wait(self) -> int:
        assert self._error is not None
        raise self._error


def test_a_session_that_is_lost_is_an_error_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: Any = Process(AbortedError("The node agent is stopping."))
    with open(os.devnull, "w") as sink:
        monkeypatch.setattr(sys, "stdout", sink)
        with pytest.raises(AbortedError, match="stopping"):
            asyncio.run(interact(lost, stdin=False))


def test_output_that_nobody_reads_ends_it_as_sigpipe_would(monkeypatch: pytest.MonkeyPatch) -> None:
    endless: Any = Process()
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as sink:
        monkeypatch.setattr(sys, "stdout", sink)
        assert asyncio.run(interact(endless, stdin=False)) == 141


def test_input_that_comes_as_the_loop_ends_is_not_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    posted = threading.Event()

    async def take(data: bytes) -> None:
        raise AssertionError("the loop has ended")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        post = loop.call_soon_threadsafe

        def late(*args: Any, **kwargs: Any) -> Any:
            loop.stop()  # from here on nothing of this loop is run
            handle = post(*args, **kwargs)
            posted.set()
            return handle

        with open(reading, closefd=False) as source:
            monkeypatch.setattr(sys, "stdin", source)
            terminal.read_input(take)
        monkeypatch.setattr(loop, "call_soon_threadsafe", late)
        os.write(writing, b"x")
        posted.wait()

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
        os.close(writing)
        os.close(reading)
