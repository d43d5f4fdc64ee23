"""The commands about containers, and exec."""

from __future__ import annotations

import asyncio

from vcnode import aio
from vcnode.errors import (
    AbortedError,
    AgentError,
    AlreadyExistsError,
    StorageError,
    UnsupportedError,
)
from vcnode.models.call import Call
from vcnode.models.commands import ContainerDeleted, ExecOptions
from vcnode.models.pod import (
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    ExecResult,
    PodState,
    RestartPolicy,
)
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.pods import edits, features
from vcnode.pods.admission import Admission
from vcnode.pods.containers import Containers
from vcnode.pods.edits import find_container
from vcnode.pods.exec import collect
from vcnode.pods.ledger import check_revision
from vcnode.pods.lifecycle import (
    CONTAINER_ALIVE,
    POD_TAKES_CONTAINERS,
    ContainerStep,
    next_container_state,
    require,
)
from vcnode.pods.live import LivePod, require_live
from vcnode.pods.locks import RESTART_CONTAINER
from vcnode.pods.opened import opened_process
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.release import remove_layers
from vcnode.pods.statuses import container_id
from vcnode.pods.watch import Watcher

_RUNNING = frozenset({PodState.RUNNING})
_CONTAINER_RUNNING = frozenset({ContainerState.RUNNING})
RESTARTS = frozenset({RESTART_CONTAINER})
"""What ending a container interrupts."""
UNDO_LIMIT_S = 60.0
"""Seconds for taking back a container's start."""


