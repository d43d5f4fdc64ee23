"""What happens to running pods without a command: a VM ends, a session is lost, a container exits."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

from vcnode import logs
from vcnode.drivers.base import ContainerExited, ContainerHealth, SessionLost
from vcnode.errors import (
    AgentError,
    FailedPreconditionError,
    HypervisorError,
    ResourceExhaustedError,
    StorageError,
    VcnodeError,
)
from vcnode.models.events import EventKind
from vcnode.models.pod import ContainerState, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import GuestContainerState
from vcnode.pods import edits
from vcnode.pods.containers import SIGKILL, Containers, root_of
from vcnode.pods.guests import access_of
from vcnode.pods.lifecycle import CONTAINER_ALIVE
from vcnode.pods.live import LivePod
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.release import release
from vcnode.pods.statuses import container_id
from vcnode.pods.volumes import note_mounts

log = logging.getLogger(__name__)

RECONNECT_S = 10.0
"""Seconds to get a lost session back; then the pod has failed."""
RECONNECT_PAUSE_S = 0.25
"""Seconds between two attempts."""
VM_END_GRACE_S = 0.25
"""Seconds to wait, when a session is lost, for the end of the VM that explains it."""
MAX_LOSSES = 5
"""A pod that loses its session so often within `LOSSES_WINDOW_S` has failed: its guest is mad or hostile."""
LOSSES_WINDOW_S = 60.0
SAVE_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between attempts to save what happened while the database cannot be written; the last repeats."""

HOLDER = "the end of its VM"
"""How this module names itself as the holder of a pod."""
ENDS_ITSELF = frozenset({"pod.stop", "pod.delete", HOLDER})
"""Holders that end a pod, and are waited for."""


