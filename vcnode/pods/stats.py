"""``pod.stats``: what pods use. Nothing is measured that nobody asks for.

Who follows asks again and again (`PodStatsOf.after`), so the node keeps nothing for a client that is gone,
and all who ask at once share one sample: however many look, a guest is woken once.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import cast

from vcnode.drivers.base import Measurable
from vcnode.errors import UnavailableError, UnsupportedError
from vcnode.models.call import Call
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.models.stats import ContainerStats, GuestStats, PodStats, PodStatsOf, VmStats
from vcnode.pods.flights import Flights
from vcnode.pods.ledger import check_revision
from vcnode.pods.lifecycle import require
from vcnode.pods.live import LivePod, require_live
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.statuses import container_id

CAPABILITY = "stats"
_MEASURED = frozenset({PodState.RUNNING, PodState.PAUSED})


class StatsCommands:
    """Carries out ``pod.stats``.

    Args:
        parts: The pods and their drivers.
        node_name: In replies.
    """

    def __init__(self, parts: Parts, node_name: str) -> None:
        self._parts = parts
        self._node_name = node_name
        self._flights: Flights[PodStats] = Flights(parts.tasks)
        self._last: dict[tuple[str, bool], PodStats] = {}
        """The last sample of those who follow, by pod and whether the guest was asked."""
        self._followers: dict[tuple[str, bool], int] = {}
        self._bells: set[asyncio.Event] = set()
        self._stopping = False

    async def read(self, request: PodStatsOf, call: Call) -> PodStats:
        """A sample of a pod that runs or is paused; of a paused one without its guest. Does not hold the pod.

        Raises:
            NotFoundError: There is no such pod (any more).
            FailedPreconditionError: It does not run (any more).
            UnsupportedError: Its agent's driver, or the agent itself, cannot tell; ask without ``guest``.
            UnavailableError: The node stops.
        """
        pod_id, key = request.pod_id, (request.pod_id, request.guest)
        check_revision(self._require(pod_id, call.verb), call)
        if request.after is None:
            return await self._sample(pod_id, request.guest, call.verb)
        due = request.after + timedelta(seconds=request.interval_s)
        self._followers[key] = self._followers.get(key, 0) + 1
        try:
            await self._wait(pod_id, min(request.interval_s, self._seconds_to(due)), call.verb)
            last = self._last.get(key)
            if last is None or last.time < due:
                last = self._last[key] = await self._sample(pod_id, request.guest, call.verb)
            return last
        finally:
            self._followers[key] -= 1
            if not self._followers[key]:
                del self._followers[key]
                self._last.pop(key, None)

    def end_waits(self) -> None:
        """Answer all who follow: the node stops."""
        self._stopping = True
        for bell in self._bells:
            bell.set()

    def _seconds_to(self, due: datetime) -> float:
        return max(0.0, (due - self._parts.clock()).total_seconds())

    async def _wait(self, pod_id: str, seconds: float, verb: str) -> None:
        """Let time pass, as long as the pod runs and the node does not stop."""
        bell = asyncio.Event()
        self._bells.add(bell)
        try:
            with self._parts.ledger.listening(pod_id, bell.set):
                async with asyncio.timeout(seconds):
                    while True:
                        bell.clear()
                        self._require(pod_id, verb)
                        await bell.wait()
        except TimeoutError:
            self._require(pod_id, verb)
        finally:
            self._bells.discard(bell)

    def _require(self, pod_id: str, verb: str) -> PodRecord:
        if self._stopping:
            raise UnavailableError("The node is stopping; ask again when it is back.")
        record = self._parts.ledger.get(pod_id)
        require(f"Pod {pod_id}", record.state, _MEASURED, verb)
        return record

    async def _sample(self, pod_id: str, guest: bool, verb: str) -> PodStats:
        return await self._flights.join(
            f"{pod_id} {'with' if guest else 'without'} guest", lambda: self._measure(pod_id, guest, verb)
        )

    async def _measure(self, pod_id: str, guest: bool, verb: str) -> PodStats:
        record = self._require(pod_id, verb)
        live = require_live(self._parts.live, pod_id, record.state, verb)
        told: GuestStats | None = None
        containers: tuple[ContainerStats, ...] = ()
        if guest and not live.paused:
            told, containers = await ask_guest(self._parts, record, live)
        vm = await measure_vm(self._parts, record, live, memory=True)
        return PodStats(
            pod_id=pod_id,
            node=self._node_name,
            mock=self._parts.hypervisor(record).info.mock,
            time=self._parts.clock(),
            vm=vm,
            guest=told,
            containers=containers,
        )


async def ask_guest(
    parts: Parts, record: PodRecord, live: LivePod, *, timeout_s: float = REQUEST_LIMIT_S
) -> tuple[GuestStats, tuple[ContainerStats, ...]]:
    """What a guest says of itself and of the containers that the pod has.

    Raises:
        UnsupportedError: The agent's driver, or the agent itself, cannot tell.
        AgentError: The guest cannot be reached, or does not answer.
    """
    if CAPABILITY not in parts.agent(record).info.capabilities:
        raise UnsupportedError(
            f"The agent type {record.agent_type.value} of pod {record.pod_id} cannot tell what its guest "
            "uses; ask without it (guest: false).",
            pod_id=record.pod_id,
        )
    told, found = await live.require_session().read_stats(timeout_s=timeout_s)
    by_id = {entry.container_id: entry for entry in found}
    known = (container_id(container) for container in record.containers)
    return told, tuple(by_id[cid] for cid in known if cid in by_id)


async def measure_vm(parts: Parts, record: PodRecord, live: LivePod, *, memory: bool) -> VmStats | None:
    """What a pod's VM takes of the host; None when its driver does not tell. See `Measurable.read_stats`."""
    if CAPABILITY not in parts.hypervisor(record).info.capabilities:
        return None
    # A VM in the node's own namespace has no interface there that is its own.
    network = record.network
    interfaces = {
        endpoint.net_pair.virt_iface.name: endpoint.name
        for endpoint in (() if network is None or network.netns_path is None else network.endpoints)
        if endpoint.net_pair is not None
    }
    return await cast(Measurable, live.vm).read_stats(
        mem_size_mib=record.spec.resources.mem_size_mib,
        interfaces=interfaces,
        memory=memory,
        timeout_s=REQUEST_LIMIT_S,
    )
