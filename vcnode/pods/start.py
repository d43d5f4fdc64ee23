"""Starting a pod: network, directory, VM, agent, containers; and all of it undone when one of them fails."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from functools import partial

from vcnode import aio, logs
from vcnode.drivers.base import GuestSession, Vm
from vcnode.errors import (
    AgentError,
    DeadlineExceededError,
    HypervisorError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.models.call import Call
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.models.vm import GuestConfig, VmRecord, VmSpec
from vcnode.pods import edits
from vcnode.pods.containers import Containers
from vcnode.pods.disconnect import watchdog_of
from vcnode.pods.guests import access_of, vm_config
from vcnode.pods.hooks import run_all, run_all_softly, state_of
from vcnode.pods.ledger import check_revision
from vcnode.pods.lifecycle import PodStep, next_pod_state
from vcnode.pods.live import LivePod
from vcnode.pods.locks import RESTART_POD
from vcnode.pods.marks import new_vm_id
from vcnode.pods.notes import Notes
from vcnode.pods.parts import KILL_LIMIT_S, REQUEST_LIMIT_S, Observer, Parts
from vcnode.pods.pool import Pool, Spare
from vcnode.pods.release import Holdings, request_of
from vcnode.pods.resizing import SHRINK_LIMIT_S, has_balloon
from vcnode.pods.shares import shares_host_dirs
from vcnode.pods.sockets import connect_sockets
from vcnode.pods.statuses import container_id, hostname_of
from vcnode.pods.templates import Templates
from vcnode.pods.undo import UndoStack
from vcnode.pods.volumes import shares_at_launch
from vcnode.pods.watch import Watcher
from vcnode.pods.wiring import netdevs

log = logging.getLogger(__name__)

GIVE_UP_LIMIT_S = 180.0
"""Seconds for the undo of a start and its record, all steps together."""
CLONE_LIMIT_S = 20.0
"""Seconds for a clone to be resumed, and for its agent to answer: both take tens of milliseconds."""
INTERRUPTED = "The start was interrupted before it was done; everything was undone."


class Phases:
    """Stop watch of a start: each phase ends when the next begins.

    Args:
        observer: Gets each phase.
        began: Loop time at which the command arrived.
        traceparent: The command's.
    """

    def __init__(self, observer: Observer, began: float, traceparent: str | None) -> None:
        self._observer = observer
        self._traceparent = traceparent
        self._began = began
        self._last = began
        self.ms: dict[str, float] = {}
        """Milliseconds of the phases that ended."""

    def done(self, name: str, *, of_which: tuple[str, float] | None = None) -> None:
        """The phase *name* ends now; *of_which* is a phase within it, told apart: its name and seconds."""
        now = asyncio.get_running_loop().time()
        seconds = now - self._last
        if of_which is not None:
            self._note(*of_which)
            seconds -= of_which[1]
        self._note(name, seconds)
        self._last = now

    def total(self) -> dict[str, float]:
        """All phases, and the whole as ``total``."""
        self._note("total", asyncio.get_running_loop().time() - self._began)
        return self.ms

    def _note(self, name: str, seconds: float) -> None:
        self.ms[name] = round(seconds * 1000, 3)
        self._observer.phase(name, seconds, self._traceparent)


class Starter:
    """Starts pods; the caller holds the pod's lock."""

    def __init__(
        self,
        parts: Parts,
        containers: Containers,
        watcher: Watcher,
        templates: Templates,
        pool: Pool,
        notes: Notes,
    ) -> None:
        self._parts = parts
        self._containers = containers
        self._watcher = watcher
        self._templates = templates
        self._pool = pool
        self._notes = notes

    async def start(self, pod_id: str, call: Call, *, began: float) -> PodRecord:
        """Bring a pod up, with all its containers.

        On failure everything is undone and the pod is ``failed`` with the reason, or ``stopped`` when the
        start was cancelled or overtaken; either way it can be started again. What could not be undone keeps
        it ``failed`` with ``leftovers``, until stop or delete has freed them.

        Args:
            pod_id: The pod.
            call: The command.
            began: Loop time at which the command arrived.

        Raises:
            NotFoundError, FailedPreconditionError: No such pod, or not in a state to start; nothing changed.
            ResourceExhaustedError: The host lacks memory, or the queue of starts is full; nothing changed.
            DriverError: A driver failed; undone as said above.
        """
        parts = self._parts
        record = parts.ledger.get(pod_id, call)
        self._check(record, call)
        await self._make_room(record)
        ticket = parts.starts.enter(pod_id, record.spec.priority)
        undo = UndoStack()
        spare: Spare | None = None
        try:
            if (spare := self._pool.take(record)) is not None:
                undo.push(f"spare VM {spare.vm_id}", partial(self._pool.end, spare))
            vm = self._new_vm(record) if spare is None else spare.vm.record
            plan = partial(parts.network(record).plan, request_of(record, vm.vm_id))
            record = await parts.ledger.begin_start(pod_id, vm, plan, call)
            phases = Phases(parts.observer, began, call.traceparent)
            await ticket.granted.wait()
            phases.done("queue")
            return await self._bring_up(record, spare, undo, phases, call)
        except BaseException as exc:
            await aio.finish(self._give_up(pod_id, undo, exc, call), timeout_s=GIVE_UP_LIMIT_S)
            raise
        finally:
            parts.starts.leave(ticket)
            if spare is not None:
                self._pool.settle(spare)

    def _check(self, record: PodRecord, call: Call) -> None:
        """Refuse what cannot go well, before anything changes."""
        check_revision(record, call)
        next_pod_state(record.pod_id, record.state, PodStep.START, call.verb)
        self._parts.hypervisor(record)
        self._parts.agent(record)
        self._parts.network(record)

    async def _make_room(self, record: PodRecord) -> None:
        """See that the host has the memory; spare VMs that the pod does not take give way to it."""
        if record.spec.hypervisor_config.huge_pages:
            return  # they are set aside; the hypervisor says when there are too few
        if not self._parts.hypervisor(record).info.mock and not self._pool.has(record):
            wanted = record.spec.resources.mem_size_mib
            await self._pool.make_room(wanted)
            if (available := self._parts.memory().available_mib) < wanted:
                raise ResourceExhaustedError(
                    f"Pod {record.pod_id} needs {wanted} MiB of memory; the host has {available} MiB left.",
                    wanted_mib=wanted,
                    available_mib=available,
                )

    def _new_vm(self, record: PodRecord) -> VmRecord:
        vm_id = new_vm_id(self._parts.settings)
        return VmRecord(
            vm_id=vm_id,
            uuid=str(uuid.uuid4()),
            directory=str(self._parts.settings.run_dir / "vms" / vm_id),
            type=record.hypervisor_type,
        )

    async def _bring_up(
        self, record: PodRecord, spare: Spare | None, undo: UndoStack, phases: Phases, call: Call
    ) -> PodRecord:
        parts = self._parts
        if record.vm is None:  # cannot be: the edit that began the start has set it
            raise UnsupportedError(f"Pod {record.pod_id} has no VM to start.")
        held = Holdings(parts, record, record.vm)
        held.undo_hooks(undo)
        record = await self._attach_network(record, held, undo)
        phases.done("network")
        if record.spec.hooks.pre_start:
            await run_all(parts.storage, record.spec.hooks.pre_start, state_of(record, "creating"))
            phases.done("hooks")
        held.undo_directory(undo)
        live = await self._launch(record, held, undo, spare, phases)
        async with aio.Interruptible() as section:
            live.start_section = section
            self._watcher.watch_vm(live)
            await connect_sockets(parts, live, record)
            if live.vm.record != record.vm:
                await parts.ledger.change(record.pod_id, edits.launched(live.vm.record))
            await self._connect(record, live, held, phases)
            pids = await self._start_containers(record, live)
            phases.done("containers")
            edit = edits.started(pids, phases.total(), parts.clock(), call.verb)
            parts.forecast.learn(phases.ms)
            await parts.ledger.change(record.pod_id, edit, call)
            await self._watcher.replay_exits(live)
            # Until here the end of the VM undoes the start; from here on it is an event of its own.
            live.start_section = None
        undo.drop()
        if record.spec.hooks.post_start:
            self._run_after(parts.ledger.get(record.pod_id))
        if live.session is not None:
            self._watcher.follow_logs(live)  # not before: nobody's start is to wait for it
        if live.vm.restore_s is None:
            self._templates.learn(record)
        return parts.ledger.get(record.pod_id)

    def _run_after(self, record: PodRecord) -> None:
        """Run the hooks after a start, whose outcome changes nothing: nobody waits for them."""
        work = run_all_softly(self._parts.storage, record.spec.hooks.post_start, state_of(record, "running"))
        self._parts.tasks.spawn(work, name=f"hooks of pod {record.pod_id}")

    async def _attach_network(self, record: PodRecord, held: Holdings, undo: UndoStack) -> PodRecord:
        """Make what was planned; returns the record as it is then."""
        held.undo_network(undo)
        planned = held.network
        held.network = await self._parts.network(record).attach(planned, timeout_s=REQUEST_LIMIT_S)
        if held.network == planned:
            return record  # which says it all
        return await self._parts.ledger.change(record.pod_id, edits.networked(held.network))

    async def _launch(
        self, record: PodRecord, held: Holdings, undo: UndoStack, spare: Spare | None, phases: Phases
    ) -> LivePod:
        """Bring the VM up: the spare that was taken, else a clone, else by a boot."""
        held.undo_vm(undo)
        if spare is None or not await self._claim(record, spare, phases):
            vm, session = await self._make_vm(record, held, phases)
        else:
            await self._notes.write(record)
            vm, session = spare.vm, spare.session
        live = LivePod(record.pod_id, vm)
        live.session = session
        held.live = self._parts.live[record.pod_id] = live
        held.vm = vm.record
        return live

    async def _claim(self, record: PodRecord, spare: Spare, phases: Phases) -> bool:
        """Let the spare run; False when it does not answer: nothing of it is left then but its id."""
        try:
            await self._pool.claim(spare)
        except (HypervisorError, AgentError, UnavailableError, DeadlineExceededError) as exc:
            log.warning("Pod %s: spare VM %s does not answer", record.pod_id, spare.vm_id, exc_info=exc)
            await self._pool.end(spare, network=False)
            return False
        finally:
            phases.done("pool")
        return True

    async def _make_vm(
        self, record: PodRecord, held: Holdings, phases: Phases
    ) -> tuple[Vm, GuestSession | None]:
        """Make a VM of the record's id, from its directory on."""
        parts = self._parts
        directory = await parts.storage.make_vm_dir(held.vm.vm_id)
        await self._notes.write(record)
        phases.done("storage")
        template = await self._templates.for_pod(record)
        phases.done("template")
        agent = parts.agent(record)
        shares = await shares_at_launch(parts, record, held.vm.vm_id, str(directory / "shared"))
        async with (
            netdevs(parts.network(record), held.network) as devices,
            vm_config(parts, record, held.network) as config,
        ):
            spec = VmSpec(
                vm_id=held.vm.vm_id,
                uuid=held.vm.uuid,
                vcpu_count=record.spec.resources.vcpu_count,
                mem_size_mib=record.spec.resources.mem_size_mib,
                directory=str(directory),
                shared_dir=str(directory / "shared"),
                balloon=has_balloon(record, parts.hypervisor(record)),
                netns_path=held.network.netns_path,
                netdevs=devices,
                config=config,
                channels=agent.channels(record.spec.agent_config),
                share_tag=agent.share_tag,
                host_dirs=shares_host_dirs(record),
                shares=shares,
            )
            return await self._clone_or_boot(record, spec, template, phases)

    async def _clone_or_boot(
        self, record: PodRecord, spec: VmSpec, template: str | None, phases: Phases
    ) -> tuple[Vm, GuestSession | None]:
        """Launch the VM; a clone's agent must answer as well, or the template is dropped and the VM boots."""
        if template is not None:
            update = {"clone_of": template, "slot": await self._containers.slot_image(record)}
            try:
                return await self._clone(record, spec.model_copy(update=update), phases)
            except (HypervisorError, AgentError, NotFoundError) as exc:
                log.warning("Pod %s: template %s is broken; booting", record.pod_id, template, exc_info=exc)
                await self._templates.broke(record, template)
        limit_s = self._parts.settings.qemu.boot_timeout_s
        vm = await self._parts.hypervisor(record).launch(spec, timeout_s=limit_s)
        phases.done("qemu")
        return vm, None

    async def _clone(self, record: PodRecord, spec: VmSpec, phases: Phases) -> tuple[Vm, GuestSession]:
        """Resume a clone and open its session; on failure nothing of it is left but its directory."""
        parts = self._parts
        vm = await parts.hypervisor(record).launch(spec, timeout_s=CLONE_LIMIT_S)
        try:
            phases.done("qemu", of_which=("restore", vm.restore_s or 0.0))
            session = await parts.agent(record).connect(vm, timeout_s=CLONE_LIMIT_S)
            phases.done("agent")
            return vm, session
        except BaseException:
            await aio.finish(vm.stop(grace_s=0), timeout_s=KILL_LIMIT_S)
            raise

    async def _connect(self, record: PodRecord, live: LivePod, held: Holdings, phases: Phases) -> None:
        parts = self._parts
        boot_limit_s = parts.settings.qemu.boot_timeout_s
        if (session := live.session) is None:
            access = await access_of(parts, record, new_vm=True)
            session = await parts.agent(record).connect(live.vm, access=access, timeout_s=boot_limit_s)
            live.session = session
            if (key := session.info.host_key) != record.host_key:
                await parts.ledger.change(record.pod_id, edits.host_key_seen(key))
            phases.done("boot")
        self._watcher.follow(live)
        await self._containers.attach_images(live, record)
        config = GuestConfig(
            hostname=hostname_of(record),
            time_ns=int(parts.clock().timestamp() * 1_000_000) * 1000,
            entropy=os.urandom(64),
            machine_id=uuid.UUID(held.vm.uuid).hex,
            endpoints=held.network.endpoints,
            dns=held.network.dns,
            watchdog=watchdog_of(record, parts.contact, lease_s=parts.settings.nats.lease_s),
        )
        await session.configure(config, timeout_s=REQUEST_LIMIT_S)
        if live.vm.record.balloon and record.mem_size_mib < record.spec.resources.mem_size_mib:
            await live.vm.set_memory(record.mem_size_mib, timeout_s=SHRINK_LIMIT_S)
        phases.done("configure")

    async def _start_containers(self, record: PodRecord, live: LivePod) -> dict[str, int]:
        pids: dict[str, int] = {}
        for container in record.containers:
            cid = container_id(container)
            with logs.about(container_id=cid):
                pids[cid] = await self._containers.launch(live, record, container)
        return pids

    async def _give_up(self, pod_id: str, undo: UndoStack, exc: BaseException, call: Call) -> None:
        """Undo a start and record how it ended; never raises."""
        parts = self._parts
        leftovers = await undo.unwind()
        record = parts.ledger.find(pod_id)
        if record is None or record.state not in (PodState.STARTING, PodState.RUNNING):
            return  # not even the beginning was saved
        now = parts.clock()
        # A restart that was cancelled (the node agent stops) stays due; only failed pods have restarts.
        if isinstance(exc, asyncio.CancelledError) and not leftovers and call.verb != RESTART_POD:
            edit = edits.undone(INTERRUPTED, now, call.verb)
        else:
            edit = edits.failed_and_freed(_reason(exc), leftovers, now)
        try:
            await parts.ledger.change(pod_id, edit, call)
        except VcnodeError as error:
            # The pod stays `starting` in the database, and the next stop, delete or restart mends that.
            log.error("Pod %s: the end of its start cannot be saved", pod_id, exc_info=error)


def _reason(exc: BaseException) -> str:
    if isinstance(exc, VcnodeError):
        return exc.message
    if isinstance(exc, asyncio.CancelledError):
        return INTERRUPTED
    return f"The start failed with an internal error ({type(exc).__name__})."
