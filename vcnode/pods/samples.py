"""Samples of all pods for metrics. Without scrapes nothing is read, and no guest is woken for a scrape.

A scrape reads what the host's kernel counts of each VM, which costs a VM nothing. Where memory goes is looked
at more rarely (`MEMORY_EVERY_S`): the kernel walks all of a VM's pages for that. What guests say of their
containers is asked for in the background, if the settings want it at all (``stats.guest_interval_s``): the
scrape shows the last answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vcnode.errors import VcnodeError
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.models.stats import ContainerStats, GuestStats, VmStats
from vcnode.pod_metrics import PodSample
from vcnode.pods.flights import Flights
from vcnode.pods.live import LivePod
from vcnode.pods.parts import Parts
from vcnode.pods.stats import ask_guest, measure_vm

log = logging.getLogger(__name__)

FRESH_S = 1.0
"""Samples so young are given again: several who scrape cost as much as one."""
MEMORY_EVERY_S = 60.0
"""Seconds between two looks at where the memory of a VM goes."""
REFRESH_LIMIT_S = 5.0
"""Most that a scrape waits for; what is not read by then is as it was before."""
GUEST_LIMIT_S = 5.0
"""Seconds for a guest to answer; the others wait for it."""


@dataclass(slots=True)
class _Known:
    """What was read of one life of a pod."""

    vm_id: str
    vm: VmStats | None = None
    overhead_bytes: int | None = None
    memory_at: float | None = None
    guest: GuestStats | None = None
    containers: tuple[ContainerStats, ...] = ()
    guest_at: float | None = None


class PodSamples:
    """The last samples of the pods that run.

    Args:
        parts: The pods and their drivers.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._known: dict[str, _Known] = {}
        self._read_at: float | None = None
        self._flights: Flights[None] = Flights(parts.tasks)
        self._asking: asyncio.Task[None] | None = None

    def latest(self) -> Sequence[PodSample]:
        """What is known of each pod."""
        records = ((pod_id, self._parts.ledger.find(pod_id)) for pod_id in self._known)
        return [_sample(record, self._known[pod_id]) for pod_id, record in records if record is not None]

    async def refresh(self) -> None:
        """Read again what is older than `FRESH_S`; never raises, and takes `REFRESH_LIMIT_S` at most."""
        if not self._parts.settings.stats.pod_series:
            return
        now = asyncio.get_running_loop().time()
        if self._read_at is None or now - self._read_at >= FRESH_S:
            try:
                async with asyncio.timeout(REFRESH_LIMIT_S):
                    await self._flights.join("host", self._read_all)
            except TimeoutError:
                log.warning("Reading what pods use takes longer than %g s", REFRESH_LIMIT_S)
        every = self._parts.settings.stats.guest_interval_s
        if every and (self._asking is None or self._asking.done()):
            self._asking = self._parts.tasks.spawn(self._ask_all(every), name="stats of guests")

    def _pods(self) -> Iterator[tuple[PodRecord, LivePod, _Known]]:
        """Those that run now; forgets what is known of others, and of earlier lives."""
        running = {
            pod_id: (record, live)
            for pod_id, live in self._parts.live.items()
            if (record := self._parts.ledger.find(pod_id)) is not None
            and record.state in (PodState.RUNNING, PodState.PAUSED)
            and not (live.ending or live.gone.is_set())
        }
        for pod_id in list(self._known):
            if pod_id not in running:
                del self._known[pod_id]
        for pod_id, (record, live) in running.items():
            vm_id = live.vm.record.vm_id
            known = self._known.get(pod_id)
            if known is None or known.vm_id != vm_id:
                known = self._known[pod_id] = _Known(vm_id)
            yield record, live, known

    async def _read_all(self) -> None:
        loop = asyncio.get_running_loop()
        for record, live, known in list(self._pods()):
            look = known.memory_at is None or loop.time() - known.memory_at >= MEMORY_EVERY_S
            try:
                known.vm = await measure_vm(self._parts, record, live, memory=look)
            except VcnodeError as exc:
                log.debug("Pod %s: what it uses cannot be read", record.pod_id, exc_info=exc)
                continue
            if look and known.vm is not None:
                known.memory_at, known.overhead_bytes = loop.time(), known.vm.overhead_bytes
        self._read_at = loop.time()

    async def _ask_all(self, every_s: float) -> None:
        loop = asyncio.get_running_loop()
        for record, live, known in list(self._pods()):
            if live.paused or (known.guest_at is not None and loop.time() - known.guest_at < every_s):
                continue
            try:
                known.guest, known.containers = await ask_guest(
                    self._parts, record, live, timeout_s=GUEST_LIMIT_S
                )
            except VcnodeError as exc:
                log.debug("Pod %s: its guest does not tell what it uses", record.pod_id, exc_info=exc)
            known.guest_at = loop.time()  # also after a failure: the next interval is soon enough


def _sample(record: PodRecord, known: _Known) -> PodSample:
    values: dict[str, float] = {"size_bytes": record.spec.resources.mem_size_mib << 20}
    if (vm := known.vm) is not None:
        values |= {
            "cpu_seconds": vm.cpu.usage_us / 1e6,
            "resident_bytes": vm.resident_bytes,
            "disk_read": vm.read_bytes,
            "disk_written": vm.written_bytes,
        }
        if vm.interfaces:
            names = ("bytes", "packets", "dropped")
            for name in (f"{way}_{what}" for way in ("received", "sent") for what in names):
                values[name] = sum(getattr(each, name) for each in vm.interfaces)
    if known.overhead_bytes is not None:
        values["overhead_bytes"] = known.overhead_bytes
    if known.guest is not None:
        values["available_bytes"] = known.guest.mem_available_bytes
    return PodSample(
        record.pod_id, values, {each.container_id: _container(each) for each in known.containers}
    )


def _container(found: ContainerStats) -> dict[str, float]:
    values: dict[str, float] = {
        "cpu_seconds": found.cpu.usage_us / 1e6,
        "working_set_bytes": found.memory.working_set_bytes,
        "pids": found.pid_count,
    }
    if found.block is not None:
        values |= {"disk_read": found.block.read_bytes, "disk_written": found.block.written_bytes}
    return values
