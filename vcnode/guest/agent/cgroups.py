"""cgroup v2: one group for each container, below one for all of them."""

from __future__ import annotations

import os

from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure
from vcnode.guest.agent.params import Params

ROOT = "/sys/fs/cgroup"
CONTROLLERS = ("cpu", "io", "memory", "pids")
"""``io`` is there to count."""
PARENT = "containers"
"""The group that holds those of all containers."""
_UNLIMITED = (1 << 62) - 1


class Limits:
    """The ``resources`` of a request, as they came and as files of the group with their contents."""

    __slots__ = ("files", "given")

    def __init__(self, resources: Params) -> None:
        """Take *resources* apart; raises `Failure` as `files`."""
        self.given = resources.fields()
        self.files = files(resources)


def files(resources: Params) -> dict[str, str]:
    """What to write into which file of the group, for the ``resources`` of a request.

    Raises:
        Failure: ``invalid_argument``.
    """
    quota_us = resources.optional_integer("cpu_quota_us", 1000, _UNLIMITED)
    period_us = resources.optional_integer("cpu_period_us", 1000, 1_000_000)
    shares = resources.optional_integer("cpu_shares", 2, 262_144)
    mem_mib = resources.optional_integer("mem_limit_mib", 1, _UNLIMITED >> 20)
    pids = resources.optional_integer("pids_limit", 1, 1 << 22)
    resources.done()
    found: dict[str, str] = {}
    if quota_us is not None:
        found["cpu.max"] = f"{quota_us} {period_us or 100_000}"
    if shares is not None:
        found["cpu.weight"] = str(cpu_weight(shares))
    if mem_mib is not None:
        found["memory.max"] = str(mem_mib << 20)
        # One process killed out of many leaves a container that nobody expects: all or none.
        found["memory.oom.group"] = "1"
    if pids is not None:
        found["pids.max"] = str(pids)
    return found


DEFAULTS = {
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "memory.max": "max",
    "memory.oom.group": "0",
    "pids.max": "max",
}
"""Contents of files that bound nothing."""


def cpu_weight(shares: int) -> int:
    """Convert cgroup v1 shares (2 to 262,144) to a v2 weight (1 to 10,000).

    Source: the OCI runtime specification's formula, config-linux.md and crun.
    """
    return 1 + (shares - 2) * 9999 // 262_142


def counter(content: str, name: str) -> int:
    """One number of a flat-keyed file such as memory.events; 0 when it is not there."""
    for line in content.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def available_bytes(meminfo: str = "/proc/meminfo") -> int:
    """Memory of the guest that could be given away without ending a process, as the kernel estimates it."""
    for line in _read(meminfo).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return 0


def set_up(root: str = ROOT) -> None:
    """Make the parent of all containers' groups and hand the controllers that the kernel has down to it."""
    parent = f"{root}/{PARENT}"
    os.makedirs(parent, exist_ok=True)
    available = _read(f"{root}/cgroup.controllers").split()
    for where in (root, parent):
        for name in CONTROLLERS:
            if name in available:
                _write(f"{where}/cgroup.subtree_control", f"+{name}")


class Cgroup:
    """The group of one container; it exists from `create` to `remove`."""

    __slots__ = ("_oom_kills", "path")

    def __init__(self, container_id: str, root: str = ROOT) -> None:
        self.path = f"{root}/{PARENT}/{container_id}"
        self._oom_kills = 0

    def create(self, limits: dict[str, str]) -> None:
        """Make the group with these contents of its files. On failure `remove` takes it away."""
        os.mkdir(self.path)
        for name, value in limits.items():
            _write(f"{self.path}/{name}", value)
        self._forbid_swap(limits)

    def update(self, limits: dict[str, str]) -> None:
        """Give the group these limits, and no others.

        Raises:
            Failure: ``failed_precondition``: more is in use than they allow. Nothing is changed then.
            OSError: The kernel refuses; what was changed is as before.
        """
        self._check_usage(limits)
        before: dict[str, str] = {}
        try:
            for name, default in DEFAULTS.items():
                path = f"{self.path}/{name}"
                if name not in limits and not os.path.exists(path):
                    continue  # a controller that this kernel lacks bounds nothing
                was, wanted = _read(path).strip(), limits.get(name, default)
                if was != wanted:
                    before[name] = was
                    _write(path, wanted)
        except OSError:
            for name, was in before.items():
                _write(f"{self.path}/{name}", was)
            raise
        self._forbid_swap(limits)

    def _check_usage(self, limits: dict[str, str]) -> None:
        if "pids.max" in limits:
            used = int(_read(f"{self.path}/pids.current"))
            if used > int(limits["pids.max"]):
                raise Failure(FAILED_PRECONDITION, f"The container has {used} processes and threads now.")
        if "memory.max" in limits:
            stat = _read(f"{self.path}/memory.stat")
            cached = counter(stat, "inactive_file") + counter(stat, "active_file")
            used = int(_read(f"{self.path}/memory.current")) - cached
            if used > int(limits["memory.max"]):
                raise Failure(
                    FAILED_PRECONDITION,
                    f"The container uses {-(-used >> 20)} MiB now, caches not counted; less would kill it.",
                )

    def _forbid_swap(self, limits: dict[str, str]) -> None:
        """Without swap in the guest the file may be missing; the limit must not be a limit of RAM only."""
        swap = f"{self.path}/memory.swap.max"
        if "memory.max" in limits and os.path.exists(swap):
            _write(swap, "0")

    def remove(self) -> None:
        """Remove the group; nothing when it is not there. Fails with EBUSY while a process is in it."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return

    def open_procs(self) -> int:
        """A descriptor; who writes ``0`` to it moves into the group."""
        return os.open(f"{self.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def pids(self) -> list[int]:
        """All processes in the group, seen from the caller's pid namespace (0: not visible there)."""
        return [int(word) for word in _read(f"{self.path}/cgroup.procs").split() if word.isdigit()]

    def kill(self) -> None:
        """Send SIGKILL to every process in the group, forks in flight included (Linux 5.14)."""
        _write(f"{self.path}/cgroup.kill", "1")

    def freeze(self) -> None:
        """Begin to freeze every process in the group; ``cgroup.events`` tells when that is done."""
        _write(f"{self.path}/cgroup.freeze", "1")

    def thaw(self) -> None:
        """Let them go on."""
        _write(f"{self.path}/cgroup.freeze", "0")

    def oom_killed(self) -> bool:
        """Whether the kernel has killed a process of the group for memory since this was asked last."""
        before, self._oom_kills = self._oom_kills, self._count_oom()
        return self._oom_kills > before

    def _count_oom(self) -> int:
        path = f"{self.path}/memory.events"
        return counter(_read(path), "oom_kill") if os.path.exists(path) else 0


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode("ascii"))
    except OSError as exc:
        exc.filename = path
        raise
    finally:
        os.close(fd)
