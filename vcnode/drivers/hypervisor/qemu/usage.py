"""What a QEMU process takes of its host, from /proc and its cgroup. Reads only; the guest notices nothing.

Where its memory goes is in ``/proc/PID/smaps``: each mapping with its proportional share (PSS). The guest's
memory is one of them, known by its size, and everything else is overhead: QEMU's heap, code, stacks, device
buffers and, without KVM, translated code. Pages of a template that its clones share count for each as one
part of so many.

Source: proc_pid_stat(5), proc_pid_statm(5), proc_pid_smaps(5), proc_pid_io(5), proc_pid_net(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from vcnode.drivers.hypervisor.qemu.cgroup import Cgroup
from vcnode.models.stats import CpuStats, InterfaceStats, VmStats

_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ")


class GoneError(Exception):
    """There is no such process any more."""


def read(
    pid: int,
    start_ticks: int,
    group: Cgroup,
    *,
    mem_size_mib: int,
    interfaces: Mapping[str, str],
    memory: bool,
    proc: Path = Path("/proc"),
) -> VmStats:
    """What the process *pid*, started at *start_ticks*, has used so far. Blocks; see `Measurable.read_stats`.

    Raises:
        GoneError: It has ended, or the pid is another process's now.
    """
    directory = proc / str(pid)
    try:
        # Fields 14, 15, 20 and 22; the name in field 2 may hold spaces and parentheses.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        in_user, in_kernel, threads, started = (int(fields[i]) for i in (11, 12, 17, 19))
        if started != start_ticks:
            raise GoneError
        resident_pages = int((directory / "statm").read_text().split()[1])
        moved = _pairs((directory / "io").read_text())
        counted = _interfaces(directory / "net/dev", interfaces) if interfaces else ()
        shares = proportional((directory / "smaps").read_text(), mem_size_mib << 20) if memory else None
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise GoneError from exc
    charged = group.usage()
    cpu = CpuStats(
        usage_us=(in_user + in_kernel) * _TICK_US, user_us=in_user * _TICK_US, system_us=in_kernel * _TICK_US
    )
    return VmStats(
        cpu=cpu if charged is None else charged.cpu,
        thread_count=threads,
        resident_bytes=resident_pages * _PAGE_BYTES,
        pss_bytes=None if shares is None else sum(shares),
        guest_pss_bytes=None if shares is None else shares[0],
        overhead_bytes=None if shares is None else shares[1],
        cgroup_mem_bytes=None if charged is None else charged.memory_bytes,
        read_bytes=moved.get("read_bytes", 0),
        written_bytes=moved.get("write_bytes", 0),
        interfaces=counted,
    )


def proportional(smaps: str, guest_bytes: int) -> tuple[int, int] | None:
    """Proportional shares of the guest's memory and of all the rest, in bytes; None for a kernel thread's.

    The guest's memory is the mapping of just that size that can be read and written and not executed (the
    buffer of translated code may be as large), the first if there are several.
    """
    guest = rest = 0
    in_guest = found = False
    for line in smaps.splitlines():
        if line.startswith("Pss:"):
            share = int(line.split()[1]) * 1024
            guest, rest = (guest + share, rest) if in_guest else (guest, rest + share)
        elif (mapping := _MAPPING.match(line)) is not None:
            size = int(mapping[2], 16) - int(mapping[1], 16)
            in_guest = not found and size == guest_bytes and mapping[3].startswith("rw-")
            found = found or in_guest
    return (guest, rest) if smaps else None


def _interfaces(path: Path, names: Mapping[str, str]) -> tuple[InterfaceStats, ...]:
    """The counters of some interfaces of the process's network namespace, named as the guest has them."""
    return tuple(count_interfaces(path.read_text().splitlines()[2:], names))


def count_interfaces(lines: Iterable[str], names: Mapping[str, str]) -> Iterable[InterfaceStats]:
    """The interfaces *names* among the *lines* of a ``net/dev``, under their names in the guest.

    Frames that filters hand on to a tap have been counted by the interface that they came in by, and the same
    goes for those that leave: it has both directions as the pod sees them.
    """
    for line in lines:
        name, _, counters = line.partition(":")
        if (called := names.get(name.strip())) is not None:
            n = [int(word) for word in counters.split()]
            yield InterfaceStats(
                name=called,
                received_bytes=n[0],
                received_packets=n[1],
                received_errors=n[2],
                received_dropped=n[3],
                sent_bytes=n[8],
                sent_packets=n[9],
                sent_errors=n[10],
                sent_dropped=n[11],
            )


def _pairs(content: str) -> dict[str, int]:
    pairs = (line.partition(":") for line in content.splitlines())
    return {name: int(value) for name, _, value in pairs if value.strip().isdigit()}
