"""Each VM in a cgroup of its own, outside that of the node agent.

``<v2 mount>/vcnode/<vm_id>``: beside whatever started the node agent, so that a service manager that ends all
of its group leaves the VMs alone, and all that belongs to a VM can be ended at once. Grouping and
``cgroup.kill`` need no controllers. The v2 hierarchy is found by its mount: on hosts in hybrid mode it is not
at /sys/fs/cgroup.

Where there is no v2 hierarchy, or it cannot be written, VMs stay in the node agent's group, and
`Cgroups.note` says what that means.

Source: Linux Documentation/admin-guide/cgroup-v2.rst; ``cgroup.kill`` is there since 5.14.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from vcnode.models.stats import CpuStats

log = logging.getLogger(__name__)

BASE = "vcnode"
"""Directory of all VMs of all nodes on this host."""
CONTROLLERS = ("cpu", "memory", "pids")
"""What bounds and counts a VM's share of the host."""


def cgroup2_mount(mountinfo: str) -> Path | None:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or beside v1 in hybrid mode."""
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup2 "):
            return Path(mount.split(" ")[4])
    return None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a VM has used of its host."""

    cpu: CpuStats
    """CPU time of its processes, ended ones included."""
    memory_bytes: int | None
    """Memory charged to it now; None without the memory controller."""


class Cgroup:
    """The group of one VM. All methods do nothing where there is no such group."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def make(self) -> None:
        """Make it. A failure is logged: a VM runs without, too."""
        if self.path is not None:
            try:
                self.path.mkdir(exist_ok=True)
            except OSError as exc:
                log.warning("%s cannot be made", self.path, exc_info=exc)

    def take(self, pid: int) -> None:
        """Move a process with all its threads here. A failure is logged."""
        if self.path is not None and self.path.is_dir():
            try:
                (self.path / "cgroup.procs").write_text(str(pid))
            except OSError as exc:
                if exc.errno != errno.ESRCH:
                    log.warning("Process %d cannot be moved to %s", pid, self.path, exc_info=exc)

    def kill(self) -> None:
        """SIGKILL to everything in it, at once; what it forks meanwhile does not get away."""
        if self.path is not None:
            with contextlib.suppress(OSError):  # no such group, or a kernel without it: signals do the same
                (self.path / "cgroup.kill").write_text("1")

    def remove(self) -> bool:
        """Remove it once nothing is in it; whether it is gone. Idempotent."""
        if self.path is None:
            return True
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.debug("%s stays for now", self.path, exc_info=exc)
            return False
        return True

    def usage(self) -> Usage | None:
        """What its processes have used; None when there is no such group."""
        if self.path is None:
            return None
        try:
            stat = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
            cpu = CpuStats(
                usage_us=int(stat["usage_usec"]),
                user_us=int(stat["user_usec"]),
                system_us=int(stat["system_usec"]),
                throttled_us=int(stat["throttled_usec"]) if "throttled_usec" in stat else None,
            )
        except (OSError, KeyError, ValueError):
            return None
        try:
            memory = int((self.path / "memory.current").read_text())
        except (OSError, ValueError):
            return Usage(cpu, None)
        return Usage(cpu, memory)


class Cgroups:
    """The groups of VMs on this host; made by `find`.

    Args:
        base: Directory that holds them; None where VMs get no groups.
        note: What an operator should know; None when all is well.
    """

    def __init__(self, base: Path | None, note: str | None = None) -> None:
        self._base = base
        self.note = note

    @classmethod
    def find(cls, mountinfo: str | None = None) -> Cgroups:
        """Find the v2 hierarchy and make the directory for VMs in it.

        Args:
            mountinfo: Content of ``/proc/self/mountinfo``; None reads it.
        """
        mount = cgroup2_mount(Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo)
        lonely = "VMs share the node agent's cgroup, and end with it when a service manager ends that."
        if mount is None:
            return cls(None, f"cgroup v2 is not mounted: {lonely}")
        base = mount / BASE
        try:
            base.mkdir(exist_ok=True)
            there = (base / "cgroup.controllers").read_text().split()
        except OSError as exc:
            return cls(None, f"{base} cannot be made ({exc.strerror}): {lonely}")
        for name in set(CONTROLLERS) & set(there):
            with contextlib.suppress(OSError):
                (base / "cgroup.subtree_control").write_text(f"+{name}")
        missing = [name for name in CONTROLLERS if name not in there]
        if not missing:
            return cls(base)
        return cls(
            base, f"{base} lacks the controllers {', '.join(missing)}: a VM's share is not bounded by them."
        )

    @property
    def available(self) -> bool:
        """Whether VMs get groups."""
        return self._base is not None

    def of(self, vm_id: str) -> Cgroup:
        """The group of a VM, which need not exist."""
        return Cgroup(None if self._base is None else self._base / vm_id)

    def ids(self, mark: str) -> list[str]:
        """VMs that have a group and whose id begins with *mark*, in order."""
        if self._base is None:
            return []
        with os.scandir(self._base) as entries:
            return sorted(e.name for e in entries if e.is_dir() and e.name.startswith(mark))
