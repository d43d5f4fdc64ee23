"""Services that do nothing but remember, wait and fail, as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from vcnode.aio import Tasks
from vcnode.errors import VcnodeError
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.services import NodeService, Services
from vcnode.models.base import Blob, Request
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
from vcnode.models.node import ImageStatus, NodeAudit, PoolStatus
from vcnode.models.pod import (
    AgentType,
    ContainerResources,
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    ExecResult,
    Output,
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
    SessionSubjects,
)
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.models.volumes import Volume
from vcnode.pods.stored import Stored
from vcnode.settings import Settings

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)


def pod_status(pod_id: str = "p1", **changes: Any) -> PodStatus:
    given: dict[str, Any] = {
        "pod_id": pod_id,
        "node": "n1",
        "state": PodState.READY,
        "revision": 1,
        "created_at": NOW,
        "hostname": pod_id,
        "resources": PodSpec().resources,
        "agent_type": AgentType.MOCK,
        "network_model": NetworkModel.NOOP,
        "mock": True,
    }
    return PodStatus(**(given | changes))


def container_status(pod_id: str = "p1", container_id: str = "c1") -> ContainerStatus:
    return ContainerStatus(
        pod_id=pod_id, container_id=container_id, state=ContainerState.READY, created_at=NOW
    )


def image_status(name: str = "busybox") -> ImageStatus:
    return ImageStatus(name=name, digest="sha256:" + "0" * 64, size_bytes=1, imported_at=NOW)


class Gate:
    """Where commands wait: they say that they have arrived, and go on once it is opened."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.waiting = 0
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def pass_through(self) -> None:
        self.waiting += 1
        self.arrived.set()
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1


