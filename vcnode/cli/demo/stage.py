"""What the demo plays on: a private NATS server and a node agent in one temporary directory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vcnode.aio import finish
from vcnode.errors import UnavailableError

NODE = "demo"
STOP_TIMEOUT_S = 45.0
"""How long the node agent may take to end after SIGTERM; its own drain is shorter."""
KILL_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything lies."""

    root: Path

    @property
    def roots(self) -> Path:
        """The node's only allowed root."""
        return self.root / "roots"

    @property
    def log(self) -> Path:
        """The node agent's log."""
        return self.root / "node.log"

    def log_tail(self) -> str:
        """The last words of the node agent."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-LOG_TAIL_LINES:])


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """The node agent as a child process."""

    process: asyncio.subprocess.Process
    metrics_url: str

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def check(self) -> None:
        """Raise UnavailableError if it has ended."""
        if self.process.returncode is not None:
            raise UnavailableError(f"The node agent ended at once, with exit code {self.process.returncode}.")


@asynccontextmanager
async def node_agent(
    place: Place, *, nats_url: str, hypervisor: str, accel: str, guest_dir: Path
) -> AsyncIterator[NodeProcess]:
    """A node agent named ``demo`` for as long as the block runs."""
    place.roots.mkdir(mode=0o700, exist_ok=True)
    address = f"127.0.0.1:{_free_port()}"
    arguments = {
        "--name": NODE,
        "--nats-url": nats_url,
        "--hypervisor": hypervisor,
        "--accel": accel,
        "--state-dir": place.root / "state",
        "--run-dir": place.root / "run",
        "--guest-dir": guest_dir,
        "--allowed-root": place.roots,
        "--metrics-address": address,
        "--log-format": "text",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    # The settings of whoever runs the demo must not leak into it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VCNODE_")}
    environment["VCNODE_NETWORK"] = "noop"  # a demo leaves the network of its host alone
    with place.log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "vcnode.cli",
            "node",
            "run",
            *words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the demo, which then ends the node in good order
        )
    try:
        yield NodeProcess(process, f"http://{address}/metrics")
    finally:
        await finish(_end(process), timeout_s=STOP_TIMEOUT_S + 2 * KILL_TIMEOUT_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
