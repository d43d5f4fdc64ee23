"""Running a command inside a pod, with bounded output."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Literal

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.drivers.base import RunningProcess
from vcnode.errors import AgentError, VcnodeError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import ExecResult, Output
from vcnode.pods.parts import KILL_LIMIT_S

log = logging.getLogger(__name__)

SIGKILL = 9
CLOSE_LIMIT_S = 10.0
"""Seconds to end a process whose caller is gone."""


@dataclass(slots=True)
class Kept:
    """One output stream: the first bytes kept, the rest counted."""

    limit_bytes: int
    data: bytearray = field(default_factory=bytearray)
    total_bytes: int = 0

    def add(self, chunk: bytes | memoryview) -> None:
        """Take the next chunk."""
        self.total_bytes += len(chunk)
        room = self.limit_bytes - len(self.data)
        if room > 0:
            self.data += chunk[:room]

    def output(self) -> Output:
        """What a reply shows of it. A character cut in two at the bound makes it base64, not wrong."""
        kept = Output.of(bytes(self.data))
        return Output(
            data=kept.data,
            encoding=kept.encoding,
            truncated=self.total_bytes > len(self.data),
            total_bytes=self.total_bytes,
        )


async def collect(
    process: RunningProcess, options: ExecOptions, tasks: Spawner, *, began: float, what: str
) -> ExecResult:
    """Feed a process, keep its output, and wait for its end; kill it when its time is over.

    The process is closed whatever happens, cancellation included.

    Args:
        process: Just started.
        options: Stdin, time limit and bound of the output.
        tasks: Runs the feeder and the timer beside the reader.
        began: Loop time at which the command arrived.
        what: Names the process in errors.

    Raises:
        AgentError: The session with the guest was lost, or the process survived SIGKILL.
    """
    loop = asyncio.get_running_loop()
    streams = {"stdout": Kept(options.max_output_bytes), "stderr": Kept(options.max_output_bytes)}
    timer = _Timer(process, options.timeout_s)
    helpers: list[asyncio.Task[None]] = []
    try:
        helpers.append(tasks.spawn(_feed(process, options.stdin.raw), name=f"stdin of {what}"))
        if options.timeout_s is not None:
            helpers.append(tasks.spawn(timer.run(), name=f"timer of {what}"))
        limit_s = None if options.timeout_s is None else options.timeout_s + KILL_LIMIT_S
        async with aio.deadline_as(limit_s, lambda: AgentError(f"{what} did not end after SIGKILL.")):
            exit_code = await _read(process, streams)
    finally:
        for helper in helpers:
            helper.cancel()
        await aio.finish(_close(process, helpers), timeout_s=CLOSE_LIMIT_S)
    return ExecResult(
        exit_code=exit_code,
        timed_out=timer.fired,
        stdout=streams["stdout"].output(),
        stderr=streams["stderr"].output(),
        duration_ms=round((loop.time() - began) * 1000, 3),
    )


async def _read(process: RunningProcess, streams: dict[str, Kept]) -> int:
    name: Literal["stdout", "stderr"]
    async for name, chunk in process.output():
        streams[name].add(chunk)
    return (await process.wait()).exit_code


async def _feed(process: RunningProcess, data: bytes) -> None:
    try:
        if data:
            await process.write_stdin(data)
        await process.close_stdin()
    except VcnodeError as exc:
        # The reader fails with the same cause, and reports it.
        log.debug("Standard input was not delivered", exc_info=exc)


async def _close(process: RunningProcess, helpers: list[asyncio.Task[None]]) -> None:
    if helpers:
        await asyncio.wait(helpers)
    await process.close()


class _Timer:
    """Kills a process when its time is over, so that its output ends and the reader with it."""

    def __init__(self, process: RunningProcess, timeout_s: float | None) -> None:
        self._process = process
        self._timeout_s = timeout_s or 0.0
        self.fired = False

    async def run(self) -> None:
        await asyncio.sleep(self._timeout_s)
        self.fired = True
        try:
            await self._process.signal(SIGKILL)
        except VcnodeError as exc:
            log.debug("The process cannot be killed", exc_info=exc)  # the reader's limit ends it
