"""Which template a pod starts from, and the making of those that are missing.

A template is made in the background once a first pod of its shape has started cold, so that this pod is not
slowed; pods that come meanwhile wait for it, which is quicker than a second boot beside the first. A broken
template costs a slow start, never a failed one: the caller says so with `Templates.broke` and boots cold.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from vcnode import logs
from vcnode.aio import Spawner
from vcnode.drivers.base import GuestAgent, Hypervisor, Network, Storage, Templating
from vcnode.errors import FailedPreconditionError, UnsupportedError, VcnodeError
from vcnode.models.network import NetworkConfig, NetworkModel
from vcnode.models.pod import AgentType, HypervisorType
from vcnode.models.records import PodRecord
from vcnode.models.vm import NetworkAttachment, VmShape, VmSpec
from vcnode.pods.marks import new_vm_id
from vcnode.pods.rehearsal import Rehearsal
from vcnode.pods.undo import UndoStack
from vcnode.pods.wiring import netdevs, preparer
from vcnode.settings import Settings, ShapeSettings

log = logging.getLogger(__name__)

LOAD_LIMIT_S = 60.0
SAVE_LIMIT_S = 120.0
EVICT_EVERY_S = 3600.0
"""Between two looks for templates that are too old."""
REQUEST_LIMIT_S = 30.0


class Observer(Protocol):
    """Hears what happens to templates."""

    def template_made(self) -> None:
        """One was made."""
        ...

    def template_broken(self) -> None:
        """One could not be used and was dropped."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """What a template is made with and for."""

    hypervisor: Hypervisor
    agent: GuestAgent
    shape: VmShape
    key: str
    """Of the template as it has to be now."""
    network: Network
    """Makes namespace and taps of VMs that are nobody's."""

    @property
    def templating(self) -> Templating:
        """The hypervisor, as one that declares the capability ``templates``."""
        return cast(Templating, self.hypervisor)