class FakePods:
    """Notes every call; ``gates`` make a method wait, ``errors`` make it fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.last_call: Call | None = None
        self.gates: dict[str, Gate] = {}
        self.errors: dict[str, BaseException] = {}
        self.undone: list[str] = []
        self.denied: VcnodeError | None = None
        self.pods: list[PodStatus] = []

    async def _note(self, method: str, call: Call, *arguments: Any) -> None:
        self.calls.append((method, arguments))
        self.last_call = call
        try:
            if method in self.gates:
                await self.gates[method].pass_through()
        except asyncio.CancelledError:
            self.undone.append(method)
            raise
        if method in self.errors:
            raise self.errors[method]

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    @property
    def public_keys(self) -> tuple[str, ...]:
        return ()

    def permit(self, request: Request) -> None:
        if self.denied is not None:
            raise self.denied

    async def create(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus:
        await self._note("create", call, spec)
        return pod_status(spec.id or "made")

    async def start(self, pod_id: str, call: Call) -> PodStatus:
        await self._note("start", call, pod_id)
        return pod_status(pod_id, state=PodState.RUNNING)

    async def run(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus:
        await self._note("run", call, spec)
        return pod_status(spec.id or "made", state=PodState.RUNNING)

    async def stop(self, pod_id: str, grace_s: float | None, call: Call) -> PodStopped:
        await self._note("stop", call, pod_id, grace_s)
        return PodStopped(pod=pod_status(pod_id, state=PodState.STOPPED), outcome="graceful")

    async def pause(self, pod_id: str, call: Call) -> PodStatus:
        await self._note("pause", call, pod_id)
        return pod_status(pod_id, state=PodState.PAUSED)

    async def resume(self, pod_id: str, call: Call) -> PodStatus:
        await self._note("resume", call, pod_id)
        return pod_status(pod_id, state=PodState.RUNNING)

    async def resize(self, pod_id: str, mem_size_mib: int, call: Call) -> PodStatus:
        await self._note("resize", call, pod_id, mem_size_mib)
        return pod_status(pod_id, state=PodState.RUNNING)

    async def delete(self, pod_id: str, force: bool, call: Call) -> PodDeleted:
        await self._note("delete", call, pod_id, force)
        return PodDeleted(pod_id=pod_id, existed=True)

    async def attach_volume(self, pod_id: str, volume: Volume, call: Call) -> PodStatus:
        await self._note("attach_volume", call, pod_id, volume)
        return pod_status(pod_id)

    async def detach_volume(self, pod_id: str, mount_tag: str, call: Call) -> PodStatus:
        await self._note("detach_volume", call, pod_id, mount_tag)
        return pod_status(pod_id)

    def list(
        self,
        labels: Mapping[str, str],
        states: Sequence[PodState],
        annotations: Mapping[str, str] = MappingProxyType({}),
    ) -> PodStatuses:
        self.calls.append(("list", (labels, states)))
        return PodStatuses(pods=tuple(self.pods))

    def status(self, pod_id: str) -> PodStatus:
        self.calls.append(("status", (pod_id,)))
        if "status" in self.errors:
            raise self.errors["status"]
        return pod_status(pod_id)

    async def console(self, pod_id: str, max_bytes: int, call: Call) -> ConsoleText:
        self.calls.append(("console", (pod_id, max_bytes)))
        return ConsoleText(pod_id=pod_id, text="booted")

    async def exec(
        self, pod_id: str, container_id: str | None, options: ExecOptions, call: Call
    ) -> ExecResult:
        await self._note("exec", call, pod_id, container_id, options)
        raw = options.stdin.raw
        output = Output(**Blob.of(raw).model_dump(), total_bytes=len(raw))
        return ExecResult(exit_code=0, stdout=output, duration_ms=1.0)

    async def create_container(self, pod_id: str, spec: ContainerSpec, call: Call) -> ContainerStatus:
        await self._note("create_container", call, pod_id, spec)
        return container_status(pod_id, spec.id or "made")

    async def start_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        await self._note("start_container", call, pod_id, container_id)
        return container_status(pod_id, container_id)

    async def stop_container(
        self, pod_id: str, container_id: str, grace_s: float | None, call: Call
    ) -> ContainerStatus:
        await self._note("stop_container", call, pod_id, container_id, grace_s)
        return container_status(pod_id, container_id)

    async def kill_container(
        self, pod_id: str, container_id: str, signal: int, everyone: bool, call: Call
    ) -> ContainerStatus:
        await self._note("kill_container", call, pod_id, container_id, signal, everyone)
        return container_status(pod_id, container_id)

    async def delete_container(
        self, pod_id: str, container_id: str, force: bool, call: Call
    ) -> ContainerDeleted:
        await self._note("delete_container", call, pod_id, container_id, force)
        return ContainerDeleted(pod_id=pod_id, container_id=container_id, existed=True)

    async def pause_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        await self._note("pause_container", call, pod_id, container_id)
        return container_status(pod_id, container_id)

    async def resume_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        await self._note("resume_container", call, pod_id, container_id)
        return container_status(pod_id, container_id)

    async def update_container(
        self, pod_id: str, container_id: str, changes: ContainerResources, call: Call
    ) -> ContainerStatus:
        await self._note("update_container", call, pod_id, container_id, changes)
        return container_status(pod_id, container_id)

    async def wait_container(
        self, pod_id: str, container_id: str, condition: WaitCondition
    ) -> ContainerWaited:
        return ContainerWaited(pod_id=pod_id, container_id=container_id, condition=condition)

    async def container_logs(self, request: ContainerLogs) -> ContainerLogEntries:
        return ContainerLogEntries(
            pod_id=request.pod_id,
            container_id=request.container_id or "c1",
            entries=(),
            cursor="0",
            more=False,
            ended=True,
        )

    async def processes(self, pod_id: str, container_id: str, limit: int, call: Call) -> ContainerProcesses:
        await self._note("processes", call, pod_id, container_id, limit)
        return ContainerProcesses(pod_id=pod_id, container_id=container_id, processes=(), total=0)

    async def stats(self, request: PodStatsOf, call: Call) -> PodStats:
        await self._note("stats", call, request)
        return PodStats(pod_id=request.pod_id, node="n1", time=NOW)

    def list_containers(
        self,
        pod_id: str | None,
        states: Sequence[ContainerState],
        labels: Mapping[str, str],
        annotations: Mapping[str, str],
    ) -> ContainerStatuses:
        self.calls.append(("list_containers", (pod_id, states)))
        return ContainerStatuses(containers=())

    def container_status(self, pod_id: str, container_id: str) -> ContainerStatus:
        self.calls.append(("container_status", (pod_id, container_id)))
        return container_status(pod_id, container_id)

    def pool_statuses(self) -> tuple[PoolStatus, ...]:
        return ()

    async def audit(self, *, repair: bool) -> NodeAudit:
        self.calls.append(("audit", (repair,)))
        return NodeAudit(node="n1", time=NOW, holdings=(), orphan_count=0, freed_count=0, problems=())


class FakeImages:
    """One image, whatever its name."""

    async def import_(self, name: str, path: str, call: Call) -> ImageStatus:
        return image_status(name)

    async def pull(self, request: ImagePull, call: Call) -> ImageStatus:
        return image_status(request.name or request.reference)

    def list(self) -> ImageStatuses:
        return ImageStatuses(images=(image_status(),))

    def status(self, name: str) -> ImageStatus:
        return image_status(name)

    async def remove(self, name: str, call: Call) -> ImageRemoved:
        return ImageRemoved(name=name, existed=True)


def session() -> Session:
    subjects = SessionSubjects(stdin="i", stdout="o", stderr="e", control="c")
    return Session(
        session_id="0" * 32,
        kind="exec",
        pod_id="p1",
        epoch=1,
        window_bytes=1,
        chunk_bytes=1,
        lost_after_s=1,
        subjects=subjects,
        streams=(),
    )


class FakeStreams:
    """One session, whatever its name."""

    async def exec(self, request: SessionExec, call: Call) -> Session:
        return session()

    async def attach(self, request: ContainerAttach, call: Call) -> Session:
        return session()

    async def copy_in(self, request: ContainerCopyIn, call: Call) -> Session:
        return session()

    async def copy_out(self, request: ContainerCopyOut, call: Call) -> Session:
        return session()

    async def forward(self, request: PodForward, call: Call) -> Session:
        return session()

    def resume(self, session_id: str) -> Session:
        return session()

    def list(self, pod_id: str | None) -> Sessions:
        return Sessions(sessions=())

    def close(self, session_id: str) -> SessionClosed:
        return SessionClosed(existed=False)


class MemoryJournal:
    """A journal without a disk; ``begin_gate`` makes it slow, ``error`` makes its last word fail."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[str, str]] = {}
        self.stored: dict[str, Stored] = {}
        self.begin_gate: Gate | None = None
        self.error: Exception | None = None

    async def begin(self, command_id: str, verb: str, digest: str, audit: Any = None) -> Stored | None:
        if self.begin_gate is not None:
            await self.begin_gate.pass_through()
        if command_id in self.stored:
            return self.stored[command_id]
        self.begun[command_id] = (verb, digest)
        return None

    async def finish(self, command_id: str, stored: Stored) -> None:
        if self.error is not None:
            raise self.error
        self.stored[command_id] = stored

    async def forget(self, command_id: str) -> None:
        if self.error is not None:
            raise self.error
        if command_id not in self.stored:
            self.begun.pop(command_id, None)


