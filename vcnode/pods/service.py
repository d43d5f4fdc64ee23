"""The pod service: one method per command."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from datetime import datetime
from types import MappingProxyType

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.drivers.base import GuestAgent, Hypervisor, Network, Storage
from vcnode.drivers.logfiles import LogFiles, Rotation
from vcnode.errors import (
    AlreadyExistsError,
    CleanupError,
    FailedPreconditionError,
    NotFoundError,
    VcnodeError,
)
from vcnode.logs import about
from vcnode.models.base import Request
from vcnode.models.call import Call
from vcnode.models.commands import (
    ContainerDeleted,
    ContainerStatuses,
    ExecOptions,
    PodDeleted,
    PodStatuses,
    PodStopped,
)
from vcnode.models.console import ConsoleText
from vcnode.models.events import EventKind
from vcnode.models.living import ContainerProcesses, ContainerWaited, WaitCondition
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.network import NetworkModel
from vcnode.models.node import Amount, NodeAudit, PoolStatus
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
from vcnode.models.records import PodRecord
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.models.subjects import Subjects
from vcnode.models.volumes import Volume
from vcnode.models.xkeys import CurveKey
from vcnode.pods import host, policy
from vcnode.pods.admission import Admission, agent_type_of, new_id
from vcnode.pods.attaching import Attaching
from vcnode.pods.audit import Auditor
from vcnode.pods.capacity import Capacity
from vcnode.pods.commands import ContainerCommands
from vcnode.pods.contact import Contact
from vcnode.pods.containers import Containers
from vcnode.pods.disconnect import Disconnects
from vcnode.pods.forecast import Kind
from vcnode.pods.images import ImageService
from vcnode.pods.ledger import Ledger
from vcnode.pods.life import LifeCommands
from vcnode.pods.lifecycle import POD_DELETABLE, POD_HAS_VM, require
from vcnode.pods.live import require_live
from vcnode.pods.locks import BACKGROUND, PodLocks
from vcnode.pods.logs import LogPump
from vcnode.pods.notes import Notes
from vcnode.pods.parts import REQUEST_LIMIT_S, Observer, Parts
from vcnode.pods.pause import Pauser
from vcnode.pods.pool import Pool
from vcnode.pods.queue import StartQueue
from vcnode.pods.recovery import Recovered, Recovery
from vcnode.pods.rehearsal import Rehearsal
from vcnode.pods.release import remove_pod_disks
from vcnode.pods.resizing import Resizing
from vcnode.pods.restarts import Restarter
from vcnode.pods.samples import PodSamples
from vcnode.pods.secrets import Secrets
from vcnode.pods.sessions import SessionRegistry
from vcnode.pods.start import Starter
from vcnode.pods.stats import StatsCommands
from vcnode.pods.stop import Stopper
from vcnode.pods.store import Store
from vcnode.pods.streaming import StreamCommands
from vcnode.pods.templates import Templates
from vcnode.pods.watch import Watcher
from vcnode.settings import Settings

log = logging.getLogger(__name__)

OVERTAKEN = frozenset({"pod.start", "pod.run"}) | BACKGROUND
"""Holders that stop and delete interrupt instead of being refused."""
CLOSE_LIMIT_S = 10.0
"""Seconds to let go of one VM when the node agent goes down."""


class PodService:
    """All that the node does with pods and their containers.

    One command holds a pod at a time: another gets `AbortedError`, except stop and delete, which interrupt
    a running start, wait until it is undone, and go on. Exec, kill and reads do not hold the pod.

    Args:
        node_name: In statuses.
        epoch: Of this process, in its events; as `Store.epoch`.
        store: The database, open.
        hypervisors: Drivers on offer, open.
        agents: Drivers on offer.
        networks: Drivers on offer.
        storage: Directories and images.
        images: Images by name.
        settings: Defaults and limits.
        tasks: Runs the watchers of pods; to be closed after this.
        metrics: Gets phases of starts and losses of sessions.
        clock: The current time, with its zone.
        sleep: Waits for restarts that are not due yet.
        memory: The host's memory.
        keys: Open sealed secrets; the node's own first.
        takes_pods: Raises when the node takes no new pods; see `Standing.check_takes_pods`.
        contact: When the fleet last heard of this node.
    """

    def __init__(
        self,
        *,
        node_name: str,
        epoch: int,
        store: Store,
        hypervisors: Mapping[HypervisorType, Hypervisor],
        agents: Mapping[AgentType, GuestAgent],
        networks: Mapping[NetworkModel, Network],
        storage: Storage,
        images: ImageService,
        settings: Settings,
        tasks: Spawner,
        metrics: Observer,
        clock: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        memory: Callable[[], host.HostMemory] = host.read_memory,
        takes_pods: Callable[[], None] = lambda: None,
        keys: Sequence[CurveKey] = (),
        contact: Contact | None = None,
    ) -> None:
        self.node_name = node_name
        self.epoch = epoch
        self._takes_pods = takes_pods
        self._mock = _is_mock(hypervisors, settings.hypervisor)
        self.capacity = Capacity(
            lambda: host.allocatable(self.host_capacity(), settings.capacity),
            overhead_mib=0 if self._mock else settings.capacity.vm_overhead_mib,
        )
        """What the node has for pods."""
        self._ledger = Ledger(
            store,
            clock=clock,
            is_mock=lambda record: _is_mock(hypervisors, record.hypervisor_type),
            capacity=self.capacity,
        )
        logs = LogFiles(
            settings.state_dir / "logs",
            Rotation(
                max_file_bytes=settings.logs.max_file_mib << 20,
                max_files=settings.logs.max_files,
                min_free_bytes=settings.logs.min_free_mib << 20,
            ),
        )
        self.logs = LogPump(logs, self._ledger, max_bytes_per_s=settings.logs.max_mib_per_s * (1 << 20))
        """What containers write."""
        self._parts = parts = Parts(
            ledger=self._ledger,
            locks=PodLocks(),
            hypervisors=hypervisors,
            agents=agents,
            networks=networks,
            storage=storage,
            images=images,
            settings=settings,
            tasks=tasks,
            observer=metrics,
            clock=clock,
            memory=memory,
            logs=self.logs,
            secrets=Secrets(keys, storage.read_secret),
            contact=contact or Contact(),
            starts=StartQueue(slots=settings.limits.concurrent_starts, places=settings.limits.queued_starts),
        )
        containers = Containers(parts)
        self._watcher = Watcher(parts, containers)
        self._admission = Admission(parts)
        rehearsal = Rehearsal(storage, clock)
        self.templates = Templates(
            hypervisors=hypervisors,
            agents=agents,
            networks=networks,
            storage=storage,
            settings=settings,
            rehearsal=rehearsal,
            tasks=tasks,
            observer=metrics,
        )
        """What pods start from."""
        self.pool = Pool(
            templates=self.templates,
            storage=storage,
            settings=settings,
            queue=parts.starts,
            rehearsal=rehearsal,
            tasks=tasks,
            memory=memory,
            observer=metrics,
        )
        """Spare VMs."""
        self._auditor = Auditor(parts, logs, lambda: self.templates.making | self.pool.vm_ids)
        self._notes = Notes(self._ledger, storage, settings, epoch=epoch, live=parts.live.keys())
        self._starter = Starter(parts, containers, self._watcher, self.templates, self.pool, self._notes)
        self._stopper = Stopper(parts, containers)
        self._pauser = Pauser(parts, self._watcher)
        self._life = LifeCommands(parts)
        self._stats = StatsCommands(parts, node_name)
        self.samples = PodSamples(parts)
        """What pods use, for metrics."""
        self._resizing = Resizing(parts)
        self._attaching = Attaching(parts, self._admission)
        self.sessions = SessionRegistry(
            node_name=node_name,
            subjects=Subjects(settings.nats.prefix),
            tasks=tasks,
            clock=clock,
            limit=settings.limits.sessions,
            window_bytes=settings.limits.session_window_bytes,
        )
        """Open sessions."""
        self.streams = StreamCommands(parts, self.sessions)
        """The commands that open sessions."""
        self._containers = ContainerCommands(parts, containers, self._watcher, self._admission)
        self._restarter = Restarter(parts, self._containers, self._starter, sleep)
        self.disconnects = Disconnects(parts, self._pauser, self._stopper)
        """What becomes of pods without NATS."""

    # ---- policy --------------------------------------------------------------------------------------

    def permit(self, request: Request) -> None:
        """Refuse what the node's policy forbids; each command that changes something comes by here first.

        Raises:
            PermissionDeniedError: Something in it is forbidden; names the rule.
        """
        policy.require(self.denials(request))

    def denials(self, request: Request) -> Sequence[policy.Denial]:
        """What of *request* the policy forbids."""
        known = policy.Known(self._parts.images.known, self._ledger.records)
        return policy.judge(request, self._parts.settings.policy, known)

    # ---- pods ----------------------------------------------------------------------------------------

    async def create(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus:
        """Prepare a pod; nothing is started. A *reservation* is used up when the pod is made.

        Idempotent: the same spec under the same id again is a success and gives the present status.

        Raises:
            AlreadyExistsError: The id is taken by a pod with another spec.
            InvalidArgumentError, NotFoundError, UnsupportedError, ResourceExhaustedError: The spec cannot
                work on this node (see `Admission.pod`), or there is no room for it.
            UnavailableError: The node is cordoned or draining.
            FailedPreconditionError: There is no such reservation (any more).
            AbortedError: Another command holds the pod.
        """
        spec = _with_id(spec)
        pod_id = _id_of(spec)
        with about(pod_id=pod_id):
            async with self._parts.locks.hold(pod_id, call.verb):
                return self._ledger.status(await self._create(spec, call, reservation))

    async def start(self, pod_id: str, call: Call) -> PodStatus:
        """Start a pod's VM and all its containers; see `Starter.start` for what a failure leaves."""
        began = asyncio.get_running_loop().time()
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._starter.start(pod_id, call, began=began))

    async def run(self, spec: PodSpec, call: Call, *, reservation: str | None = None) -> PodStatus:
        """Create and start a pod. A *reservation* is used up when the pod is made.

        The caller asked for one thing: when the start fails and is all undone, the pod is gone again. It is
        kept as ``failed`` when something could not be undone, and as ``stopped`` when pod.stop overtook the
        start (whoever sent that knows the pod).

        Raises:
            AlreadyExistsError: There is a pod of that id, unless it has the same spec and does not run:
                then it is started, and kept if that fails.
            VcnodeError: As `create` and `start`.
        """
        began = asyncio.get_running_loop().time()
        spec = _with_id(spec)
        pod_id = _id_of(spec)
        with about(pod_id=pod_id):
            return await self._run(spec, pod_id, call, reservation, began=began)

    async def stop(self, pod_id: str, grace_s: float | None, call: Call) -> PodStopped:
        """Stop a pod; see `Stopper.stop`. *grace_s* None: the node's setting."""
        async with self._parts.locks.hold(pod_id, call.verb, overtakes=OVERTAKEN):
            grace = self._parts.settings.stop_grace_s if grace_s is None else grace_s
            outcome = await self._stopper.stop(pod_id, call, grace_s=grace)
            return PodStopped(pod=self._ledger.status(self._ledger.get(pod_id)), outcome=outcome)

    async def pause(self, pod_id: str, call: Call) -> PodStatus:
        """Stop a pod's vCPUs; see `Pauser.pause`."""
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._pauser.pause(pod_id, call))

    async def resume(self, pod_id: str, call: Call) -> PodStatus:
        """Let a paused pod run again; see `Pauser.resume`."""
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._pauser.resume(pod_id, call))

    async def resize(self, pod_id: str, mem_size_mib: int, call: Call) -> PodStatus:
        """Change a running pod's memory; see `Resizing.resize`."""
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._resizing.resize(pod_id, mem_size_mib, call))

    async def attach_volume(self, pod_id: str, volume: Volume, call: Call) -> PodStatus:
        """Add a volume to a pod; see `Attaching.attach`."""
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._attaching.attach(pod_id, volume, call))

    async def detach_volume(self, pod_id: str, mount_tag: str, call: Call) -> PodStatus:
        """Take a volume away from a pod; see `Attaching.detach`."""
        async with self._parts.locks.hold(pod_id, call.verb):
            return self._ledger.status(await self._attaching.detach(pod_id, mount_tag, call))

    async def delete(self, pod_id: str, force: bool, call: Call) -> PodDeleted:
        """Free and forget a pod. Idempotent; can be repeated until nothing is left.

        Args:
            pod_id: The pod.
            force: Whether a running pod is stopped first, with the node's ``stop_grace_s``.
            call: The command.

        Raises:
            FailedPreconditionError: It runs, and *force* was not given.
            CleanupError: Something could not be freed: the pod is ``failed`` with ``leftovers``.
            AbortedError: Another command than a start holds the pod.
        """
        async with self._parts.locks.hold(pod_id, call.verb, overtakes=OVERTAKEN):
            record = self._ledger.find(pod_id)
            if record is None:
                return PodDeleted(pod_id=pod_id, existed=False)
            self._ledger.get(pod_id, call)
            if not force:
                require(f"Pod {pod_id}", record.state, POD_DELETABLE, call.verb)
            grace_s = self._parts.settings.stop_grace_s if record.state is PodState.RUNNING else 0
            await self._stopper.stop(pod_id, call, grace_s=grace_s)
            await remove_pod_disks(self._parts, record)
            await self.logs.forget(pod_id)
            await self._ledger.remove(pod_id, call)
        return PodDeleted(pod_id=pod_id, existed=True)

    def list(
        self,
        labels: Mapping[str, str],
        states: Sequence[PodState],
        annotations: Mapping[str, str] = MappingProxyType({}),
    ) -> PodStatuses:
        """Pods that carry all *labels* and *annotations* and are in one of *states* (empty: any).

        In the order of creation.
        """
        return PodStatuses(
            pods=tuple(
                self._status(record)
                for record in self._ledger.records.values()
                if (not states or record.state in states)
                and labels.items() <= record.spec.labels.items()
                and annotations.items() <= record.spec.annotations.items()
            )
        )

    def status(self, pod_id: str) -> PodStatus:
        """One pod. Raises NotFoundError when there is none of that id."""
        return self._status(self._ledger.get(pod_id))

    async def console(self, pod_id: str, max_bytes: int, call: Call) -> ConsoleText:
        """The last *max_bytes* of what the guest of a pod that runs or is paused wrote to its console.

        Raises:
            NotFoundError, FailedPreconditionError: There is no such pod, or it has no VM.
        """
        record = self._ledger.get(pod_id, call)
        require(f"Pod {pod_id}", record.state, POD_HAS_VM, call.verb)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        text = await live.vm.read_console(max_bytes, timeout_s=REQUEST_LIMIT_S)
        return ConsoleText(pod_id=pod_id, text=text)

    @property
    def snapshot(self) -> Mapping[str, PodRecord]:
        """All records by pod id; another mapping once anything has changed."""
        return self._ledger.records

    @property
    def records(self) -> Collection[PodRecord]:
        """All records, in the order of creation. A snapshot."""
        return self._ledger.records.values()

    def host_capacity(self) -> Amount:
        """What the host has, as the settings have it; raises UnavailableError as `host.read_host`."""
        settings, parts = self._parts.settings, self._parts
        found = host.MOCK_HOST if self._mock else host.read_host(parts.memory(), settings.state_dir)
        return host.capacity(found, settings.capacity, pods=settings.limits.pods)

    @property
    def public_keys(self) -> tuple[str, ...]:
        """For whom secrets of pods here may be sealed."""
        return self._parts.secrets.public_keys

    def missing_keys(self, spec: PodSpec) -> Sequence[str]:
        """Keys that secrets of *spec* were sealed for and that this node does not have."""
        return sorted({key for c in spec.containers for key in self._parts.secrets.sealed_for_others(c)})

    @property
    def image_names(self) -> Set[str]:
        """Names of the images at hand."""
        return self._parts.images.names

    def expected_start_ms(self, spec: PodSpec) -> float:
        """How long a start of such a pod would take now, from what starts took lately, the queue included."""
        parts, settings = self._parts, self._parts.settings
        hypervisor = spec.hypervisor_type or settings.hypervisor
        record = PodRecord(
            pod_id=spec.id or "new",
            spec=spec,
            hypervisor_type=hypervisor,
            agent_type=agent_type_of(spec, hypervisor, settings),
            network_model=spec.network_model or settings.network,
            state=PodState.READY,
            created_at=parts.clock(),
        )
        kind: Kind = "boot"
        if self.pool.has(record):
            kind = "spare"
        elif self.templates.has(record):
            kind = "clone"
        return parts.forecast.expect_ms(kind) + 1000 * parts.starts.expected_wait_s()

    @property
    def queued_starts(self) -> int:
        """How many starts wait for others."""
        return self._parts.starts.waiting

    def pool_statuses(self) -> tuple[PoolStatus, ...]:
        """The spare VMs, by shape."""
        return self.pool.statuses()

    @property
    def busy(self) -> bool:
        """Whether any pod is held by a command, or by the handling of its VM's end."""
        return self._parts.locks.any_held

    @property
    def unsaved(self) -> bool:
        """Whether something happened that could not be saved yet, because the database cannot be written."""
        return any(live.unsaved_exits for live in self._parts.live.values())

    # ---- containers: see ContainerCommands -----------------------------------------------------------

    async def exec(
        self, pod_id: str, container_id: str | None, options: ExecOptions, call: Call
    ) -> ExecResult:
        """Run a command in a running container, or in the guest itself (None)."""
        return await self._containers.exec(pod_id, container_id, options, call)

    async def create_container(self, pod_id: str, spec: ContainerSpec, call: Call) -> ContainerStatus:
        """Add a container to a pod."""
        return await self._containers.create(pod_id, spec, call)

    async def start_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        """Start a container of a running pod."""
        return await self._containers.start(pod_id, container_id, call)

    async def stop_container(
        self, pod_id: str, container_id: str, grace_s: float | None, call: Call
    ) -> ContainerStatus:
        """Stop a container."""
        return await self._containers.stop(pod_id, container_id, grace_s, call)

    async def kill_container(
        self, pod_id: str, container_id: str, signal: int, everyone: bool, call: Call
    ) -> ContainerStatus:
        """Send a signal to a running container."""
        return await self._containers.kill(pod_id, container_id, signal, everyone, call)

    async def delete_container(
        self, pod_id: str, container_id: str, force: bool, call: Call
    ) -> ContainerDeleted:
        """Remove a container that does not run."""
        return await self._containers.delete(pod_id, container_id, force, call)

    async def pause_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        """Freeze all processes of a container."""
        return await self._life.pause(pod_id, container_id, call)

    async def update_container(
        self, pod_id: str, container_id: str, changes: ContainerResources, call: Call
    ) -> ContainerStatus:
        """Change limits of a container."""
        return await self._resizing.update(pod_id, container_id, changes, call)

    async def resume_container(self, pod_id: str, container_id: str, call: Call) -> ContainerStatus:
        """Let a paused container go on."""
        return await self._life.resume(pod_id, container_id, call)

    async def container_logs(self, request: ContainerLogs) -> ContainerLogEntries:
        """What a container has written."""
        return await self.logs.read(request)

    async def wait_container(
        self, pod_id: str, container_id: str, condition: WaitCondition
    ) -> ContainerWaited:
        """Wait for something to become of a container."""
        return await self._life.wait(pod_id, container_id, condition)

    async def processes(self, pod_id: str, container_id: str, limit: int, call: Call) -> ContainerProcesses:
        """The processes of a container."""
        return await self._life.processes(pod_id, container_id, limit, call)

    async def stats(self, request: PodStatsOf, call: Call) -> PodStats:
        """What a pod uses."""
        return await self._stats.read(request, call)

    def start_restarts(self) -> None:
        """Let restart policies act from now on; to be called once, after `recover`."""
        self._restarter.start()

    async def wind_down(self) -> None:
        """Let go of all who wait for containers, and restart nothing any more: the node stops. Idempotent."""
        self._life.end_waits()
        self.logs.end_waits()
        self._stats.end_waits()
        self.disconnects.close()
        await self._restarter.close()

    def list_containers(
        self,
        pod_id: str | None,
        states: Sequence[ContainerState],
        labels: Mapping[str, str] = MappingProxyType({}),
        annotations: Mapping[str, str] = MappingProxyType({}),
    ) -> ContainerStatuses:
        """Containers of one pod or of all (None), in one of *states* (empty: any), that carry all of these.

        Raises:
            NotFoundError: There is no such pod.
        """
        records = self._ledger.records.values() if pod_id is None else [self._ledger.get(pod_id)]
        return ContainerStatuses(
            containers=tuple(
                status
                for record in records
                for status in self._ledger.status(record).containers
                if (not states or status.state in states)
                and labels.items() <= status.labels.items()
                and annotations.items() <= status.annotations.items()
            )
        )

    def container_status(self, pod_id: str, container_id: str) -> ContainerStatus:
        """One container. Raises NotFoundError when there is no such pod or container."""
        return self._ledger.container_status(self._ledger.get(pod_id), container_id)

    # ---- the node ------------------------------------------------------------------------------------

    async def recover(self) -> Recovered:
        """Adopt what lives, mend what was half done, and remove what is nobody's.

        To be called once, before any command is taken.

        Emits one ``node.recovered`` with what was found.
        """
        found = await Recovery(self._parts, self._watcher, self._notes).run()
        audit = await self._auditor.audit(repair=True)
        await self.announce(
            EventKind.NODE_RECOVERED,
            {
                "adopted": sorted(found.adopted),
                "failed": sorted(found.failed),
                "undone": sorted(found.undone),
                "restored": sorted(found.restored),
                "reaped": [f"{h.kind} {h.name}" for h in audit.holdings if h.freed],
            },
        )
        return found

    async def audit(self, *, repair: bool) -> NodeAudit:
        """List what the node holds on its host; with *repair*, remove what is nobody's."""
        return await self._auditor.audit(repair=repair)

    async def audit_forever(self, every_s: float) -> None:
        """Audit and repair the host every so many seconds."""
        while True:
            await asyncio.sleep(every_s)
            await self.audit(repair=True)

    async def announce(self, kind: EventKind, data: dict[str, object]) -> None:
        """Emit an event of the node itself, such as ``node.started``."""
        await self._ledger.announce(kind, {"node": self.node_name, **data}, mock=self._mock)

    async def close(self) -> None:
        """Let go of all VMs: sessions are closed, the VMs and what runs in them go on. Idempotent."""
        await self.wind_down()
        await self.pool.close()
        await self.templates.close()
        while self._parts.live:
            pod_id, live = self._parts.live.popitem()
            try:
                async with asyncio.timeout(CLOSE_LIMIT_S):
                    await live.stop_watching()
                    await live.close_session()
                    await live.vm.close()
            except (VcnodeError, TimeoutError) as exc:
                # The process ends soon, and with it every handle; the VM is found again by its record.
                log.warning("Pod %s: its VM was not let go cleanly", pod_id, exc_info=exc)

    # ---- helpers -------------------------------------------------------------------------------------

    async def _run(
        self, spec: PodSpec, pod_id: str, call: Call, reservation: str | None, *, began: float
    ) -> PodStatus:
        async with self._parts.locks.hold(pod_id, call.verb) as hold:
            self._parts.starts.check()
            existed = self._ledger.find(pod_id) is not None
            await self._create(spec, call, reservation)
            try:
                return self._ledger.status(await self._starter.start(pod_id, call, began=began))
            except BaseException:
                if not existed and hold.overtaken_by != "pod.stop":
                    await aio.finish(self._forget_unless_leftovers(pod_id, call), timeout_s=CLOSE_LIMIT_S)
                raise

    async def _create(self, spec: PodSpec, call: Call, reservation: str | None) -> PodRecord:
        pod_id = _id_of(spec)
        known = self._ledger.find(pod_id)
        if known is not None:
            if known.spec != spec:
                raise AlreadyExistsError(
                    f"Pod {pod_id} exists with another spec; delete it first, or choose another id.",
                    pod_id=pod_id,
                )
            return known
        if call.expected_revision is not None:
            raise FailedPreconditionError(
                f"There is no pod {pod_id}, so none of revision {call.expected_revision}.",
                revision=None,
                expected=call.expected_revision,
            )
        self._takes_pods()
        with self.capacity.reservations.claimed(reservation):
            record = await self._admission.pod(spec)
            await self._ledger.add(record, call, reservation=reservation)
        return self._ledger.get(pod_id)

    def _status(self, record: PodRecord) -> PodStatus:
        """Its status, with its place in the queue, which no record has: it changes with those of others."""
        status = self._ledger.status(record)
        if record.state is PodState.STARTING and (at := self._parts.starts.position(record.pod_id)):
            return status.model_copy(update={"queue_position": at})
        return status

    async def _forget_unless_leftovers(self, pod_id: str, call: Call) -> None:
        record = self._ledger.find(pod_id)
        if record is not None and record.vm is None and not record.leftovers:
            try:
                await remove_pod_disks(self._parts, record)
            except CleanupError as exc:
                log.warning("Pod %s is kept: %s", pod_id, exc.message)
                return
            await self.logs.forget(pod_id)
            await self._ledger.remove(pod_id, call)


def _is_mock(hypervisors: Mapping[HypervisorType, Hypervisor], wanted: HypervisorType) -> bool:
    found = hypervisors.get(wanted)
    return wanted is HypervisorType.MOCK if found is None else found.info.mock


def _with_id(spec: PodSpec) -> PodSpec:
    return spec if spec.id is not None else spec.model_copy(update={"id": new_id("pod")})


def _id_of(spec: PodSpec) -> str:
    if spec.id is None:
        raise NotFoundError("A pod without an id.")
    return spec.id
