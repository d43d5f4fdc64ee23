"""What sessions are for: the streams of a process in a guest."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from pydantic import ValidationError

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.drivers.base import RunningProcess
from vcnode.errors import AgentError, InvalidArgumentError, VcnodeError, from_code
from vcnode.models.sessions import TerminalSize
from vcnode.pods.sessions import LiveSession
from vcnode.sessions.carrier import OverError
from vcnode.sessions.frames import STDERR, STDIN, STDOUT

log = logging.getLogger(__name__)

_OUTPUTS = {"stdout": STDOUT, "stderr": STDERR}
CLOSE_LIMIT_S = 10.0
MAX_TOLD_BYTES = 4096
COPY_ERRORS = ("internal", "not_found", "invalid_argument", "failed_precondition")
"""Codes of errors that a copy may end with."""


class ProcessWork:
    """Carries stdin, stdout and stderr of a process, and its exit code.

    Args:
        process: Just started; closed at the end.
        tasks: Runs what goes to the process beside what comes from it.
        tty: Whether it has a terminal: then there is no ``stderr``.
    """

    def __init__(self, process: RunningProcess, tasks: Spawner, *, tty: bool = False) -> None:
        self._process = process
        self._tasks = tasks
        self.streams: tuple[int, ...] = (STDIN, STDOUT) if tty else (STDIN, STDOUT, STDERR)

    async def run(self, session: LiveSession) -> None:
        """See `Work.run`."""
        helpers = [
            self._tasks.spawn(self._feed(session), name="session stdin"),
            self._tasks.spawn(self._obey(session), name="session messages"),
        ]
        carrier, process = session.carrier, self._process
        unwanted: set[int] = set()
        try:
            async for name, chunk in process.output():
                stream = _OUTPUTS[name]
                if not self._keep(name, chunk) and stream not in unwanted:
                    try:
                        await carrier.write(stream, chunk)
                    except OverError:
                        unwanted.add(stream)
            exit_code = (await process.wait()).exit_code
        finally:
            for helper in helpers:
                helper.cancel()
            await aio.finish(_gone(helpers), timeout_s=CLOSE_LIMIT_S)
        self._check(exit_code)
        for stream in (STDOUT, STDERR):
            carrier.end(stream)
        await carrier.send_message({"exit": {"exit_code": exit_code}})

    def _keep(self, name: str, chunk: bytes | memoryview) -> bool:
        """Whether a piece of output is for us and not for the client."""
        return False

    def _check(self, exit_code: int) -> None:
        """Raise what the exit code means, where it means an error."""

    async def _feed(self, session: LiveSession) -> None:
        try:
            while data := await session.carrier.read(STDIN):
                await self._process.write_stdin(bytes(data))
            await self._process.close_stdin()
        except VcnodeError as exc:
            log.debug("Standard input was not delivered", exc_info=exc)  # the reader fails and reports it

    async def _obey(self, session: LiveSession) -> None:
        while (message := await session.carrier.message()) is not None:
            try:
                await self._do(session, message)
            except (InvalidArgumentError, ValidationError) as exc:
                log.info("A client asks for what cannot be done: %s", exc)
            except AgentError as exc:
                log.debug("A message of a client was not delivered", exc_info=exc)

    async def _do(self, session: LiveSession, message: dict[str, Any]) -> None:
        match message:
            case {"signal": int(number)}:
                await self._process.signal(number)
            case {"resize": {"rows": int(rows), "columns": int(columns)}}:
                size = TerminalSize(rows=rows, columns=columns)
                await self._process.resize(size.rows, size.columns)
            case {"close": True}:
                await self._process.close()
            case {"detach": True}:
                session.detach()
            case _:
                raise InvalidArgumentError("There is no such message in a session of a process.")

    async def close(self) -> None:
        """See `Work.close`: kills the process, if it still runs."""
        await self._process.close()


class AttachWork(ProcessWork):
    """Carries the streams of a container's main process, which is not ours to end."""

    async def _do(self, session: LiveSession, message: dict[str, Any]) -> None:
        # Without a client there is nothing to keep: what nobody reads would hold the container up.
        await super()._do(session, {"close": True} if message == {"detach": True} else message)


class CopyWork(ProcessWork):
    """Carries a tar stream; what the copying process says on stderr is an error for the client."""

    def __init__(self, process: RunningProcess, tasks: Spawner) -> None:
        super().__init__(process, tasks, tty=True)
        self._told = bytearray()

    def _keep(self, name: str, chunk: bytes | memoryview) -> bool:
        if name == "stderr":
            self._told += chunk[: MAX_TOLD_BYTES - len(self._told)]
        return name == "stderr"

    def _check(self, exit_code: int) -> None:
        if not exit_code:
            return
        try:
            code, message = json.loads(self._told)
        except ValueError:
            raise AgentError(f"The copy ended with exit code {exit_code}.") from None
        if not isinstance(message, str) or code not in COPY_ERRORS:
            raise AgentError("The guest agent could not copy.")
        text = "".join(c if c.isprintable() else " " for c in message[:500])
        raise AgentError(text) if code == "internal" else from_code(code, text, {})


async def _gone(helpers: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(helpers)