class Templates:
    """The templates of one node.

    Args:
        hypervisors: Drivers on offer; those with the capability ``templates`` are used.
        agents: Drivers on offer; only the native agent stays silent until it is asked, as a clone must.
        networks: Drivers on offer.
        storage: For the directories of the VMs that become templates.
        settings: Limits, and what to have ready from the start.
        rehearsal: What a guest does before it is saved.
        tasks: Runs the making.
        observer: Hears what happens.
    """

    def __init__(
        self,
        *,
        hypervisors: Mapping[HypervisorType, Hypervisor],
        agents: Mapping[AgentType, GuestAgent],
        networks: Mapping[NetworkModel, Network],
        storage: Storage,
        settings: Settings,
        rehearsal: Rehearsal,
        tasks: Spawner,
        observer: Observer,
    ) -> None:
        self._hypervisors = hypervisors
        self._agents = agents
        self._networks = networks
        self._storage = storage
        self._settings = settings
        self._rehearsal = rehearsal
        self._tasks = tasks
        self._observer = observer
        self._closed = False
        self._making: dict[str, asyncio.Task[None]] = {}
        self._loaded: dict[str, VmShape] = {}
        self.making: set[str] = set()
        """Ids of the VMs that are to become templates."""

    def warm(self) -> None:
        """Begin to load or make the templates that the settings list; returns at once."""
        for shape in self._settings.templates.warm:
            kind = self.kind(shape)
            if kind is None:
                log.warning("The settings list templates to warm, but the default drivers have none")
                return
            self._make_in_background(kind)

    @property
    def shapes(self) -> tuple[VmShape, ...]:
        """Shapes that start as clones at once."""
        return tuple(self._loaded.values())

    def has(self, record: PodRecord) -> bool:
        """Whether the pod would start as a clone at once."""
        kind = self.kind_of(record)
        return record.spec.template != "never" and kind is not None and kind.key in self._loaded

    async def _load(self, kind: Kind) -> bool:
        """Have the template at hand; False when there is none."""
        if await kind.templating.load_template(kind.key, timeout_s=LOAD_LIMIT_S):
            self._loaded[kind.key] = kind.shape
            return True
        self._loaded.pop(kind.key, None)
        return False

    async def for_pod(self, record: PodRecord) -> str | None:
        """The key of the template that the pod starts from; None: it boots.

        Raises:
            UnsupportedError, FailedPreconditionError: The pod requires a template, and its drivers have none,
                or it could not be made.
        """
        policy = record.spec.template
        if policy == "never":
            return None
        kind = self.kind_of(record)
        if kind is None:
            if policy == "require":
                raise UnsupportedError(
                    f"Pod {record.pod_id} requires a template, which hypervisor_type"
                    f" {record.hypervisor_type.value} with agent_type {record.agent_type.value} cannot make"
                    f"{'' if record.spec.hypervisor_config.is_default else ' with a hypervisor_config'}"
                    f"{' with virtio-fs' * any(v.needs_boot for v in record.volumes)}."
                )
            return None
        if await self._load(kind):
            return kind.key
        if policy == "require":
            self._make_in_background(kind)
        if (making := self._making.get(kind.key)) is not None:
            await asyncio.wait({making})
            if await self._load(kind):
                return kind.key
        if policy == "require":
            raise FailedPreconditionError(
                f"Pod {record.pod_id} requires a template, and none could be made; see the node's log."
            )
        return None

    def learn(self, record: PodRecord) -> None:
        """A pod has started cold: begin to make the template that it would have liked; returns at once."""
        if record.spec.template == "auto" and (kind := self.kind_of(record)) is not None:
            self._make_in_background(kind)

    async def broke(self, record: PodRecord, key: str) -> None:
        """The pod's clone of template *key* did not come up: the template is dropped."""
        self._observer.template_broken()
        if (kind := self.kind_of(record)) is not None:
            self._loaded.pop(key, None)
            await kind.templating.drop_template(key)

    async def ready(self, shape: ShapeSettings) -> Kind | None:
        """What VMs of the default drivers and of that size are cloned from; made if it is missing.

        Returns:
            None when these drivers have no templates, or it could not be made (see the log).
        """
        kind = self.kind(shape)
        if kind is None or await self._load(kind):
            return kind
        self._make_in_background(kind)
        if (making := self._making.get(kind.key)) is not None:
            await asyncio.wait({making})
        loaded = await self._load(kind)
        return kind if loaded else None

    async def drop(self, kind: Kind) -> None:
        """A clone did not come up: the template is dropped, and made anew when one is wanted."""
        self._observer.template_broken()
        self._loaded.pop(kind.key, None)
        await kind.templating.drop_template(kind.key)

    def kind(self, shape: ShapeSettings) -> Kind | None:
        """What a VM of that size and of the default drivers is cloned from; None: it boots."""
        settings = self._settings
        network = self._networks.get(settings.network)
        count = None if network is None else network.netdev_count(NetworkConfig())
        return self._kind(
            settings.hypervisor, settings.agent_type, shape.vcpu_count, shape.mem_size_mib, count
        )

    def kind_of(self, record: PodRecord) -> Kind | None:
        """What the pod's VM would be cloned from; None: it boots."""
        if not record.spec.hypervisor_config.is_default or any(v.needs_boot for v in record.volumes):
            return None
        size = record.spec.resources
        if record.network is not None:
            count: int | None = len(record.network.endpoints)
        else:
            network = self._networks.get(record.network_model)
            count = None if network is None else network.netdev_count(record.spec.network)
        return self._kind(
            record.hypervisor_type, record.agent_type, size.vcpu_count, size.mem_size_mib, count
        )

    def _kind(
        self,
        hypervisor_type: HypervisorType,
        agent_type: AgentType,
        vcpu_count: int,
        mem_size_mib: int,
        netdev_count: int | None,
    ) -> Kind | None:
        hypervisor, agent = self._hypervisors.get(hypervisor_type), self._agents.get(agent_type)
        network = preparer(self._networks, self._settings.network, with_taps=bool(netdev_count))
        if hypervisor is None or agent is None or network is None or netdev_count is None:
            return None
        if "templates" not in hypervisor.info.capabilities or "configure" not in agent.info.capabilities:
            return None
        shape = VmShape(vcpu_count=vcpu_count, mem_size_mib=mem_size_mib, netdev_count=netdev_count)
        return Kind(hypervisor, agent, shape, cast(Templating, hypervisor).template_key(shape), network)

    async def close(self) -> None:
        """End what is being made, with its VMs, and make nothing more. Idempotent; drivers close later."""
        self._closed = True
        if making := set(self._making.values()):
            for task in making:
                task.cancel()
            await asyncio.wait(making)

    def _make_in_background(self, kind: Kind) -> None:
        if kind.key not in self._making and not self._closed:
            with logs.own_work():  # not that of the pod which is started meanwhile
                task = self._tasks.spawn(self._make(kind), name=f"template {kind.key}")
            self._making[kind.key] = task
            task.add_done_callback(lambda _: self._making.pop(kind.key, None))

    async def _make(self, kind: Kind) -> None:
        """Load a template, or make it; a failure is logged, for pods start without as well."""
        try:
            if await self._load(kind):
                return
            await self._boot_and_save(kind)
            await self._load(kind)
            await self.evict()
        except VcnodeError as exc:
            log.warning("No template for %s could be made", kind.shape, exc_info=exc)
        else:
            self._observer.template_made()
            log.info("Made template %s", kind.key, extra={"shape": kind.shape.model_dump()})

    async def _boot_and_save(self, kind: Kind) -> None:
        vm_id = new_vm_id(self._settings)
        limit_s = self._settings.qemu.boot_timeout_s
        undo = UndoStack()
        self.making.add(vm_id)
        try:
            undo.push(f"directory of {vm_id}", lambda: self._storage.remove_vm_dir(vm_id))
            directory = await self._storage.make_vm_dir(vm_id)
            spec, network = await prepare(kind, vm_id, directory, undo)
            async with netdevs(kind.network, network) as devices:
                slot = await self._rehearsal.slot()
                update = {"netdevs": devices, "template_key": kind.key, "slot": slot}
                vm = await kind.hypervisor.launch(spec.model_copy(update=update), timeout_s=limit_s)
            undo.push(f"VM {vm_id}", lambda: vm.stop(grace_s=0))
            session = await kind.agent.connect(vm, timeout_s=limit_s)
            try:
                await self._rehearsal.run(vm, session, configure=False)
            finally:
                await session.close()
            await kind.templating.save_template(vm, timeout_s=SAVE_LIMIT_S)
        finally:
            for left in await undo.unwind():
                log.warning("Making a template has left %s", left)
            self.making.discard(vm_id)  # what was left is an orphan from now on, and the next audit's

    async def evict(self) -> None:
        """Drop templates that are too old, and while all take too much room, those not used for longest.

        Those that the settings want to be ready stay.
        """
        limits = self._settings.templates
        shapes = (*limits.warm, *self._settings.pool)
        wanted = {kind.key for shape in shapes if (kind := self.kind(shape)) is not None}
        for hypervisor in self._hypervisors.values():
            if "templates" not in hypervisor.info.capabilities:
                continue
            templating = cast(Templating, hypervisor)
            room = limits.max_total_mib * 1024 * 1024
            for info in await templating.list_templates():
                room -= info.used_bytes
                if info.key not in wanted and (room < 0 or info.idle_s > limits.max_age_s):
                    log.info("Dropping template %s, last used %.0f s ago", info.key, info.idle_s)
                    await templating.drop_template(info.key)
                    room += info.used_bytes

    async def evict_forever(self, every_s: float) -> None:
        """Evict now and every so many seconds."""
        while True:
            try:
                await self.evict()
            except VcnodeError as exc:
                log.warning("Templates cannot be looked through now", exc_info=exc)
            await asyncio.sleep(every_s)


async def prepare(
    kind: Kind, vm_id: str, directory: Path, undo: UndoStack
) -> tuple[VmSpec, NetworkAttachment]:
    """Make the network of a VM that is nobody's yet, and describe the VM, without its network devices.

    Args:
        kind: What it is made with.
        vm_id: Its id.
        directory: Its directory.
        undo: Gets the undo of the network.

    Raises:
        NetworkError: The network could not be made.
    """
    known = NetworkAttachment(model=NetworkModel(kind.network.info.type), vm_id=vm_id)
    undo.push(f"network of {vm_id}", lambda: kind.network.detach(known, timeout_s=REQUEST_LIMIT_S))
    network = await kind.network.prepare(vm_id, kind.shape.netdev_count, timeout_s=REQUEST_LIMIT_S)
    spec = VmSpec(
        vm_id=vm_id,
        uuid=str(uuid.uuid4()),
        vcpu_count=kind.shape.vcpu_count,
        mem_size_mib=kind.shape.mem_size_mib,
        directory=str(directory),
        shared_dir=str(directory / "shared"),
        netns_path=network.netns_path,
    )
    return spec, network
