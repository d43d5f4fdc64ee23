"""Starting again what ended, as its restart policy says.

What is due stands in the records (``restarts.at``), committed with the end that it follows from. This
module looks at each committed record, keeps one waiting task for each restart that a record asks for, and
drops those that no record asks for any more. So nothing is due twice, nothing is forgotten by a restart of
the node agent, and a stop needs to do no more than change the record.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from vcnode import logs
from vcnode.errors import ResourceExhaustedError, StorageError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.pod import ContainerState, PodState
from vcnode.models.records import PodRecord
from vcnode.pods import edits
from vcnode.pods.commands import ContainerCommands
from vcnode.pods.edits import Edit
from vcnode.pods.locks import RESTART_CONTAINER, RESTART_POD
from vcnode.pods.parts import Parts
from vcnode.pods.start import Starter
from vcnode.pods.statuses import container_id

log = logging.getLogger(__name__)

START_LIMIT_S = 120.0
"""Seconds for one restart, as for ``pod.start``."""
SAVE_PAUSE_S = 5.0
"""Seconds between attempts while the database cannot be written."""

Key = tuple[str, str | None]
"""Pod, and container unless the pod itself is to be restarted."""


@dataclass(slots=True)
class _Planned:
    at: datetime
    task: asyncio.Task[None]
    acting: bool = False
    """It has begun: changes of the record are its own, or come to it through the lock."""


class Restarter:
    """Restarts containers of running pods, and pods whose VM has ended.

    Args:
        parts: Shared.
        containers: Starts containers.
        starter: Starts pods.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        parts: Parts,
        containers: ContainerCommands,
        starter: Starter,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._parts = parts
        self._containers = containers
        self._starter = starter
        self._sleep = sleep
        self._planned: dict[Key, _Planned] = {}
        self._open = False

    def start(self) -> None:
        """Begin: restarts that became due while the node agent was away happen now."""
        self._open = True
        self._parts.ledger.on_change.append(self.consider)
        for pod_id in self._parts.ledger.records:
            self.consider(pod_id)

    async def close(self) -> None:
        """Plan no more and give up what is under way; the records keep what is due. Idempotent."""
        self._open = False
        tasks = {planned.task for planned in self._planned.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def consider(self, pod_id: str) -> None:
        """Make plans and the newest record of a pod agree."""
        if not self._open:
            return
        due = _due(self._parts.ledger.find(pod_id))
        for key, planned in list(self._planned.items()):
            if key[0] == pod_id and not planned.acting and due.get(key) != planned.at:
                del self._planned[key]
                planned.task.cancel()
        for key, at in due.items():
            if key not in self._planned:
                with logs.own_work(**logs.names(*key)):  # what committed the record may be a command
                    task = self._parts.tasks.spawn(self._run(key, at), name=f"restart {key}")
                self._planned[key] = _Planned(at, task)

    async def _run(self, key: Key, at: datetime) -> None:
        pod_id, cid = key
        # The clock may have been set back meanwhile: no wait is longer than the longest.
        left_s = (at - self._parts.clock()).total_seconds()
        if left_s > 0:
            await self._sleep(min(left_s, self._parts.backoff.most_s))
        planned = self._planned[key]
        planned.acting = True
        try:
            while True:
                try:
                    if cid is None:
                        await self._restart_pod(pod_id)
                    else:
                        await self._restart_container(pod_id, cid)
                    break
                except (StorageError, ResourceExhaustedError) as exc:
                    log.warning("Pod %s: its restart cannot be saved yet", pod_id, exc_info=exc)
                    await asyncio.sleep(SAVE_PAUSE_S)
                except VcnodeError as exc:  # a command or the end of the VM came in between
                    log.info("Pod %s: %s", pod_id, exc.message)
                    break
        finally:
            if self._planned.get(key) is planned:
                del self._planned[key]
        self.consider(pod_id)

    async def _restart_container(self, pod_id: str, cid: str) -> None:
        async with self._parts.locks.hold(pod_id, RESTART_CONTAINER, patient=True):
            record = self._parts.ledger.find(pod_id)
            if (pod_id, cid) not in _due(record):
                return
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await self._containers.start_again(pod_id, cid)
            except Exception as exc:  # whatever it is: the policy holds
                log.warning("Container %s/%s could not be restarted", pod_id, cid, exc_info=exc)
                edit = edits.container_restart_failed(
                    cid, _reason(exc), self._parts.clock(), self._parts.backoff
                )
                await self._parts.ledger.change(pod_id, edit)
            else:
                self._parts.observer.restarted("container")

    async def _restart_pod(self, pod_id: str) -> None:
        call = Call("", RESTART_POD)
        async with self._parts.locks.hold(pod_id, RESTART_POD, patient=True):
            if (pod_id, None) not in _due(self._parts.ledger.find(pod_id)):
                return
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await self._starter.start(pod_id, call, began=asyncio.get_running_loop().time())
            except Exception as exc:  # whatever it is: the policy holds
                log.warning("Pod %s could not be restarted", pod_id, exc_info=exc)
                edit: Edit = edits.pod_restart_failed(_reason(exc), self._parts.clock(), self._parts.backoff)
                await self._parts.ledger.change(pod_id, edit)
            else:
                self._parts.observer.restarted("pod")


def _due(record: PodRecord | None) -> dict[Key, datetime]:
    """The restarts that a record asks for and that its state allows, with their times."""
    if record is None:
        return {}
    if record.state is PodState.FAILED:
        if record.restarts.at is None or record.vm is not None or record.leftovers:
            return {}
        return {(record.pod_id, None): record.restarts.at}
    if record.state is not PodState.RUNNING:  # a paused guest answers nothing; its resume is a change
        return {}
    return {
        (record.pod_id, container_id(container)): container.restarts.at
        for container in record.containers
        if container.restarts.at is not None and container.state is ContainerState.STOPPED
    }


def _reason(exc: BaseException) -> str:
    if isinstance(exc, VcnodeError):
        return exc.message
    if isinstance(exc, TimeoutError):
        return f"The restart was not done within {START_LIMIT_S:.0f} s."
    return f"The restart failed in an unexpected way ({type(exc).__name__}); the node's log says how."
