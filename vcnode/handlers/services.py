"""What the handlers work with: the pods, the images, and the node itself."""

# ruff: noqa: D102 -- the methods of the two big Protocols are described where they are implemented
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import vcnode
from vcnode.drivers.base import GuestAgent, Hypervisor, Network
from vcnode.models.base import Request
from vcnode.models.call import Call
from vcnode.models.commands import (
    ContainerDeleted,
    ContainerStatuses,
    ExecOptions,
    ImagePull,
    ImageRemoved,
    ImageStatuses,
    PodDeleted,
    PodStatuses,
    PodStopped,
)
from vcnode.models.console import ConsoleText
from vcnode.models.fleet import Bid, DrainReport, NodeLabel, NodeStanding, PodBid, PodReleased
from vcnode.models.living import ContainerProcesses, ContainerWaited, WaitCondition
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.network import NetworkModel
from vcnode.models.node import DriverInfo, ImageStatus, NodeAudit, NodeInfo, NodePing, PoolStatus
from vcnode.models.pod import (
    AgentType,
    ContainerResources,
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    ExecResult,
    HypervisorType,
    PodSpec,
    PodState,
    PodStatus,
)
from vcnode.models.sessions import (
    ContainerAttach,
    ContainerCopyIn,
    ContainerCopyOut,
    PodForward,
    Session,
    SessionClosed,
    SessionExec,
    Sessions,
)
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.models.volumes import Volume
from vcnode.settings import Settings


