"""Spare VMs: clones that are resumed, have answered, and wait paused until a pod takes them.

A spare has an id, a directory and a uuid of its own, as any VM; a pod that takes it gets these, and gives it
its identity. The pool belongs to this process: when the node agent ends in good order its spares end with it,
and those that a killed one leaves are nobody's, so that the audit at the next start removes them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vcnode.aio import Spawner, finish
from vcnode.drivers.base import GuestSession, Storage, Vm
from vcnode.errors import AgentError, HypervisorError, ResourceExhaustedError, UnsupportedError, VcnodeError
from vcnode.models.network import Interworking
from vcnode.models.node import PoolStatus
from vcnode.models.records import PodRecord
from vcnode.models.vm import NetworkAttachment
from vcnode.pods.host import HostMemory
from vcnode.pods.marks import new_vm_id
from vcnode.pods.queue import StartQueue
from vcnode.pods.rehearsal import Rehearsal
from vcnode.pods.shares import shares_host_dirs
from vcnode.pods.templates import Kind, Templates, prepare
from vcnode.pods.undo import UndoStack
from vcnode.pods.wiring import netdevs
from vcnode.settings import PoolSettings, Settings, ShapeSettings

log = logging.getLogger(__name__)

MAKE_LIMIT_S = 20.0
"""Seconds for a spare to be resumed, to answer, and to be paused: each takes tens of milliseconds."""
CLAIM_LIMIT_S = 5.0
"""Seconds for a spare to run again and to answer, which takes milliseconds, before another way is taken."""
END_LIMIT_S = 60.0
"""Seconds to end one spare and to free what it holds."""
PAUSES_S = (1.0, 5.0, 15.0, 60.0)
"""Seconds before a spare is tried again that could not be made; the last repeats."""


class Observer(Protocol):
    """Hears what happens to spares."""

    def spare_taken(self, found: bool) -> None:
        """A pod of a shape that has a pool came: there was a spare for it, or not."""
        ...

    def spare_lost(self) -> None:
        """A spare died while it waited, or did not answer when it was taken."""
        ...


@dataclass(eq=False, slots=True)
class Spare:
    """A VM that waits."""

    vm: Vm
    session: GuestSession
    kind: Kind
    network: NetworkAttachment
    """Its namespace and taps, not wired to anything yet."""
    watcher: asyncio.Task[None] | None = None
    """Notices its end while it waits."""

    @property
    def vm_id(self) -> str:
        """Id of the VM."""
        return self.vm.record.vm_id


class Pool:
    """The spares of one node.

    Args:
        templates: What they are clones of.
        storage: For their directories.
        settings: How many of which shape.
        queue: Spares are made only while no pod starts.
        rehearsal: What a spare does before it waits.
        tasks: Runs the making, and watches those that wait.
        memory: The host's memory.
        observer: Hears what happens.
    """

    def __init__(
        self,
        *,
        templates: Templates,
        storage: Storage,
        settings: Settings,
        queue: StartQueue,
        rehearsal: Rehearsal,
        tasks: Spawner,
        memory: Callable[[], HostMemory],
        observer: Observer,
    ) -> None:
        self._templates = templates
        self._storage = storage
        self._settings = settings
        self._queue = queue
        self._rehearsal = rehearsal
        self._tasks = tasks
        self._memory = memory
        self._observer = observer
        self._ready: list[Spare] = []
        self._wake = asyncio.Event()
        self._refilling: asyncio.Task[None] | None = None
        self.changed = asyncio.Event()
        """Set whenever the number of spares has changed; for whoever waits for one (and clears it)."""
        self.vm_ids: set[str] = set()
        """VMs that are the pool's: being made, waiting, and taken ones that no record has yet."""

    def start(self) -> None:
        """Begin to make spares, and keep their number from now on; returns at once."""
        if self._refilling is None and any(shape.spares for shape in self._settings.pool):
            self._refilling = self._tasks.spawn(self._refill(), name="pool")

    def statuses(self) -> tuple[PoolStatus, ...]:
        """How many spares are wanted and wait, by shape."""
        return tuple(
            PoolStatus(
                vcpu_count=shape.vcpu_count,
                mem_size_mib=shape.mem_size_mib,
                wanted=shape.spares,
                ready=sum(_is_of(spare, shape) for spare in self._ready),
            )
            for shape in self._settings.pool
        )

    def has(self, record: PodRecord) -> bool:
        """Whether a spare waits that the pod can take."""
        return self._find(record) is not None

    def take(self, record: PodRecord) -> Spare | None:
        """A spare for the pod, which is the caller's to `end` from now on; None when none fits.

        It stays in `vm_ids` until `settle`: say so once the pod's record has it, or it was ended.
        """
        spare = self._find(record)
        resources = record.spec.resources
        if any(
            s.spares and s.size == (resources.vcpu_count, resources.mem_size_mib) for s in self._settings.pool
        ):
            self._observer.spare_taken(spare is not None)
        if spare is not None:
            self._remove(spare)
        return spare

    def settle(self, spare: Spare) -> None:
        """The spare's VM is a pod's, or gone. Idempotent."""
        self.vm_ids.discard(spare.vm_id)

    async def claim(self, spare: Spare) -> None:
        """Let a taken spare run, and see that it answers.

        Raises:
            HypervisorError, AgentError, DeadlineExceededError: It does not; `end` it.
        """
        try:
            await spare.vm.resume(timeout_s=CLAIM_LIMIT_S)
            await spare.session.ping(timeout_s=CLAIM_LIMIT_S)
        except VcnodeError:
            self._observer.spare_lost()
            raise

    async def end(self, spare: Spare, *, network: bool = True) -> None:
        """End a spare and free what it holds. Idempotent; a cancellation is held back.

        Args:
            spare: The spare.
            network: Whether its network goes, too; not if a pod has it already.
        """
        await finish(self._end(spare, network=network), timeout_s=END_LIMIT_S)

    async def make_room(self, mem_size_mib: int) -> None:
        """Give spares up, newest first, until the host has so much memory or none is left."""
        while self._ready and self._memory().available_mib < mem_size_mib:
            spare = self._ready[-1]
            self._remove(spare)
            log.info("Spare VM %s gives way to a pod", spare.vm_id)
            await self._end_quietly(spare)

    async def close(self) -> None:
        """End all spares and make no more. Idempotent."""
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.wait({self._refilling})
        while self._ready:
            spare = self._ready[-1]
            self._remove(spare)
            await self._end_quietly(spare)

    # ---- helpers -------------------------------------------------------------------------------------

    def _find(self, record: PodRecord) -> Spare | None:
        if (
            not self._ready
            or record.spec.template == "never"
            or not record.spec.hypervisor_config.is_default
            or record.network_model is not self._settings.network
            or record.spec.network.interworking is Interworking.MACVTAP  # which has no use for a tap
            or (self._settings.qemu.uid_base is not None and shares_host_dirs(record))
        ):
            return None
        kind = self._templates.kind_of(record)
        return next((spare for spare in self._ready if spare.kind == kind), None)

    def _remove(self, spare: Spare) -> None:
        """Take a spare off the list and watch it no longer."""
        self._ready.remove(spare)
        if spare.watcher is not None and spare.watcher is not asyncio.current_task():
            spare.watcher.cancel()
        self.changed.set()
        self._wake.set()

    async def _end(self, spare: Spare, *, network: bool) -> None:
        await spare.session.close()
        await spare.vm.stop(grace_s=0)
        await spare.vm.close()
        await self._storage.remove_vm_dir(spare.vm_id)
        if network:
            await spare.kind.network.detach(spare.network, timeout_s=END_LIMIT_S)
        self.settle(spare)

    async def _end_quietly(self, spare: Spare) -> None:
        try:
            await self.end(spare)
        except (VcnodeError, TimeoutError) as exc:
            log.warning("Spare VM %s could not be freed; an audit will", spare.vm_id, exc_info=exc)
            self.settle(spare)

    async def _watch(self, spare: Spare) -> None:
        exit_ = await spare.vm.wait()
        log.warning("Spare VM %s ended while it waited: %s", spare.vm_id, exit_.reason)
        self._observer.spare_lost()
        self._remove(spare)
        await self._end_quietly(spare)

    async def _refill(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            await self._drop_stale()
            shape = self._missing()
            if shape is None:
                await self._wake.wait()
                continue
            await self._queue.idle()
            try:
                await self._make(shape)
                failures = 0
            except VcnodeError as exc:
                pause_s = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
                failures += 1
                log.warning("No spare VM could be made (%s); next try in %g s", exc.message, pause_s)
                await asyncio.sleep(pause_s)

    def _missing(self) -> PoolSettings | None:
        """The first shape of which there are too few."""
        for shape in self._settings.pool:
            if sum(_is_of(spare, shape) for spare in self._ready) < shape.spares:
                return shape
        return None

    async def _drop_stale(self) -> None:
        """End the spares of templates that are out of date: the guest image or QEMU has changed."""
        for spare in [s for s in self._ready if self._templates.kind(_size(s)) != s.kind]:
            self._remove(spare)
            await self._end_quietly(spare)

    async def _make(self, shape: PoolSettings) -> None:
        """Add one spare. Raises VcnodeError when that cannot be; nothing of it is left then."""
        available_mib = self._memory().available_mib
        if available_mib < 2 * shape.mem_size_mib:  # one for the spare, and still one for a pod
            raise ResourceExhaustedError(f"The host has {available_mib} MiB of memory left.")
        kind = await self._templates.ready(shape)
        if kind is None:
            raise UnsupportedError("there is no template to make spares of")
        spare = await self._clone(kind)
        spare.watcher = self._tasks.spawn(self._watch(spare), name=f"spare {spare.vm_id}")
        self._ready.append(spare)
        self.changed.set()

    async def _clone(self, kind: Kind) -> Spare:
        vm_id = new_vm_id(self._settings)
        undo = UndoStack()
        self.vm_ids.add(vm_id)
        try:
            undo.push(f"directory of {vm_id}", lambda: self._storage.remove_vm_dir(vm_id))
            directory = await self._storage.make_vm_dir(vm_id)
            spec, network = await prepare(kind, vm_id, directory, undo)
            async with netdevs(kind.network, network) as devices:
                # Nothing in its slot: its pod's image will be plugged in, and that is what it rehearses.
                update = {"netdevs": devices, "clone_of": kind.key, "host_dirs": False}
                vm = await kind.hypervisor.launch(spec.model_copy(update=update), timeout_s=MAKE_LIMIT_S)
            undo.push(f"handle of {vm_id}", vm.close)
            undo.push(f"VM {vm_id}", lambda: vm.stop(grace_s=0))
            session = await kind.agent.connect(vm, timeout_s=MAKE_LIMIT_S)
            undo.push(f"session with {vm_id}", session.close)
            await self._rehearsal.run(vm, session, configure=True)
            await vm.pause(timeout_s=MAKE_LIMIT_S)
        except BaseException as exc:
            for left in await undo.unwind():
                log.warning("Making a spare VM has left %s", left)
            self.vm_ids.discard(vm_id)  # what was left is an orphan from now on, and the next audit's
            if isinstance(exc, HypervisorError | AgentError):
                await self._templates.drop(kind)
            raise
        undo.drop()
        return Spare(vm, session, kind, network)


def _size(spare: Spare) -> ShapeSettings:
    shape = spare.kind.shape
    return ShapeSettings(vcpu_count=shape.vcpu_count, mem_size_mib=shape.mem_size_mib)


def _is_of(spare: Spare, shape: PoolSettings) -> bool:
    return (spare.kind.shape.vcpu_count, spare.kind.shape.mem_size_mib) == shape.size
