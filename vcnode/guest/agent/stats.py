"""What the guest and its containers use, from /proc and cgroup v2: read when the host asks, all at once."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vcnode.guest.agent.cgroups import Cgroup
    from vcnode.guest.agent.loop import Loop

_AT_ONCE = 8
"""Containers looked at before the loop may serve others."""
_SECTOR_BYTES = 512
"""What /proc/diskstats counts in, whatever the disk has."""
_NO_DISKS = ("loop", "ram", "zram", "dm-", "md")
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


class Sample:
    """Reads everything, the containers a few at a time; *done* gets the result of ``stats``.

    Args:
        loop: Where to go on.
        groups: The cgroup of each container, by its id.
        done: Called once.
        proc: Where proc is mounted.
    """

    def __init__(
        self,
        loop: Loop,
        groups: dict[str, Cgroup],
        done: Callable[[dict[str, Any]], None],
        proc: str = "/proc",
    ) -> None:
        self._loop = loop
        self._left = list(groups.items())
        self._done = done
        self._guest = guest(proc)
        self._found: list[dict[str, Any]] = []
        self._go_on()

    def _go_on(self) -> None:
        now, self._left = self._left[:_AT_ONCE], self._left[_AT_ONCE:]
        for container_id, group in now:
            with contextlib.suppress(OSError):  # it is made or deleted just now
                self._found.append({"container_id": container_id, **container(group.path)})
        if self._left:
            self._loop.call_later(0, self._go_on)
        else:
            self._done({"guest": self._guest, "containers": self._found})


def guest(proc: str = "/proc") -> dict[str, Any]:
    """What the guest as a whole uses. Source: proc_stat(5), proc_meminfo(5), proc_loadavg(5)."""
    user, nice, system, _, _, irq, softirq = (int(n) for n in _lines(f"{proc}/stat")[0].split()[1:8])
    meminfo = {name: value for name, _, value in (_cut(line, b":") for line in _lines(f"{proc}/meminfo"))}
    entities = _read(f"{proc}/loadavg").split()[3]
    in_user, in_kernel = (user + nice) * _TICK_US, (system + irq + softirq) * _TICK_US
    return {
        "cpu": {"usage_us": in_user + in_kernel, "user_us": in_user, "system_us": in_kernel},
        "mem_total_bytes": _kib(meminfo[b"MemTotal"]),
        "mem_available_bytes": _kib(meminfo[b"MemAvailable"]),
        "pid_count": int(entities.partition(b"/")[2]),
        "block": disks(_lines(f"{proc}/diskstats")),
        "interfaces": interfaces(_lines(f"{proc}/net/dev")),
    }


def disks(lines: list[bytes]) -> dict[str, int]:
    """I/O of all whole disks together. Source: Linux Documentation/admin-guide/iostats.rst."""
    total = dict.fromkeys(("read_bytes", "written_bytes", "read_count", "write_count"), 0)
    seen: list[str] = []
    for line in lines:
        words = line.split()
        name = words[2].decode("ascii", "replace")
        if name.startswith(_NO_DISKS) or _is_partition(name, seen):
            continue
        seen.append(name)
        reads, read_sectors, writes, written_sectors = (int(words[index]) for index in (3, 5, 7, 9))
        total["read_bytes"] += read_sectors * _SECTOR_BYTES
        total["written_bytes"] += written_sectors * _SECTOR_BYTES
        total["read_count"] += reads
        total["write_count"] += writes
    return total


def _is_partition(name: str, disks: list[str]) -> bool:
    """Whether *name* is one of the disks, listed before, with the number of a partition."""
    return any(name.startswith(disk) and name[len(disk) :].lstrip("p").isdigit() for disk in disks)


def interfaces(lines: list[bytes]) -> list[dict[str, Any]]:
    """What went through each interface but the loopback. Source: proc_pid_net(5), net/dev."""
    found = []
    for line in lines[2:]:
        name, _, counters = _cut(line, b":")
        if name == b"lo":
            continue
        n = [int(word) for word in counters.split()]
        found.append(
            {
                "name": name.decode("utf-8", "replace"),
                "received_bytes": n[0],
                "received_packets": n[1],
                "received_errors": n[2],
                "received_dropped": n[3],
                "sent_bytes": n[8],
                "sent_packets": n[9],
                "sent_errors": n[10],
                "sent_dropped": n[11],
            }
        )
    return found


def container(group: str) -> dict[str, Any]:
    """What is counted for the container whose cgroup is the directory *group*.

    What the kernel does not count is 0, or null where that is a statement of its own. Source: Linux
    Documentation/admin-guide/cgroup-v2.rst.

    Raises:
        FileNotFoundError: There is no such group.
    """
    cpu = _flat(_read(f"{group}/cpu.stat"))
    used = _number(f"{group}/memory.current") or 0
    return {
        "cpu": {
            "usage_us": cpu.get("usage_usec", 0),
            "user_us": cpu.get("user_usec", 0),
            "system_us": cpu.get("system_usec", 0),
            "throttled_us": cpu.get("throttled_usec", 0),
        },
        "memory": {
            "used_bytes": used,
            "working_set_bytes": max(0, used - _counters(f"{group}/memory.stat").get("inactive_file", 0)),
            "peak_bytes": _number(f"{group}/memory.peak"),
            "limit_bytes": _number(f"{group}/memory.max"),
            "oom_kill_count": _counters(f"{group}/memory.events").get("oom_kill", 0),
        },
        "pid_count": _number(f"{group}/pids.current") or 0,
        "pid_limit": _number(f"{group}/pids.max"),
        "block": _block(f"{group}/io.stat"),
    }


def _block(path: str) -> dict[str, int] | None:
    """The sum over all devices of an ``io.stat``; None where there is none."""
    try:
        content = _read(path)
    except FileNotFoundError:
        return None
    total: dict[str, int] = {}
    for word in content.decode("ascii", "replace").split():
        name, _, value = word.partition("=")
        if value.isdigit():
            total[name] = total.get(name, 0) + int(value)
    return {
        "read_bytes": total.get("rbytes", 0),
        "written_bytes": total.get("wbytes", 0),
        "read_count": total.get("rios", 0),
        "write_count": total.get("wios", 0),
    }


def _counters(path: str) -> dict[str, int]:
    """A flat-keyed file; nothing where there is none."""
    try:
        return _flat(_read(path))
    except FileNotFoundError:
        return {}


def _flat(content: bytes) -> dict[str, int]:
    pairs = (line.partition(" ") for line in content.decode("ascii", "replace").splitlines())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def _number(path: str) -> int | None:
    """The number in a file; None for ``max``, and where there is none."""
    try:
        content = _read(path).strip()
    except FileNotFoundError:
        return None
    return int(content) if content.isdigit() else None


def _kib(value: bytes) -> int:
    return int(value.split()[0]) * 1024


def _cut(line: bytes, at: bytes) -> tuple[bytes, bytes, bytes]:
    name, found, rest = line.partition(at)
    return name.strip(), found, rest


def _lines(path: str) -> list[bytes]:
    return _read(path).splitlines()


def _read(path: str) -> bytes:
    # One read(2) need not give all of such a file: this goes on to its end.
    with open(path, "rb", buffering=0) as file:
        return file.readall()