class ContainerCommands:
    """One method per command about containers."""

    def __init__(self, parts: Parts, containers: Containers, watcher: Watcher, admission: Admission) -> None:
        self._parts = parts
        self._containers = containers
        self._watcher = watcher
        self._admission = admission

    async def create(self, pod_id: str, spec: ContainerSpec, call: Call) -> ContainerStatus:
        """Add a container to a pod; nothing is started, also if the pod runs.

        Idempotent: the same spec under the same id again is a success. In a pod that does not run it starts
        with the pod; in a running one by ``container.start``.

        Raises:
            AlreadyExistsError: The pod has another container of that id.
            InvalidArgumentError, NotFoundError, UnsupportedError: As `Admission.container`.
            ResourceExhaustedError: The pod has as many containers as it may.
        """
        async with self._parts.locks.hold(pod_id, call.verb):
            record = self._parts.ledger.get(pod_id, call)
            known = next((c for c in record.containers if spec.id is not None and c.spec.id == spec.id), None)
            if known is not None:
                if known.spec != spec:
                    raise AlreadyExistsError(
                        f"Pod {pod_id} has another container {spec.id}; delete it, or choose another id.",
                        pod_id=pod_id,
                        container_id=spec.id,
                    )
                return self._parts.ledger.container_status(record, container_id(known))
            require(f"Pod {pod_id}", record.state, POD_TAKES_CONTAINERS, call.verb)
            container = await self._admission.container(spec, record)
            record = await self._parts.ledger.change(
                pod_id, edits.container_added(container, call.verb), call
            )
            return self._parts.ledger.container_status(record, container_id(container))

    async def start(self, pod_id: str, cid: str, call: Call) -> ContainerStatus:
        """Start a container of a running pod; one whose program cannot be executed stops with 127 or 126.

        Raises:
            NotFoundError: There is no such pod or container.
            FailedPreconditionError: The pod does not run, or the container runs already.
            DriverError: A driver failed; all is undone and the container is what it was.
        """
        async with self._parts.locks.hold(pod_id, call.verb):
            record, container = self._find(pod_id, cid, call)
            require(f"Pod {pod_id}", record.state, _RUNNING, call.verb)
            next_container_state(f"{pod_id}/{cid}", container.state, ContainerStep.START, call.verb)
            live = self._live(record, call)
            pid = await self._containers.launch(live, record, container)
            await aio.finish(self._record_start(live, cid, pid, call), timeout_s=UNDO_LIMIT_S)
            return self._parts.ledger.container_status(self._parts.ledger.get(pod_id), cid)

    async def start_again(self, pod_id: str, cid: str) -> None:
        """Start a container that has ended, as its restart policy wants. The caller holds the pod's lock.

        Raises:
            VcnodeError: It did not start; all is undone.
        """
        call = Call("", RESTART_CONTAINER)
        record, container = self._find(pod_id, cid, call)
        live = self._live(record, call)
        pid = await self._containers.launch(live, record, container)
        await aio.finish(self._record_start(live, cid, pid, call), timeout_s=UNDO_LIMIT_S)

    async def stop(self, pod_id: str, cid: str, grace_s: float | None, call: Call) -> ContainerStatus:
        """Ask a container's main process to end, and kill all of it after *grace_s* seconds.

        Its restart policy starts it no more, until a command does. Idempotent: a container that does not run
        stays what it is.

        Args:
            pod_id: The pod.
            cid: The container.
            grace_s: Seconds between the stop signal and SIGKILL; None: the container's ``stop_timeout_s``.
            call: The command.

        Raises:
            NotFoundError: There is no such pod or container.
            AgentError: The guest did not do it; the container runs on as far as is known.
        """
        async with self._parts.locks.hold(pod_id, call.verb, overtakes=RESTARTS):
            record, container = self._find(pod_id, cid, call)
            live = self._live(record, call) if container.state in CONTAINER_ALIVE else None
            await self._cancel_restarts(pod_id, container, call)
            if live is not None:
                grace = container.spec.stop_timeout_s if grace_s is None else grace_s
                await self._containers.halt(live, container, grace_s=grace)
                self._require_recorded(pod_id, cid)
            return self._parts.ledger.container_status(self._parts.ledger.get(pod_id), cid)

    async def kill(self, pod_id: str, cid: str, signal: int, everyone: bool, call: Call) -> ContainerStatus:
        """Send a signal to a running container; returns when it is sent. Does not hold the pod.

        Raises:
            FailedPreconditionError: The container does not run.
        """
        record, container = self._find(pod_id, cid, call)
        require(f"Container {pod_id}/{cid}", container.state, CONTAINER_ALIVE, call.verb)
        session = self._live(record, call).require_session()
        await session.signal_container(cid, signal, everyone=everyone, timeout_s=REQUEST_LIMIT_S)
        return self._parts.ledger.container_status(self._parts.ledger.get(pod_id), cid)

    async def delete(self, pod_id: str, cid: str, force: bool, call: Call) -> ContainerDeleted:
        """Remove a container that does not run. Idempotent, and can be repeated after an error.

        Args:
            pod_id: The pod.
            cid: The container.
            force: Whether a running container is killed first.
            call: The command.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: The container runs, and *force* was not given.
            DriverError: It could not be taken out of the guest; it is still listed.
        """
        async with self._parts.locks.hold(pod_id, call.verb, overtakes=RESTARTS):
            record = self._parts.ledger.get(pod_id, call)
            container = next((c for c in record.containers if c.spec.id == cid), None)
            if container is None:
                return ContainerDeleted(pod_id=pod_id, container_id=cid, existed=False)
            require(f"Pod {pod_id}", record.state, POD_TAKES_CONTAINERS, call.verb)
            if not force:
                idle = frozenset(ContainerState) - CONTAINER_ALIVE
                require(f"Container {pod_id}/{cid}", container.state, idle, call.verb)
            await self._cancel_restarts(pod_id, container, call)
            if record.state is PodState.RUNNING:
                live = self._live(record, call)
                if container.state in CONTAINER_ALIVE:
                    await self._containers.halt(live, container, grace_s=0)
                    self._require_recorded(pod_id, cid)
                await self._containers.remove(live, container)
            await remove_layers(self._parts, [container])
            await self._parts.logs.forget(pod_id, cid)
            await self._parts.ledger.change(pod_id, edits.container_removed(cid), call)
            return ContainerDeleted(pod_id=pod_id, container_id=cid, existed=True)

    async def exec(self, pod_id: str, cid: str | None, options: ExecOptions, call: Call) -> ExecResult:
        """Run a command in a running container, or in the guest itself (None). Does not hold the pod.

        The command is killed when its time is over (the result says so), when the caller goes away, and when
        the session with the guest is lost. Output beyond the bound is counted and dropped.

        Raises:
            InvalidArgumentError: Nothing to run, or an unknown user, group or capability.
            FailedPreconditionError: The pod or the container does not run.
            UnsupportedError: The pod's agent cannot run commands.
            AbortedError: The pod was stopped meanwhile.
            AgentError: The session with the guest was lost meanwhile.
        """
        began = asyncio.get_running_loop().time()
        record = self._parts.ledger.get(pod_id, call)
        agent = self._parts.agent(record)
        if "exec" not in agent.info.capabilities:
            raise UnsupportedError(f"The agent of pod {pod_id} ({record.agent_type}) cannot run commands.")
        features.check_cmd(options.cmd, agent.info, record.spec.agent_config, "cmd")
        require(f"Pod {pod_id}", record.state, _RUNNING, call.verb)
        container = None if cid is None else find_container(record, cid)
        if container is not None:
            require(f"Container {pod_id}/{cid}", container.state, _CONTAINER_RUNNING, call.verb)
        if container is None:
            process = await opened_process(self._parts.secrets, options.cmd, None)
        else:
            process = await opened_process(self._parts.secrets, options.cmd, container)
        live = self._live(record, call)
        what = f"The command in {pod_id if cid is None else f'{pod_id}/{cid}'}"
        try:
            running = await live.require_session().execute(
                process, container_id=cid, timeout_s=REQUEST_LIMIT_S
            )
            return await collect(running, options, self._parts.tasks, began=began, what=what)
        except AgentError as exc:
            if live.ending:
                raise AbortedError(f"Pod {pod_id} was stopped while a command ran in it.") from exc
            raise

    async def _record_start(self, live: LivePod, cid: str, pid: int, call: Call) -> None:
        """Record that a container runs, and its end if that came already; take it back if that fails."""
        edit = edits.container_started(cid, pid, self._parts.clock(), call.verb)
        try:
            await self._parts.ledger.change(live.pod_id, edit, call)
        except BaseException:
            container = find_container(self._parts.ledger.get(live.pod_id), cid)
            live.container_did_not_start(cid)
            await self._containers.remove(live, container)
            raise
        await self._watcher.replay_exits(live)

    async def _cancel_restarts(self, pod_id: str, container: ContainerRecord, call: Call) -> None:
        """See that the container's policy, if it has one, does not start it again."""
        if container.spec.restart_policy is not RestartPolicy.NEVER:
            edit = edits.container_restarts_cancelled(container_id(container))
            await self._parts.ledger.change(pod_id, edit, call)

    def _require_recorded(self, pod_id: str, cid: str) -> None:
        """See that the end of a container was saved, and not only seen."""
        if find_container(self._parts.ledger.get(pod_id), cid).state in CONTAINER_ALIVE:
            raise StorageError(
                f"Container {pod_id}/{cid} has ended, but the node's database cannot be written; try again."
            )

    def _find(self, pod_id: str, cid: str, call: Call) -> tuple[PodRecord, ContainerRecord]:
        record = self._parts.ledger.get(pod_id)
        check_revision(record, call)
        return record, find_container(record, cid)

    def _live(self, record: PodRecord, call: Call) -> LivePod:
        if record.state is PodState.PAUSED:  # the guest would not answer
            require(f"Pod {record.pod_id}", record.state, _RUNNING, call.verb)
        return require_live(self._parts.live, record.pod_id, record.state, call.verb)
