"""What the host can still give."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import UnavailableError
from vcnode.models.node import Amount
from vcnode.settings import CapacitySettings


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the host, in MiB."""

    total_mib: int
    """All of it."""
    available_mib: int
    """What new processes can get without swapping, as the kernel estimates it."""


def parse_meminfo(text: str) -> HostMemory:
    """Read the text of /proc/meminfo.

    Raises:
        ValueError: A line that is needed is missing.
    """
    fields = {
        name: int(rest.split()[0]) // 1024
        for name, _, rest in (line.partition(":") for line in text.splitlines())
        if rest.split()
    }
    try:
        return HostMemory(total_mib=fields["MemTotal"], available_mib=fields["MemAvailable"])
    except KeyError as exc:
        raise ValueError(f"/proc/meminfo has no {exc.args[0]}") from exc


def read_memory(path: Path = Path("/proc/meminfo")) -> HostMemory:
    """The host's memory now.

    Raises:
        UnavailableError: The kernel does not say.
        ResourceExhaustedError: No file descriptor is left to ask it.
    """
    try:
        return parse_meminfo(path.read_text())
    except (OSError, ValueError) as exc:
        short = exhausted(exc) if isinstance(exc, OSError) else None
        raise short or UnavailableError(f"{path} cannot be read; is /proc mounted?") from exc


MOCK_HOST = Amount(vcpu_count=4096, mem_mib=16 * 1024 * 1024, disk_mib=64 * 1024 * 1024, pods=0)
"""What a node that only pretends has, unless its settings say otherwise: more than enough."""


def read_host(memory: HostMemory, disk: Path) -> Amount:
    """CPUs, memory and the file system of *disk*, as the host has them.

    Raises:
        UnavailableError: The file system cannot be asked.
    """
    try:
        system = os.statvfs(disk)
    except OSError as exc:
        raise UnavailableError(f"The file system of {disk} cannot be asked: {exc.strerror}.") from exc
    return Amount(
        vcpu_count=len(os.sched_getaffinity(0)),
        mem_mib=memory.total_mib,
        disk_mib=system.f_blocks * system.f_frsize // (1024 * 1024),
        pods=0,
    )


def capacity(host: Amount, settings: CapacitySettings, *, pods: int) -> Amount:
    """What there is, as the settings have it where they say so. Pure."""
    return Amount(
        vcpu_count=host.vcpu_count if settings.vcpu_count is None else settings.vcpu_count,
        mem_mib=host.mem_mib if settings.mem_mib is None else settings.mem_mib,
        disk_mib=host.disk_mib if settings.disk_mib is None else settings.disk_mib,
        pods=pods,
    )


def allocatable(capacity: Amount, settings: CapacitySettings) -> Amount:
    """What pods may have of it in all. Pure."""
    return Amount(
        vcpu_count=int(capacity.vcpu_count * settings.cpu_overcommit),
        mem_mib=int(max(0, capacity.mem_mib - settings.reserved_mem_mib) * settings.mem_overcommit),
        disk_mib=int(capacity.disk_mib * settings.disk_overcommit),
        pods=capacity.pods,
    )
