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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vcnode.models.stats import CpuStats

log = logging.getLogger(__name__)

BASE = "vcnode"
"""Directory of all VMs of all nodes on this host."""
CONTROLLERS = ("cpu", "io", "memory", "pids")
"""What bounds and counts a VM's share of the host."""
V1_NAMES = {"cpu": "cpu", "io": "blkio", "memory": "memory", "pids": "pids"}
"""What v1 calls them."""
CPU_PERIOD_US = 100_000
OVERHEAD_MIB = 512
"""Memory of a VM besides its guest's and its translated code: QEMU itself, and the disks that it reads, whose
pages the kernel takes back before it ends anybody."""
MAX_HELPERS = 256
NO_GROUPS: Mapping[str, Path] = MappingProxyType({})


def cgroup1_mounts(mountinfo: str) -> dict[str, Path]:
    """Where the v1 hierarchies of `CONTROLLERS` are mounted."""
    found = {}
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup "):
            options = filesystem.split(" ")[-1].split(",")
            found.update({n: Path(mount.split(" ")[4]) for n, v1 in V1_NAMES.items() if v1 in options})
    return found


def disk_of(path: Path, sys_block: Path = Path("/sys/dev/block")) -> str | None:
    """The disk, not the partition, of the file system of *path*, as ``major:minor``; None: it has none."""
    try:
        device = path.stat().st_dev
        entry = (sys_block / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
        if (entry / "partition").exists():
            entry = entry.parent
        return (entry / "dev").read_text().strip()
    except OSError:
        return None


def _write(path: Path, files: Mapping[str, str]) -> None:
    """Write what bounds a group; a file that is not there belongs to a controller that is not, either."""
    for name, text in files.items():
        for line in text.splitlines():  # one device a write
            try:
                fd = os.open(path / name, os.O_WRONLY | os.O_CLOEXEC)  # not made: cgroupfs would say EPERM
                try:
                    os.write(fd, line.encode())
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as exc:
                log.warning("%s cannot be set to %r", path / name, line, exc_info=exc)


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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a VM may have of its host: what its size explains, and no more."""

    memory_bytes: int
    """Guest memory, translated code, and `OVERHEAD_MIB`."""
    cpu_us: int
    """CPU time in each `CPU_PERIOD_US`: its virtual CPUs and one more, for its devices."""
    pids: int
    """Threads: QEMU makes up to 64 for a disk and 64 for the share."""
    io_bytes_per_s: int | None = None
    """Read, and as much written; None: no limit."""

    @classmethod
    def of(
        cls, vcpu_count: int, mem_size_mib: int, cache_mib: int, *, io_bytes_per_s: int | None = None
    ) -> Limits:
        """The limits of a VM of that size whose translated code takes up to *cache_mib*."""
        return cls(
            memory_bytes=(mem_size_mib + cache_mib + OVERHEAD_MIB) << 20,
            cpu_us=(vcpu_count + 1) * CPU_PERIOD_US,
            pids=MAX_HELPERS + vcpu_count,
            io_bytes_per_s=io_bytes_per_s,
        )

    def v2(self, disks: Sequence[str]) -> dict[str, str]:
        """Files of a v2 group and what goes into them; *disks* as ``major:minor``."""
        files = {
            "memory.max": str(self.memory_bytes),
            "cpu.max": f"{self.cpu_us} {CPU_PERIOD_US}",
            "pids.max": str(self.pids),
        }
        if self.io_bytes_per_s is not None:
            io = self.io_bytes_per_s
            files["io.max"] = "\n".join(f"{disk} rbps={io} wbps={io}" for disk in disks)
        return files

    def v1(self, controller: str, disks: Sequence[str]) -> dict[str, str]:
        """The same for a group of one v1 controller. Source: Linux Documentation/admin-guide/cgroup-v1."""
        match controller:
            case "memory":
                return {"memory.limit_in_bytes": str(self.memory_bytes)}
            case "cpu":
                return {"cpu.cfs_period_us": str(CPU_PERIOD_US), "cpu.cfs_quota_us": str(self.cpu_us)}
            case "pids":
                return {"pids.max": str(self.pids)}
            case "io" if self.io_bytes_per_s is not None:
                text = "\n".join(f"{disk} {self.io_bytes_per_s}" for disk in disks)
                return {f"blkio.throttle.{way}_bps_device": text for way in ("read", "write")}
        return {}


class Cgroup:
    """The group of one VM. All methods do nothing where there is no such group.

    Args:
        path: In the v2 hierarchy.
        v1: Its groups in v1 hierarchies, by controller, for what v2 lacks.
        disks: Whose traffic is bounded, as ``major:minor``.
    """

    def __init__(
        self, path: Path | None, v1: Mapping[str, Path] = NO_GROUPS, disks: Sequence[str] = ()
    ) -> None:
        self.path = path
        self._v1 = v1
        self._disks = disks

    @property
    def _all(self) -> list[Path]:
        return [*self._v1.values(), *(() if self.path is None else (self.path,))]

    def make(self, limits: Limits | None = None) -> None:
        """Make it, with its limits. A failure is logged: a VM runs without, too."""
        for path in self._all:
            try:
                path.mkdir(exist_ok=True)
            except OSError as exc:
                log.warning("%s cannot be made", path, exc_info=exc)
        if limits is None:
            return
        if self.path is not None:
            _write(self.path, limits.v2(self._disks))
        for controller, path in self._v1.items():
            _write(path, limits.v1(controller, self._disks))

    def take(self, pid: int) -> None:
        """Move a process with all its threads here. A failure is logged."""
        for path in self._all:
            if path.is_dir():
                try:
                    (path / "cgroup.procs").write_text(str(pid))
                except OSError as exc:
                    if exc.errno != errno.ESRCH:
                        log.warning("Process %d cannot be moved to %s", pid, path, exc_info=exc)

    def kill(self) -> None:
        """SIGKILL to everything in it, at once; what it forks meanwhile does not get away."""
        if self.path is not None:
            with contextlib.suppress(OSError):  # no such group, or a kernel without it: signals do the same
                (self.path / "cgroup.kill").write_text("1")

    def remove(self) -> bool:
        """Remove it once nothing is in it; whether it is gone. Idempotent."""
        gone = True
        for path in self._all:
            try:
                path.rmdir()
            except FileNotFoundError:
                continue
            except OSError as exc:
                log.debug("%s stays for now", path, exc_info=exc)
                gone = False
        return gone

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

    def __init__(
        self,
        base: Path | None,
        note: str | None = None,
        v1: Mapping[str, Path] = NO_GROUPS,
        disks: Sequence[str] = (),
    ) -> None:
        self._base = base
        self.note = note
        self._v1 = v1
        self._disks = disks

    @classmethod
    def find(cls, mountinfo: str | None = None, disks: Sequence[str] = ()) -> Cgroups:
        """Find the v2 hierarchy and make the directory for VMs in it.

        Args:
            mountinfo: Content of ``/proc/self/mountinfo``; None reads it.
            disks: Whose traffic is bounded, as ``major:minor``.
        """
        mountinfo = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
        mount = cgroup2_mount(mountinfo)
        lonely = "VMs share the node agent's cgroup, and end with it when a service manager ends that."
        if mount is None:
            return cls(None, f"cgroup v2 is not mounted: {lonely}")
        base = mount / BASE
        try:
            base.mkdir(exist_ok=True)
            _enable(mount)  # a group has the controllers that its parent enables for it
            there = (base / "cgroup.controllers").read_text().split()
        except OSError as exc:
            return cls(None, f"{base} cannot be made ({exc.strerror}): {lonely}")
        _enable(base)
        missing = [name for name in CONTROLLERS if name not in there]
        v1 = _make_v1({name: at for name, at in cgroup1_mounts(mountinfo).items() if name in missing})
        lacking = [name for name in missing if name not in v1]
        note = None
        if lacking:
            note = f"{base} lacks the controllers {', '.join(lacking)}: a VM's share is not bounded by them."
        elif v1:
            note = f"VMs are bounded by cgroup v1 ({', '.join(sorted(v1))}): {base} lacks these controllers."
        return cls(base, note, v1, disks)

    @property
    def available(self) -> bool:
        """Whether VMs get groups."""
        return self._base is not None

    def of(self, vm_id: str) -> Cgroup:
        """The group of a VM, which need not exist."""
        if self._base is None:
            return Cgroup(None)
        v1 = {name: base / vm_id for name, base in self._v1.items()}
        return Cgroup(self._base / vm_id, v1, self._disks)

    def ids(self, mark: str) -> list[str]:
        """VMs that have a group and whose id begins with *mark*, in order."""
        if self._base is None:
            return []
        with os.scandir(self._base) as entries:
            return sorted(e.name for e in entries if e.is_dir() and e.name.startswith(mark))


def _enable(group: Path) -> None:
    """Give the groups below *group* the controllers that it has, as far as the kernel lets us."""
    with contextlib.suppress(OSError):
        for name in sorted(set(CONTROLLERS) & set((group / "cgroup.controllers").read_text().split())):
            with contextlib.suppress(OSError):  # who has processes of his own there, or has it in v1
                (group / "cgroup.subtree_control").write_text(f"+{name}")


def _make_v1(mounts: Mapping[str, Path]) -> dict[str, Path]:
    """The directories for VMs in these v1 hierarchies, as far as they can be made."""
    made = {}
    for name, mount in mounts.items():
        base = mount / BASE
        try:
            base.mkdir(exist_ok=True)
        except OSError as exc:
            log.debug("%s cannot be made", base, exc_info=exc)
            continue
        made[name] = base
    return made
