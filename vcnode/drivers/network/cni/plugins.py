"""Runs one CNI plugin to its end: bounded in time and output, and nothing that it started is left.

What it reads and writes are files in memory and no pipes: nobody has to feed it, a flood ends at the size of
the file, and a process that it leaves behind with the other end open holds nobody up. It ends with the node
agent: one that went on making a network would do so after the next node agent has removed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vcnode import aio
from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import NetworkError

MAX_OUTPUT_BYTES = 1024 * 1024
"""Of standard output and of standard error."""
_ROOM_BYTES = MAX_OUTPUT_BYTES + 128 * 1024
"""At which the kernel refuses a write as a whole; so a flood in usual portions comes past the limit."""
_SETPRIV = "/usr/bin/setpriv"
_NOT_EXECUTED = (126, 127)
_REFUSED = re.compile(rb"setpriv: failed to execute [^\n]*: ([^:\n]+)\n?")
"""What setpriv says then. Source: util-linux, include/exec_shell.h and sys-utils/setpriv.c."""
START_LIMIT_S = 10.0
KILL_WAIT_S = 5.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where plugins find what they run themselves, such as iptables."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a plugin ended."""

    returncode: int
    """Negative: the signal that ended it."""
    output: bytes
    errors: bytes


async def run(program: Path, env: Mapping[str, str], conf: bytes, *, timeout_s: float) -> Ended:
    """Run *program* with *conf* on its standard input; its environment is *env* and a PATH, and nothing else.

    A failure, a time-out and a cancellation leave no process of its session, and neither does its end.

    Raises:
        NetworkError: It cannot be executed, took longer than *timeout_s* seconds, or wrote too much.
        ResourceExhaustedError: The host, or the node agent's limits, have no room for it.
    """
    started: list[asyncio.subprocess.Process] = []
    with contextlib.ExitStack() as files:
        try:
            stdin = files.enter_context(_file(conf))
            stdout, stderr = files.enter_context(_room()), files.enter_context(_room())
        except OSError as exc:
            refused = NetworkError(f"CNI plugin {program} cannot be given files: {exc.strerror}.")
            raise exhausted(exc) or refused from exc

        async def start() -> None:
            started.append(
                await asyncio.create_subprocess_exec(
                    *(_SETPRIV, "--pdeathsig", "KILL", "--", program),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env={"PATH": PATH, **env},
                    cwd="/",
                    start_new_session=True,
                )
            )

        late = NetworkError(f"CNI plugin {program.name} has not ended within {timeout_s:g} s and was killed.")
        try:
            async with aio.deadline_as(timeout_s, lambda: late):
                await aio.finish(start(), timeout_s=START_LIMIT_S)
                code = await started[0].wait()
        except OSError as exc:
            refused = NetworkError(f"{_SETPRIV} (package util-linux) cannot be executed: {exc.strerror}.")
            raise exhausted(exc) or refused from exc
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await aio.finish(process.wait(), timeout_s=KILL_WAIT_S)
        output, errors = _content(stdout), _content(stderr)
    if code in _NOT_EXECUTED and (words := _REFUSED.fullmatch(errors)) is not None:
        raise NetworkError(f"CNI plugin {program} cannot be executed: {words[1].decode(errors='replace')}.")
    if len(output) > MAX_OUTPUT_BYTES or len(errors) > MAX_OUTPUT_BYTES:
        raise NetworkError(f"CNI plugin {program.name} wrote more than {MAX_OUTPUT_BYTES} bytes.")
    return Ended(code, output, errors)


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A file in memory, to be read from its beginning."""
    fd = os.memfd_create("cni-conf", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _room() -> Iterator[int]:
    """A file in memory that cannot grow; empty, it takes no memory."""
    fd = os.memfd_create("cni-output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _ROOM_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fd
    finally:
        os.close(fd)


def _content(fd: int) -> bytes:
    return os.pread(fd, _ROOM_BYTES, 0).rstrip(b"\0")
