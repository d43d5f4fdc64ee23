"""Where the processes of a pod are born: QEMU, and those that help it; each is held by a pidfd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vcnode.drivers.hypervisor.qemu.process import Process, spawn
from vcnode.settings import SpawnerType


class Spawner(Protocol):
    """Starts processes for pods."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stderr_fd: int,
        fds: Sequence[int],
        directory: Path,
        netns_path: str | None,
        huge_pages: bool = True,
    ) -> Process:
        """See `vcnode.drivers.hypervisor.qemu.process.spawn`; *netns_path* is the pod's, if it has one."""
        ...


class Nsenter:
    """Into the pod's namespaces. Of its own a pod has a network namespace; all else is in its VM."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stderr_fd: int,
        fds: Sequence[int],
        directory: Path,
        netns_path: str | None,
        huge_pages: bool = True,
    ) -> Process:
        """See `Spawner`."""
        return spawn(
            argv,
            stderr_fd=stderr_fd,
            fds=fds,
            directory=directory,
            netns_path=netns_path,
            huge_pages=huge_pages,
        )


class Here:
    """Into the node agent's own namespaces: the pod's taps are handed over open, and work all the same."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        stderr_fd: int,
        fds: Sequence[int],
        directory: Path,
        netns_path: str | None,
        huge_pages: bool = True,
    ) -> Process:
        """See `Spawner`."""
        return spawn(argv, stderr_fd=stderr_fd, fds=fds, directory=directory, huge_pages=huge_pages)


SPAWNERS: dict[SpawnerType, Spawner] = {"none": Here(), "nsenter": Nsenter()}
"""By name."""
