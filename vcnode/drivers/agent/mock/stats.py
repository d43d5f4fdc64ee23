"""What mock guests say that they use: next to nothing, in the right places, with the limits that were set."""

from __future__ import annotations

from collections.abc import Sequence

from vcnode.drivers.agent.mock.guest import MockContainer, MockGuest
from vcnode.models.stats import (
    BlockStats,
    ContainerMemory,
    ContainerStats,
    CpuStats,
    GuestStats,
    idle_interface,
)

NO_CPU = CpuStats(usage_us=0, user_us=0, system_us=0, throttled_us=0)
NO_BLOCK = BlockStats(read_bytes=0, written_bytes=0, read_count=0, write_count=0)
MEM_BYTES = 1 << 20
"""Memory that a running container is said to use."""


def stats_of(guest: MockGuest) -> tuple[GuestStats, Sequence[ContainerStats]]:
    """The guest and its containers: a running one has one process and `MEM_BYTES`."""
    found = [_container(container) for container in guest.containers.values()]
    endpoints = () if guest.config is None else guest.config.endpoints
    told = GuestStats(
        cpu=NO_CPU,
        mem_total_bytes=0,
        mem_available_bytes=0,
        pid_count=sum(container.pid_count for container in found),
        block=NO_BLOCK,
        interfaces=tuple(idle_interface(endpoint.name) for endpoint in endpoints),
    )
    return told, found


def _container(container: MockContainer) -> ContainerStats:
    used = MEM_BYTES if container.is_running else 0
    limits = container.spec.resources
    return ContainerStats(
        container_id=container.spec.container_id,
        cpu=NO_CPU,
        memory=ContainerMemory(
            used_bytes=used,
            working_set_bytes=used,
            limit_bytes=None if limits.mem_limit_mib is None else limits.mem_limit_mib << 20,
            oom_kill_count=0,
        ),
        pid_count=int(container.is_running),
        pid_limit=limits.pids_limit,
        block=NO_BLOCK,
    )
