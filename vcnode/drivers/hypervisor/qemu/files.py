"""What a VM has on the host besides its process: sockets, FIFOs and logs in its directory, and its cgroup."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.hypervisor.qemu.cgroup import Cgroup
from vcnode.errors import HypervisorError
from vcnode.models.vm import Channel, channel_socket

MAX_SOCKET_PATH_BYTES = 107
"""Source: unix(7), sun_path holds 108 bytes with the final NUL."""


@dataclass(frozen=True, slots=True)
class VmFiles:
    """Paths in one VM's directory, and its cgroup."""

    directory: Path
    group: Cgroup = Cgroup(None)  # noqa: RUF009 -- never changed
    """The VM's cgroup."""

    @property
    def qmp_socket(self) -> Path:
        """QMP."""
        return self.directory / "qmp.sock"

    def channel(self, channel_id: str) -> Path:
        """A serial port of the guest."""
        return channel_socket(str(self.directory), channel_id)

    @property
    def console(self) -> Path:
        """FIFOs of the serial console, as QEMU wants them: without ``.in`` and ``.out``."""
        return self.directory / "console"

    @property
    def console_fifo(self) -> Path:
        """What the guest prints."""
        return self.directory / "console.out"

    @property
    def console_log(self) -> Path:
        """The bounded log of it."""
        return self.directory / "console.log"

    @property
    def stderr_fifo(self) -> Path:
        """What QEMU prints."""
        return self.directory / "stderr"

    @property
    def stderr_log(self) -> Path:
        """The bounded log of it."""
        return self.directory / "qemu.log"

    @property
    def fifos(self) -> tuple[Path, ...]:
        """All FIFOs."""
        return self.directory / "console.in", self.console_fifo, self.stderr_fifo

    @property
    def _all(self) -> tuple[Path, ...]:
        """What is there of it. All sockets are: nobody else makes any in a VM's directory."""
        return *sorted(self.directory.glob("*.sock")), *self.fifos

    def check(self, channels: Sequence[Channel]) -> None:
        """See that a VM with these channels can live here.

        Raises:
            HypervisorError: The directory is missing, holds another VM, or is too deep for UNIX sockets.
        """
        if not self.directory.is_dir():
            raise HypervisorError(f"{self.directory} is no directory.")
        if taken := [path.name for path in self._all if path.exists()]:
            raise HypervisorError(f"{self.directory} belongs to another VM: it has {taken[0]}.")
        for path in (self.qmp_socket, *(self.channel(channel.channel_id) for channel in channels)):
            if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
                raise HypervisorError(
                    f"{path} is too long for a UNIX socket; choose a run_dir that keeps it within"
                    f" {MAX_SOCKET_PATH_BYTES} bytes."
                )

    def make_fifos(self, uid: int | None = None) -> None:
        """Make the FIFOs, for one user only; None: root's. Raises OSError.

        A user of its own may also go through the directory, and do nothing else there.
        """
        for path in self.fifos:
            os.mkfifo(path, 0o600)
            if uid is not None:
                os.chown(path, uid, uid)
        if uid is not None:
            os.chown(self.directory, -1, uid)
            self.directory.chmod(0o710)

    def remove(self) -> None:
        """Remove sockets, FIFOs and cgroup, once the process has ended; logs stay. Idempotent."""
        for path in self._all:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self.group.remove()


def listen(path: Path) -> socket.socket:
    """A listening UNIX socket for root only, to be handed to QEMU. Raises OSError.

    QEMU inherits it instead of making it, so a client can connect from the first moment: nobody has to look
    again and again whether the path is there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(1)
    except BaseException:
        sock.close()
        raise
    return sock
