"""Runs one helper program to its end, with limits on memory, file size and output that it cannot shed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from vcnode.aio import finish

_TAIL_BYTES = 4096
_START_S = 10.0
_KILL_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class ToolExit:
    """How a helper ended."""

    returncode: int
    """Negative: the signal that ended it. ``-SIGXFSZ``: it hit the limit on file size."""
    output: str
    """The last bytes of standard output, 4 KiB unless told otherwise."""
    errors: str
    """The last 4 KiB of standard error."""
    raw_output: bytes = b""
    """`output` as it came."""


async def run(
    argv: Sequence[str],
    *,
    file_bytes: int,
    memory_bytes: int | None = None,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    output_bytes: int = _TAIL_BYTES,
    tick_s: float | None = None,
    on_tick: Callable[[], Awaitable[None]] | None = None,
) -> ToolExit:
    """Run *argv* and wait for it. It ends with this process, however that ends.

    Args:
        argv: Program and arguments.
        file_bytes: Largest file that it may write.
        memory_bytes: Most address space; None: no limit.
        pass_fds: Descriptors that it inherits under the same numbers.
        env: Added to PATH and a plain locale, which is all of the environment that it gets.
        output_bytes: How much of the end of its standard output is kept.
        tick_s: Seconds between two calls of *on_tick* while it runs.
        on_tick: Looks at how far it is; what it raises ends the program.

    Raises:
        OSError: The program cannot be started.
        asyncio.CancelledError: The caller was cancelled; the program and all that it started are gone.
    """
    if shutil.which(argv[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    limits = ["--core=0", f"--fsize={file_bytes}"]
    if memory_bytes is not None:
        limits.append(f"--as={memory_bytes}")
    started: list[asyncio.subprocess.Process] = []

    async def start() -> None:
        started.append(
            await asyncio.create_subprocess_exec(
                "setpriv",
                "--pdeathsig=KILL",
                "--",
                "prlimit",
                *limits,
                "--",
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=tuple(pass_fds),
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", **(env or {})},
                start_new_session=True,
            )
        )

    try:
        # create_subprocess_exec that is cancelled half-way kills the program only, not what that has
        # started, and may then wait for ever for its pipes.
        await finish(start(), timeout_s=_START_S)
        [process] = started
        reading = asyncio.gather(_tail(process.stdout, output_bytes), _tail(process.stderr, _TAIL_BYTES))
        try:
            while on_tick is not None and not (await asyncio.wait({reading}, timeout=tick_s))[0]:
                await on_tick()
            output, errors = await reading
        finally:
            reading.cancel()
        code = await process.wait()
    except BaseException:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await finish(process.wait(), timeout_s=_KILL_WAIT_S)
        raise
    return ToolExit(code, _text(output), _text(errors), output)


async def _tail(stream: asyncio.StreamReader | None, size: int) -> bytes:
    """Read *stream* to its end, keeping the last bytes only."""
    kept = b""
    while stream is not None and (chunk := await stream.read(_TAIL_BYTES)):
        kept = (kept + chunk)[-size:]
    return kept


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()