class Watcher:
    """Watches running pods, each by two tasks: one for its VM, one for the session with its guest."""

    def __init__(self, parts: Parts, containers: Containers) -> None:
        self._parts = parts
        self._containers = containers

    def watch_vm(self, live: LivePod) -> None:
        """Notice the end of the VM; start this as soon as there is a VM."""
        self._spawn(live, self._watch_vm(live), f"vm {live.pod_id}")

    def follow(self, live: LivePod) -> None:
        """Handle what the guest reports, and keep its session; start this as soon as there is a session."""
        self._spawn(live, self._follow(live), f"guest {live.pod_id}")

    def follow_logs(self, live: LivePod) -> None:
        """Keep what the pod's containers write, as long as its present session lasts."""
        session = live.require_session()
        self._spawn(live, self._parts.logs.pump(live.pod_id, session), f"logs of {live.pod_id}")

    async def replay_exits(self, live: LivePod) -> None:
        """Record the exits that came before the starts they belong to; call it after recording those."""
        live.starting.clear()
        exits, live.early_exits = live.early_exits, {}
        healths, live.early_health = live.early_health, {}
        for health in healths.values():
            await self._heard(live, health)
        for event in exits.values():
            await self._heard(live, event)

    async def join(self, live: LivePod, *, timeout_s: float, set_clock: bool = False) -> None:
        """Open a session with a guest that runs already, and learn what happened in it meanwhile.

        Args:
            live: The pod; it has no session.
            timeout_s: Limit of each step.
            set_clock: Whether the guest's clock has stood.

        Raises:
            VcnodeError: The guest does not answer; there is no session.
        """
        record = self._parts.ledger.get(live.pod_id)
        agent = self._parts.agent(record)
        try:
            access = await access_of(self._parts, record)
            live.session = await agent.connect(live.vm, access=access, timeout_s=timeout_s)
            if set_clock:
                await self.set_clock(live, timeout_s=timeout_s)
            await self.reconcile(live, await live.session.list_containers(timeout_s=timeout_s))
            self.follow_logs(live)
        except BaseException:
            await live.close_session()
            raise

    async def set_clock(self, live: LivePod, *, timeout_s: float) -> None:
        """Set the guest's clock to the node's time."""
        now_ns = int(self._parts.clock().timestamp() * 1_000_000) * 1000
        await live.require_session().set_clock(now_ns, timeout_s=timeout_s)

    async def reconcile(self, live: LivePod, states: Sequence[GuestContainerState]) -> None:
        """Make the record and the guest agree about containers, after a time without a session."""
        record = self._parts.ledger.get(live.pod_id)
        there = {state.container_id: state for state in states}
        for container in record.containers:
            cid = container_id(container)
            state = there.get(cid)
            if state is not None:
                live.provided.setdefault(cid, root_of(container, live.vm.record))
                note_mounts(live, record, container)
            with logs.about(container_id=cid):
                await self._reconcile_one(live, container, state)

    async def _reconcile_one(
        self, live: LivePod, container: ContainerRecord, state: GuestContainerState | None
    ) -> None:
        cid = container_id(container)
        if container.state in CONTAINER_ALIVE:
            if state is None or state.state not in ("running", "paused"):
                await self._ended_meanwhile(live, cid, state)
            else:
                await self._put_limits_right(live, container, state)
                if state.state != container.state:
                    await self._undo_pause(live, container)
                if state.ready is not None:
                    await self._container_health(live, ContainerHealth(cid, state.ready))
        elif state is not None and cid not in live.starting:
            await self._undo_unrecorded(live, container, state)

    async def end(self, live: LivePod, reason: str) -> None:
        """The pod cannot go on: record why, and free everything. Whatever holds the pod is interrupted."""
        parts = self._parts
        async with parts.locks.seize(
            live.pod_id,
            HOLDER,
            lambda: HypervisorError(f"Pod {live.pod_id} failed meanwhile: {reason}"),
            waits_for=ENDS_ITSELF,
        ):
            if parts.live.get(live.pod_id) is not live or live.ending:
                return
            live.ending = True
            # This may be one of the tasks that the release cancels and waits for.
            if (current := asyncio.current_task()) is not None:
                live.tasks.discard(current)
            await self.fail(live.pod_id, reason)

    async def fail(self, pod_id: str, reason: str) -> PodRecord:
        """Record that a pod failed, then free what it holds. The caller holds the pod's lock.

        Tries for ever while the database cannot be written: the VM is gone, and that must not be forgotten.
        """
        ledger, now = self._parts.ledger, self._parts.clock()
        try:
            record = await ledger.change(pod_id, edits.failed(reason, now, self._parts.backoff))
        except VcnodeError as exc:
            log.warning("Pod %s: its failure cannot be saved yet", pod_id, exc_info=exc)
            record = ledger.get(pod_id)
        leftovers = await release(self._parts, record)
        if record.state is PodState.FAILED:
            return await self.save(pod_id, edits.freed(leftovers))
        return await self.save(pod_id, edits.failed_and_freed(reason, leftovers, now, self._parts.backoff))

    async def save(self, pod_id: str, edit: edits.Edit) -> PodRecord:
        """Commit a change that has happened already, however long that takes; the record afterwards."""
        attempt = 0
        while True:
            try:
                return await self._parts.ledger.change(pod_id, edit)
            except (StorageError, ResourceExhaustedError) as exc:
                pause_s = SAVE_PAUSES_S[min(attempt, len(SAVE_PAUSES_S) - 1)]
                log.warning("Pod %s: cannot save, next try in %s s", pod_id, pause_s, exc_info=exc)
            attempt += 1
            await asyncio.sleep(pause_s)

    def _spawn(
        self, live: LivePod, work: Coroutine[Any, Any, None], name: str, cid: str | None = None
    ) -> None:
        with logs.own_work(**logs.names(live.pod_id, cid)):
            task = self._parts.tasks.spawn(work, name=name)
        live.tasks.add(task)
        task.add_done_callback(live.tasks.discard)

    async def _watch_vm(self, live: LivePod) -> None:
        exit_ = await live.vm.wait()
        live.vm_ended(exit_)
        if live.ending:
            return
        if live.start_section is not None:
            live.start_section.interrupt(HypervisorError(_vm_ended(live.pod_id, exit_.reason)))
            return
        await self.end(live, exit_.reason)

    async def _follow(self, live: LivePod) -> None:
        losses: deque[float] = deque(maxlen=MAX_LOSSES)
        while (reason := await self._until_lost(live)) is not None:
            # A VM that ends takes its session along, and its own end explains more.
            if await _gone_soon(live):
                break
            if live.paused:
                break  # it cannot answer; who lets it run again opens a session
            if live.start_section is not None:
                message = f"The session with the guest of pod {live.pod_id} was lost during its start."
                live.start_section.interrupt(AgentError(message, reason=reason))
                break
            if not await self._restore(live, reason, losses):
                break

    async def _restore(self, live: LivePod, reason: str, losses: deque[float]) -> bool:
        """Get a lost session back, or end the pod; whether there is a session again."""
        self._parts.observer.session_lost()
        losses.append(asyncio.get_running_loop().time())
        if len(losses) == MAX_LOSSES and losses[-1] - losses[0] < LOSSES_WINDOW_S:
            await self.end(live, f"The session with the guest was lost {MAX_LOSSES} times; last: {reason}")
            return False
        await self.save(live.pod_id, edits.session_news(EventKind.POD_SESSION_LOST, reason))
        if await self._reconnect(live):
            await self.save(live.pod_id, edits.session_news(EventKind.POD_SESSION_RESTORED))
            return True
        if not live.gone.is_set() and not live.paused:
            await self.end(live, f"The session with the guest was lost for good: {reason}")
        return False

    async def _until_lost(self, live: LivePod) -> str | None:
        """Handle events until the session is lost, and say why; None when it was closed on purpose."""
        session = live.session
        if session is None:
            return None
        async for event in session.events():
            match event:
                case SessionLost(reason):
                    if live.session is not session or live.ending:
                        return None
                    await live.close_session()
                    return reason
                case ContainerExited() | ContainerHealth():
                    await self._heard(live, event)
        return None

    async def _heard(self, live: LivePod, event: ContainerExited | ContainerHealth) -> None:
        """Record what the guest reports of a container."""
        with logs.about(container_id=event.container_id):
            if isinstance(event, ContainerExited):
                await self._container_exited(live, event)
            else:
                await self._container_health(live, event)

    async def _reconnect(self, live: LivePod) -> bool:
        """Get a session again and learn what happened meanwhile; False when that is not possible."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RECONNECT_S
        live.restoring = True
        try:
            while (left := deadline - loop.time()) > 0 and not live.gone.is_set() and not live.ending:
                try:
                    await self.join(live, timeout_s=left)
                except VcnodeError as exc:
                    log.info("Pod %s: no session yet", live.pod_id, exc_info=exc)
                    await _gone_soon(live, RECONNECT_PAUSE_S)
                else:
                    return True
            return False
        finally:
            live.restoring = False

    async def _container_health(self, live: LivePod, event: ContainerHealth) -> None:
        """Record what probes say; a guest that repeats itself or reports nonsense costs no disk write."""
        if event.container_id in live.starting:
            live.early_health[event.container_id] = event
            return
        record = self._parts.ledger.find(live.pod_id)
        edit = edits.container_health(event.container_id, event.ready)
        if record is None or edit(record)[0] is record:
            return
        try:
            await self._parts.ledger.change(live.pod_id, edit)
        except VcnodeError as exc:
            # Not worth holding up what else the guest reports: the next session asks for it again.
            log.warning("Pod %s: what its probes say cannot be saved", live.pod_id, exc_info=exc)

    async def _container_exited(self, live: LivePod, event: ContainerExited) -> None:
        if event.container_id in live.starting:
            live.early_exits[event.container_id] = event
            return
        record = self._parts.ledger.find(live.pod_id)
        alive = record is not None and any(
            c.spec.id == event.container_id and c.state in CONTAINER_ALIVE for c in record.containers
        )
        if not alive:
            return  # a guest that reports nonsense costs no disk write
        edit = edits.container_exited(
            event.container_id,
            event.exit_code,
            oom_killed=event.oom_killed,
            reason=_why(event.oom_killed, event.probe_failure),
            now=self._parts.clock(),
            backoff=self._parts.backoff,
        )
        await self._record_exit(live, event.container_id, edit)

    async def _ended_meanwhile(self, live: LivePod, cid: str, state: GuestContainerState | None) -> None:
        edit = edits.container_exited(
            cid,
            None if state is None else state.exit_code,
            oom_killed=state is not None and state.oom_killed,
            reason=(
                "The guest does not know it any more."
                if state is None
                else _why(state.oom_killed, state.probe_failure)
            ),
            now=self._parts.clock(),
            backoff=self._parts.backoff,
        )
        await self._record_exit(live, cid, edit)

    async def _record_exit(self, live: LivePod, cid: str, edit: edits.Edit) -> None:
        """Save that a container ended, and wake whoever waits for it.

        While the database cannot be written, that goes on beside, so that nobody waits for the disk.
        """
        if cid in live.unsaved_exits:
            return
        try:
            await self._parts.ledger.change(live.pod_id, edit)
        except (StorageError, ResourceExhaustedError) as exc:
            log.warning("Pod %s: the end of container %s cannot be saved yet", live.pod_id, cid, exc_info=exc)
            live.unsaved_exits.add(cid)
            self._spawn(live, self._save_exit(live, cid, edit), f"exit of {live.pod_id}/{cid}", cid)
        live.container_ended(cid)

    async def _save_exit(self, live: LivePod, cid: str, edit: edits.Edit) -> None:
        try:
            await self.save(live.pod_id, edit)
        finally:
            live.unsaved_exits.discard(cid)

    async def _undo_unrecorded(
        self, live: LivePod, container: ContainerRecord, state: GuestContainerState
    ) -> None:
        """Undo what a command did that never recorded it, and was answered as failed."""
        if container.state is ContainerState.READY:
            await self._containers.remove(live, container)
        elif state.state in ("running", "paused"):
            await live.require_session().signal_container(
                container_id(container), SIGKILL, everyone=True, timeout_s=REQUEST_LIMIT_S
            )

    async def _put_limits_right(
        self, live: LivePod, container: ContainerRecord, state: GuestContainerState
    ) -> None:
        """Take back an update that was not recorded, or finish one that was."""
        if state.resources in (None, container.limits):
            return
        cid = container_id(container)
        try:
            await live.require_session().update_container(cid, container.limits, timeout_s=REQUEST_LIMIT_S)
        except FailedPreconditionError as exc:  # it has come to use more meanwhile: no reason to end it
            log.warning("Container %s/%s keeps its limits", live.pod_id, cid, exc_info=exc)

    async def _undo_pause(self, live: LivePod, container: ContainerRecord) -> None:
        """Take back a pause or a resume that was not recorded."""
        session, cid = live.require_session(), container_id(container)
        change = (
            session.pause_container if container.state is ContainerState.PAUSED else session.resume_container
        )
        await change(cid, timeout_s=REQUEST_LIMIT_S)


def _why(oom_killed: bool, probe_failure: str | None) -> str | None:
    """Why a container ended, where its exit code does not say it."""
    return "It used more memory than its limit." if oom_killed else probe_failure


def _vm_ended(pod_id: str, reason: str) -> str:
    return f"The VM of pod {pod_id} ended during its start: {reason}"


async def _gone_soon(live: LivePod, within_s: float = VM_END_GRACE_S) -> bool:
    """Whether the VM ends within so many seconds."""
    try:
        async with asyncio.timeout(within_s):
            await live.gone.wait()
    except TimeoutError:
        return False
    return True
