"""Commands about a container's life between its start and its end: pause, resume, wait, and its processes."""

from __future__ import annotations

import asyncio
import logging

from vcnode import aio
from vcnode.errors import NotFoundError, UnavailableError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.living import ContainerProcesses, ContainerWaited, WaitCondition
from vcnode.models.pod import ContainerState, ContainerStatus, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.pods import edits
from vcnode.pods.edits import Edit, find_container
from vcnode.pods.ledger import check_revision
from vcnode.pods.lifecycle import CONTAINER_ALIVE, ContainerStep, next_container_state, require
from vcnode.pods.live import require_live
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts

log = logging.getLogger(__name__)

_POD_RUNNING = frozenset({PodState.RUNNING})


class LifeCommands:
    """One method per command."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._waits: set[asyncio.Future[ContainerWaited]] = set()

    async def pause(self, pod_id: str, cid: str, call: Call) -> ContainerStatus:
        """Freeze all processes of a running container. Idempotent: a paused one stays paused.

        Raises:
            NotFoundError: There is no such pod or container.
            FailedPreconditionError: One of them does not run.
            AgentError: The guest did not do it; the container runs on.
        """
        return await self._change(pod_id, cid, ContainerState.PAUSED, ContainerStep.PAUSE, call)

    async def resume(self, pod_id: str, cid: str, call: Call) -> ContainerStatus:
        """Let a paused container go on. Idempotent: a running one runs on. Raises as `pause`."""
        return await self._change(pod_id, cid, ContainerState.RUNNING, ContainerStep.RESUME, call)

    async def _change(
        self, pod_id: str, cid: str, wanted: ContainerState, step: ContainerStep, call: Call
    ) -> ContainerStatus:
        ledger = self._parts.ledger
        async with self._parts.locks.hold(pod_id, call.verb):
            record, container = self._find(pod_id, cid, call)
            require(f"Pod {pod_id}", record.state, _POD_RUNNING, call.verb)
            if container.state is wanted:
                return ledger.container_status(record, cid)
            next_container_state(f"{pod_id}/{cid}", container.state, step, call.verb)
            pausing = wanted is ContainerState.PAUSED
            edit: Edit = (edits.container_paused if pausing else edits.container_resumed)(cid, call.verb)
            try:
                await self._set_paused(record, cid, pausing, call)
                await ledger.change(pod_id, edit, call)
            except BaseException:
                await aio.finish(self._undo(pod_id, cid, wanted, call), timeout_s=2 * REQUEST_LIMIT_S)
                raise
            return ledger.container_status(ledger.get(pod_id), cid)

    async def _set_paused(self, record: PodRecord, cid: str, paused: bool, call: Call) -> None:
        live = require_live(self._parts.live, record.pod_id, record.state, call.verb)
        session = live.require_session()
        change = session.pause_container if paused else session.resume_container
        await change(cid, timeout_s=REQUEST_LIMIT_S)

    async def _undo(self, pod_id: str, cid: str, wanted: ContainerState, call: Call) -> None:
        """Make the guest agree with the record again; what cannot be done now, the next session does."""
        try:
            record, container = self._find(pod_id, cid, call)
            if container.state in CONTAINER_ALIVE and container.state is not wanted:
                await self._set_paused(record, cid, container.state is ContainerState.PAUSED, call)
        except VcnodeError as exc:
            log.warning("Pod %s: %s of container %s was not undone", pod_id, call.verb, cid, exc_info=exc)

    async def wait(self, pod_id: str, cid: str, condition: WaitCondition) -> ContainerWaited:
        """Wait until *condition* holds for a container; at once if it does. Does not hold the pod.

        Raises:
            NotFoundError: There is no such pod or container (any more), and *condition* is not ``removed``.
            UnavailableError: The node stops.
        """
        ledger = self._parts.ledger
        future: asyncio.Future[ContainerWaited] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if future.done():
                return
            try:
                record = ledger.get(pod_id)
                status = ledger.container_status(record, cid)
            except NotFoundError as exc:
                if condition == "removed":
                    future.set_result(ContainerWaited(pod_id=pod_id, container_id=cid, condition=condition))
                else:
                    future.set_exception(exc)
                return
            if _holds(condition, status):
                future.set_result(
                    ContainerWaited(pod_id=pod_id, container_id=cid, condition=condition, container=status)
                )

        with ledger.listening(pod_id, look):
            look()
            self._waits.add(future)
            try:
                return await future
            finally:
                self._waits.discard(future)

    def end_waits(self) -> None:
        """Answer all who wait: the node stops."""
        for future in self._waits:
            if not future.done():
                future.set_exception(UnavailableError("The node is stopping; wait again when it is back."))

    async def processes(self, pod_id: str, cid: str, limit: int, call: Call) -> ContainerProcesses:
        """The processes of a container that runs or is paused. Does not hold the pod.

        Raises:
            NotFoundError: There is no such pod or container.
            FailedPreconditionError: It does not run, or its pod does not.
        """
        record, container = self._find(pod_id, cid, call)
        require(f"Pod {pod_id}", record.state, _POD_RUNNING, call.verb)
        require(f"Container {pod_id}/{cid}", container.state, CONTAINER_ALIVE, call.verb)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        found, total = await live.require_session().list_processes(
            cid, limit=limit, timeout_s=REQUEST_LIMIT_S
        )
        return ContainerProcesses(pod_id=pod_id, container_id=cid, processes=tuple(found), total=total)

    def _find(self, pod_id: str, cid: str, call: Call) -> tuple[PodRecord, ContainerRecord]:
        record = self._parts.ledger.get(pod_id)
        check_revision(record, call)
        return record, find_container(record, cid)


def _holds(condition: WaitCondition, status: ContainerStatus) -> bool:
    match condition:
        case "exited":
            return status.state is ContainerState.STOPPED
        case "running":
            return status.state is ContainerState.RUNNING
        case "removed":
            return False
