"""What ``vcnode top`` shows: nodes by their leases, pods by their last status, and what all of them use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from vcnode.cli.usage import cpu_percent, seconds_between
from vcnode.errors import UnsupportedError, VcnodeError
from vcnode.models.pod import PodState, PodStatus
from vcnode.models.stats import PodStats

if TYPE_CHECKING:
    from vcnode.client import Fleet
    from vcnode.client.view import NodeView

SortKey = Literal["cpu", "memory", "name"]
CONCURRENCY = 16
"""Pods that are asked at once, over all nodes."""
PATIENCE_S = 5.0
"""Seconds for one pod to answer; one that does not is shown without numbers."""
_MEASURED = frozenset({PodState.RUNNING, PodState.PAUSED})


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node. What pods use is the sum over those that have answered."""

    node: str
    state: str
    pods: int
    max_pods: int
    vcpus: int
    max_vcpus: int
    mem_mib: int
    max_mem_mib: int
    cpu_percent: float | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class PodRow:
    """A pod's VM on its host. Rates are a second's, None before the second sample."""

    node: str
    pod_id: str
    state: str
    cpu_percent: float | None
    memory_bytes: int | None
    overhead_bytes: int | None
    mem_size_bytes: int
    received_bytes_per_s: float | None
    sent_bytes_per_s: float | None
    disk_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class ContainerRow:
    """A container, as its guest counts."""

    node: str
    pod_id: str
    container_id: str
    state: str
    cpu_percent: float | None
    memory_bytes: int | None
    limit_bytes: int | None
    pids: int | None
    disk_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of it, at one time."""

    time: datetime
    nodes: tuple[NodeRow, ...]
    pods: tuple[PodRow, ...]
    containers: tuple[ContainerRow, ...]

    def by(self, sort: SortKey) -> Snapshot:
        """The same, each part by name, or with what uses most first."""
        return Snapshot(
            self.time,
            tuple(_sorted(self.nodes, sort)),
            tuple(_sorted(self.pods, sort)),
            tuple(_sorted(self.containers, sort)),
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "time": self.time.isoformat()}


class Gatherer:
    """Takes snapshots of a fleet, and remembers the samples before for rates.

    Args:
        fleet: Entered.
        node: Only this one; None: all.
        guests: Whether guests are asked for their containers, which wakes them.
    """

    def __init__(self, fleet: Fleet, *, node: str | None, guests: bool) -> None:
        self._fleet = fleet
        self._node = node
        self._guests = guests
        self._before: Mapping[tuple[str, str], PodStats] = {}

    async def snapshot(self) -> Snapshot:
        """Ask all pods that run, `CONCURRENCY` at once."""
        nodes = {
            name: view
            for name, view in self._fleet.nodes.items()
            if view.alive and self._node in (None, name)
        }
        pods = {key: status for key, status in self._fleet.pods.items() if key[0] in nodes}
        measured = [key for key, status in pods.items() if status.state in _MEASURED]
        samples = await self._ask_all(measured)
        made = rows(nodes.values(), pods, samples, self._before)
        self._before = samples
        return made

    async def _ask_all(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], PodStats]:
        found: dict[tuple[str, str], PodStats] = {}
        todo = list(reversed(list(keys)))

        async def work() -> None:
            while todo:
                node, pod_id = key = todo.pop()
                try:
                    found[key] = await self._ask(node, pod_id)
                except VcnodeError:
                    continue  # it ends just now, or its node does not answer: shown without numbers

        async with asyncio.TaskGroup() as group:
            for _ in range(min(CONCURRENCY, len(todo))):
                group.create_task(work())
        return found

    async def _ask(self, node: str, pod_id: str) -> PodStats:
        client = self._fleet.client.node(node)
        if self._guests:
            try:
                return await client.pod_stats(pod_id, deadline_s=PATIENCE_S)
            except UnsupportedError:
                pass  # a pod without an agent that could tell has its VM only
        return await client.pod_stats(pod_id, guest=False, deadline_s=PATIENCE_S)


def rows(
    nodes: Iterable[NodeView],
    pods: Mapping[tuple[str, str], PodStatus],
    samples: Mapping[tuple[str, str], PodStats],
    before: Mapping[tuple[str, str], PodStats],
) -> Snapshot:
    """Put it together. Pure, but for the time."""
    pod_rows = [_pod(status, samples.get(key), before.get(key)) for key, status in pods.items()]
    containers = [
        row for key, status in pods.items() for row in _containers(status, samples.get(key), before.get(key))
    ]
    node_rows = [_node(view, pod_rows) for view in nodes]
    return Snapshot(datetime.now(UTC), tuple(node_rows), tuple(pod_rows), tuple(containers))


def _sorted(found: Iterable[Any], sort: SortKey) -> list[Any]:
    """By name, or what uses most first; what is not known comes last."""

    def name(row: Any) -> tuple[str, ...]:
        return row.node, getattr(row, "pod_id", ""), getattr(row, "container_id", "")

    def use(row: Any) -> float:
        value = row.cpu_percent if sort == "cpu" else row.memory_bytes
        return -1.0 if value is None else value

    by_name = sorted(found, key=name)
    return by_name if sort == "name" else sorted(by_name, key=use, reverse=True)


def _node(view: NodeView, pods: Iterable[PodRow]) -> NodeRow:
    lease = view.lease
    own = [pod for pod in pods if pod.node == lease.node]
    return NodeRow(
        node=lease.node,
        state=lease.state,
        pods=len(own),  # newer than the lease, which comes every few seconds only
        max_pods=lease.allocatable.pods,
        vcpus=lease.reserved.vcpu_count,
        max_vcpus=lease.allocatable.vcpu_count,
        mem_mib=lease.reserved.mem_mib,
        max_mem_mib=lease.allocatable.mem_mib,
        cpu_percent=_total(pod.cpu_percent for pod in own),
        memory_bytes=_total(pod.memory_bytes for pod in own),
    )


def _total(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _pod(status: PodStatus, now: PodStats | None, before: PodStats | None) -> PodRow:
    vm = None if now is None else now.vm
    earlier = None if before is None else before.vm
    seconds = 0.0 if now is None else seconds_between(now, before)

    def rate(*names: str) -> float | None:
        """A second's growth of counters of the VM, or of its interfaces."""
        if vm is None or earlier is None or seconds <= 0:
            return None
        grown = sum(_count(vm, name) - _count(earlier, name) for name in names)
        return grown / seconds if grown >= 0 else None

    def _count(of: Any, name: str) -> int:
        holders = [of] if hasattr(of, name) else of.interfaces
        return sum(getattr(each, name) for each in holders)

    memory = None if vm is None else (vm.resident_bytes if vm.pss_bytes is None else vm.pss_bytes)
    return PodRow(
        node=status.node,
        pod_id=status.pod_id,
        state=status.state.value,
        cpu_percent=None
        if vm is None
        else cpu_percent(vm.cpu, None if earlier is None else earlier.cpu, seconds),
        memory_bytes=memory,
        overhead_bytes=None if vm is None else vm.overhead_bytes,
        mem_size_bytes=status.resources.mem_size_mib << 20,
        received_bytes_per_s=rate("received_bytes"),
        sent_bytes_per_s=rate("sent_bytes"),
        disk_bytes_per_s=rate("read_bytes", "written_bytes"),
    )


def _containers(status: PodStatus, now: PodStats | None, before: PodStats | None) -> Iterable[ContainerRow]:
    samples = {} if now is None else {each.container_id: each for each in now.containers}
    earlier = {} if before is None else {each.container_id: each for each in before.containers}
    seconds = 0.0 if now is None else seconds_between(now, before)
    for container in status.containers:
        found, then = samples.get(container.container_id), earlier.get(container.container_id)
        disk: float | None = None
        if found and then and found.block and then.block and seconds > 0:
            moved = found.block.read_bytes + found.block.written_bytes
            grown = moved - then.block.read_bytes - then.block.written_bytes
            disk = grown / seconds if grown >= 0 else None
        yield ContainerRow(
            node=status.node,
            pod_id=status.pod_id,
            container_id=container.container_id,
            state=container.state.value,
            cpu_percent=None
            if found is None
            else cpu_percent(found.cpu, None if then is None else then.cpu, seconds),
            memory_bytes=None if found is None else found.memory.working_set_bytes,
            limit_bytes=None if found is None else found.memory.limit_bytes,
            pids=None if found is None else found.pid_count,
            disk_bytes_per_s=disk,
        )