class Counter:
    """Notes how commands ended."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.traces: list[str | None] = []

    def command_done(self, verb: str, code: str, seconds: float, traceparent: str | None = None) -> None:
        self.done.append((verb, code))
        self.traces.append(traceparent)


class FakeFleet:
    """A node that has a standing and bids for nothing."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.stopped = False

    def standing(self) -> NodeStanding:
        return NodeStanding(node=self.node, state="draining" if self.stopped else "ready", labels={})

    def stop(self) -> None:
        self.stopped = True

    def release(self, reservation_id: str) -> PodReleased:
        return PodReleased(existed=False)

    async def label(self, request: NodeLabel) -> NodeStanding:
        return self.standing()

    async def cordon(self, reason: str) -> NodeStanding:
        return self.standing()

    async def uncordon(self) -> NodeStanding:
        return self.standing()

    async def drain(self, *, timeout_s: float, delete: bool, reason: str, call: Call) -> DrainReport:
        return DrainReport(node=self.node)

    def bid(self, request: PodBid) -> Bid:
        return Bid(node=self.node, epoch=3, able=False)


class World:
    """A dispatcher with everything around it."""

    def __init__(
        self,
        *,
        journal: Any = None,
        tasks: Tasks | None = None,
        max_concurrent: int = 8,
        max_request_bytes: int = 64 * 1024,
        node_name: str = "n1",
        clock: Callable[[], datetime] = lambda: NOW,
        **options: Any,
    ) -> None:
        self.pods = FakePods()
        self.journal = MemoryJournal() if journal is None else journal
        self.counter = Counter()
        self.fleet = FakeFleet(node_name)
        self.node = NodeService(
            epoch=3,
            settings=Settings(node_name=node_name),
            hypervisors={},
            agents={},
            networks={},
            pods=self.pods,
            fleet=self.fleet,
            clock=clock,
        )
        self.dispatcher = Dispatcher(
            Services(
                pods=self.pods,
                images=FakeImages(),
                node=self.node,
                fleet=self.fleet,
                streams=FakeStreams(),
                sessions=FakeStreams(),
            ),
            self.journal,
            max_concurrent=max_concurrent,
            max_request_bytes=max_request_bytes,
            observer=self.counter,
            clock=clock,
            tasks=Tasks() if tasks is None else tasks,
            **options,
        )
