"""A real OpenSSH server for tests, on the loopback and without a service: one process for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin") or "/usr/sbin/sshd"


@dataclass
class Server:
    """What clients need to know; ``log`` holds what the server says."""

    port: int
    host_key: str
    log: Path
    directory: Path
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def hang_up(self) -> None:
        """End every connection, as a server does that dies."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.processes.clear()


def make_key(path: Path) -> asyncssh.SSHKey:
    """A private key in a file for nobody else."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(path)
    path.chmod(0o600)
    return key


@contextlib.asynccontextmanager
async def openssh(directory: Path, trusted: asyncssh.SSHKey, *, port: int = 0) -> AsyncIterator[Server]:
    """A server on 127.0.0.1 that lets the holder of *trusted* in as anybody. Needs root."""
    host = make_key(directory / "host_key")
    trusted.write_public_key(directory / "authorized_keys")
    config = directory / "sshd_config"
    config.write_text(
        f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nLogLevel DEBUG1\n"
    )
    log = directory / "sshd.log"
    listening = socket.create_server(("127.0.0.1", port))
    server = Server(
        listening.getsockname()[1], " ".join(host.export_public_key().decode().split()[:2]), log, directory
    )

    async def serve(connection: socket.socket) -> None:
        # /run/sshd, which the server insists on, shall be nobody else's.
        script = f"mount -t tmpfs none /run && mkdir /run/sshd && exec {SSHD} -i -f {config} -E {log}"
        with connection:
            connection.setblocking(True)
            server.processes.append(
                await asyncio.create_subprocess_exec(
                    *("unshare", "--mount", "sh", "-c", script),
                    stdin=connection,
                    stdout=connection,
                    stderr=subprocess.DEVNULL,
                )
            )

    async def accept() -> None:
        listening.setblocking(False)
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            await serve(connection)

    accepting = asyncio.ensure_future(accept())
    try:
        yield server
    finally:
        accepting.cancel()
        await asyncio.wait({accepting})
        listening.close()
        await server.hang_up()
