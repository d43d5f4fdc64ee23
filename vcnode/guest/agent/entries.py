"""Where a process is to run: in the guest itself, as the first of a container, or in a running container."""

from __future__ import annotations

import errno
import os

from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure

GUEST, MAIN, JOIN, LAUNCH, FILES = "guest", "main", "join", "launch", "files"
AHEAD = "ahead"
"""Of no entry: a process that may become the one of MAIN. See `child.stand_ready`."""


class Entry:
    """How a child gets from the guest's namespaces to where it is to run; `child` carries it out.

    Args:
        kind: GUEST, MAIN, JOIN, LAUNCH or FILES.
        fields: What that kind needs, as plain data.
        fds: Descriptors that it needs.
        root: The root directory of the process, as the agent sees it.
        hostname: For the environment.
    """

    __slots__ = ("fds", "fields", "hostname", "kind", "root")

    def __init__(
        self,
        kind: str,
        *,
        hostname: str,
        root: str = "/",
        fields: tuple[object, ...] = (),
        fds: tuple[int, ...] = (),
    ) -> None:
        self.kind = kind
        self.fields = fields
        self.fds = fds
        self.root = root
        self.hostname = hostname

    @classmethod
    def guest(cls) -> Entry:
        """No container: the guest's own namespaces and root."""
        return cls(GUEST, hostname=os.uname().nodename)

    @classmethod
    def main(
        cls,
        root: str,
        *,
        readonly: bool,
        hostname: str,
        cgroup_procs_fd: int,
        secrets: str = "",
        mounts: tuple[tuple[str, str, str, int, str], ...] = (),
    ) -> Entry:
        """New namespaces around *root*, a mount point.

        Args:
            root: The root.
            readonly: Whether it is mounted read-only.
            hostname: In its UTS namespace.
            cgroup_procs_fd: cgroup.procs of its group.
            secrets: Directory that it sees as /run/secrets; empty: none.
            mounts: Source (empty: a tmpfs), path in it, destination, flags of mount(2), and data.
        """
        fields = (root, readonly, hostname, secrets, mounts)
        return cls(MAIN, hostname=hostname, root=root, fields=fields, fds=(cgroup_procs_fd,))

    @classmethod
    def join(cls, pid: int, pidfd: int, *, hostname: str, cgroup_procs_fd: int) -> Entry:
        """The namespaces of the container with this process 1, and its group."""
        return cls(JOIN, hostname=hostname, root=f"/proc/{pid}/root", fds=(cgroup_procs_fd, pidfd))

    @classmethod
    def launch(cls, pidfd: int, *, cgroup_procs_fd: int, home_fd: int) -> Entry:
        """As `join`, for a `launcher`, which goes into the group and back to that of *home_fd*."""
        return cls(LAUNCH, hostname="", fds=(cgroup_procs_fd, home_fd, pidfd))

    @classmethod
    def files(cls, root: str) -> Entry:
        """The files of a container that does not run: *root*, a mount point, and nothing else."""
        return cls(FILES, hostname="", root=root, fields=(root,))

    @property
    def fits_ahead(self) -> bool:
        """Whether a process that was forked ahead can go there: it sees nothing that was mounted since."""
        return self.kind == MAIN and not self.fields[3] and not self.fields[4]

    def close(self) -> None:
        """Close the descriptor that was opened for it, if any."""
        if self.kind == JOIN:
            os.close(self.fds[0])

    def refusal(self, exc: OSError) -> Failure:
        """What it means that the kernel refused to make a process for this entry."""
        if self.kind == JOIN and is_gone(exc):
            return ended()
        return Failure.of(exc, "start a process")


def is_gone(exc: OSError) -> bool:
    """Whether the container to join has ended: no such process, or its pid namespace takes no more."""
    return exc.errno in (errno.ESRCH, errno.ENOENT, errno.ENOMEM)


def ended() -> Failure:
    """The failure of joining a container that has ended."""
    return Failure(FAILED_PRECONDITION, "The container ended while the process was started.")