class Pods(Protocol):
    """What the handlers need of `vcnode.pods.service.PodService`, where each method is described."""

    @property
    def public_keys(self) -> tuple[str, ...]: ...
    def permit(self, request: Request) -> None: ...
    async def create(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus: ...
    async def start(self, pod_id: str, call: Call) -> PodStatus: ...
    async def run(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus: ...
    async def stop(self, pod_id: str, grace_s: float | None, call: Call) -> PodStopped: ...
    async def pause(self, pod_id: str, call: Call) -> PodStatus: ...
    async def resume(self, pod_id: str, call: Call) -> PodStatus: ...
    async def resize(self, pod_id: str, mem_size_mib: int, call: Call) -> PodStatus: ...
    async def attach_volume(self, pod_id: str, volume: Volume, call: Call) -> PodStatus: ...
    async def detach_volume(self, pod_id: str, mount_tag: str, call: Call) -> PodStatus: ...
    async def delete(self, pod_id: str, force: bool, call: Call) -> PodDeleted: ...
    def list(
        self,
        labels: Mapping[str, str],
        states: Sequence[PodState],
        annotations: Mapping[str, str] = ...,
    ) -> PodStatuses: ...
    def status(self, pod_id: str) -> PodStatus: ...
    async def console(self, pod_id: str, max_bytes: int, call: Call) -> ConsoleText: ...
    async def exec(
        self, pod_id: str, container_id: str | None, options: ExecOptions, call: Call
    ) -> ExecResult: ...
    async def create_container(self, pod_id: str, spec: ContainerSpec, call: Call) -> ContainerStatus: ...
    async def start_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus: ...
    async def stop_container(
        self, pod_id: str, container_id: str, grace_s: float | None, call: Call
    ) -> ContainerStatus: ...
    async def kill_container(
        self, pod_id: str, container_id: str, signal: int, everyone: bool, call: Call
    ) -> ContainerStatus: ...
    async def delete_container(
        self, pod_id: str, container_id: str, force: bool, call: Call
    ) -> ContainerDeleted: ...
    async def pause_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus: ...
    async def resume_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus: ...
    async def update_container(
        self, pod_id: str, container_id: str, changes: ContainerResources, call: Call
    ) -> ContainerStatus: ...
    async def container_logs(self, request: ContainerLogs) -> ContainerLogEntries: ...
    async def wait_container(
        self, pod_id: str, container_id: str, condition: WaitCondition
    ) -> ContainerWaited: ...
    async def processes(
        self, pod_id: str, container_id: str, limit: int, call: Call
    ) -> ContainerProcesses: ...
    async def stats(self, request: PodStatsOf, call: Call) -> PodStats: ...
    def list_containers(
        self,
        pod_id: str | None,
        states: Sequence[ContainerState],
        labels: Mapping[str, str],
        annotations: Mapping[str, str],
    ) -> ContainerStatuses: ...
    def container_status(self, pod_id: str, container_id: str) -> ContainerStatus: ...
    async def audit(self, *, repair: bool) -> NodeAudit: ...
    def pool_statuses(self) -> tuple[PoolStatus, ...]: ...


class Images(Protocol):
    """What the handlers need of `vcnode.pods.images.ImageService`, where each method is described."""

    async def import_(self, name: str, path: str, call: Call) -> ImageStatus: ...
    async def pull(self, request: ImagePull, call: Call) -> ImageStatus: ...
    def list(self) -> ImageStatuses: ...
    def status(self, name: str) -> ImageStatus: ...
    async def remove(self, name: str, call: Call) -> ImageRemoved: ...


class StreamOpener(Protocol):
    """What the handlers need of `vcnode.pods.streaming.StreamCommands`, where each method is described."""

    async def exec(self, request: SessionExec, call: Call) -> Session: ...
    async def attach(self, request: ContainerAttach, call: Call) -> Session: ...
    async def copy_in(self, request: ContainerCopyIn, call: Call) -> Session: ...
    async def copy_out(self, request: ContainerCopyOut, call: Call) -> Session: ...
    async def forward(self, request: PodForward, call: Call) -> Session: ...


class SessionKeeper(Protocol):
    """What the handlers need of `vcnode.pods.sessions.SessionRegistry`, where each method is described."""

    def resume(self, session_id: str) -> Session: ...
    def list(self, pod_id: str | None) -> Sessions: ...
    def close(self, session_id: str) -> SessionClosed: ...


class Fleet(Protocol):
    """What the handlers need of `vcnode.pods.fleet.FleetService`, where each method is described."""

    def bid(self, request: PodBid) -> Bid: ...
    def release(self, reservation_id: str) -> PodReleased: ...
    async def label(self, request: NodeLabel) -> NodeStanding: ...
    async def cordon(self, reason: str) -> NodeStanding: ...
    async def uncordon(self) -> NodeStanding: ...
    async def drain(self, *, timeout_s: float, delete: bool, reason: str, call: Call) -> DrainReport: ...
    def standing(self) -> NodeStanding: ...
    def stop(self) -> None: ...


class NodeService:
    """The node as it reports itself.

    Args:
        epoch: Grows with each start of the node agent.
        settings: The node's settings.
        hypervisors: Drivers on offer.
        agents: Drivers on offer.
        networks: Drivers on offer.
        pods: For counting.
        fleet: For labels and state.
        clock: The time of day, with zone.
    """

    def __init__(
        self,
        *,
        epoch: int,
        settings: Settings,
        hypervisors: Mapping[HypervisorType, Hypervisor],
        agents: Mapping[AgentType, GuestAgent],
        networks: Mapping[NetworkModel, Network],
        pods: Pods,
        fleet: Fleet,
        clock: Callable[[], datetime],
    ) -> None:
        self._epoch = epoch
        self._settings = settings
        self._hypervisors = hypervisors
        self._agents = agents
        self._networks = networks
        self._pods = pods
        self._fleet = fleet
        self._clock = clock
        self._started_at = clock()
        self._draining = False

    @property
    def mock(self) -> bool:
        """Whether pods that name no hypervisor get one that only pretends."""
        return self._settings.hypervisor is HypervisorType.MOCK

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    def drain(self) -> None:
        """Report ``draining`` from now on."""
        self._draining = True
        self._fleet.stop()

    def ping(self) -> NodePing:
        """A sign of life."""
        return NodePing(
            node=self._settings.node_name,
            epoch=self._epoch,
            version=vcnode.__version__,
            time=self._clock(),
            mock=self.mock,
        )

    def info(self) -> NodeInfo:
        """What the node is and has."""
        settings = self._settings
        pods = self._pods.list({}, ()).pods
        default = self._hypervisors.get(settings.hypervisor)
        total_mib, available_mib = memory_mib()
        standing = self._fleet.standing()
        return NodeInfo(
            node=settings.node_name,
            epoch=self._epoch,
            version=vcnode.__version__,
            started_at=self._started_at,
            state=standing.state,
            reason=standing.reason,
            labels=standing.labels,
            taints=standing.taints,
            mock=self.mock,
            accelerator=None if default is None else default.accelerator,
            default_hypervisor=settings.hypervisor,
            default_agent=settings.agent_type,
            default_network=settings.network,
            hypervisors=_infos(self._hypervisors),
            agents=_infos(self._agents),
            networks=_infos(self._networks),
            pod_count=len(pods),
            running_pod_count=sum(pod.state is PodState.RUNNING for pod in pods),
            cpu_count=len(os.sched_getaffinity(0)),
            mem_total_mib=total_mib,
            mem_available_mib=available_mib,
            allowed_roots=tuple(str(root) for root in settings.allowed_roots),
            xkeys=self._pods.public_keys,
            pool=self._pods.pool_statuses(),
        )


class _Driver(Protocol):
    @property
    def info(self) -> DriverInfo: ...


def _infos(
    drivers: Mapping[AgentType, _Driver] | Mapping[HypervisorType, _Driver] | Mapping[NetworkModel, _Driver],
) -> tuple[DriverInfo, ...]:
    return tuple(driver.info for _, driver in sorted(drivers.items()))


def memory_mib(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Total and available memory of the host in MiB (``MemTotal``, ``MemAvailable``); 0 when unknown.

    Source: Linux Documentation/filesystems/proc.rst, meminfo (values are in KiB).
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)

    def mib(name: str) -> int:
        return int(fields.get(name, "0").split()[0]) // 1024

    return mib("MemTotal"), mib("MemAvailable")


@dataclass(frozen=True, slots=True)
class Services:
    """What every handler is given."""

    pods: Pods
    images: Images
    node: NodeService
    streams: StreamOpener
    sessions: SessionKeeper
    fleet: Fleet
