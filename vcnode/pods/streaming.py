"""The commands that open sessions."""

from __future__ import annotations

from vcnode import aio
from vcnode.drivers.base import GuestSession
from vcnode.errors import UnsupportedError
from vcnode.models.call import Call
from vcnode.models.pod import ContainerState, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.sessions import Session, SessionExec, SessionKind, SessionOptions
from vcnode.pods.conduits import ProcessWork
from vcnode.pods.edits import find_container
from vcnode.pods.lifecycle import require
from vcnode.pods.live import require_live
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.process import exec_process
from vcnode.pods.sessions import LiveSession, SessionRegistry, Work

_RUNNING = frozenset({PodState.RUNNING})
_CONTAINER_RUNNING = frozenset({ContainerState.RUNNING})
CLOSE_LIMIT_S = 10.0


class StreamCommands:
    """One method per command that opens a session; none holds the pod."""

    def __init__(self, parts: Parts, sessions: SessionRegistry) -> None:
        self._parts = parts
        self._sessions = sessions

    async def exec(self, request: SessionExec, call: Call) -> Session:
        """Start a process in a running container, or in the guest, and open a session with its streams.

        Raises:
            InvalidArgumentError: Nothing to run, or an unknown user, group or capability.
            FailedPreconditionError: The pod or the container does not run.
            UnsupportedError: The pod's agent cannot run commands.
            ResourceExhaustedError: The node has as many sessions as it may.
        """
        record, container, guest = self._reach(request.pod_id, request.container_id, call, "exec")
        if container is not None:
            require(
                f"Container {record.pod_id}/{request.container_id}",
                container.state,
                _CONTAINER_RUNNING,
                call.verb,
            )
            process = exec_process(request.cmd, container.spec, container.image_config)
        else:
            process = exec_process(request.cmd, None)
        running = await guest.execute(process, container_id=request.container_id, timeout_s=REQUEST_LIMIT_S)
        work = ProcessWork(running, self._parts.tasks, tty=request.tty is not None)
        return await self._open("exec", request.pod_id, request.container_id, request, work, call)

    async def _open(
        self,
        kind: SessionKind,
        pod_id: str,
        container_id: str | None,
        options: SessionOptions,
        work: Work,
        call: Call,
        *,
        tty: bool = False,
    ) -> Session:
        session = LiveSession(kind, pod_id, container_id, options, work, call, self._parts.clock(), tty=tty)
        try:
            self._sessions.check_room()
            return self._sessions.begin(session)
        except BaseException:
            await aio.finish(work.close(), timeout_s=CLOSE_LIMIT_S)
            raise

    def _reach(
        self, pod_id: str, container_id: str | None, call: Call, capability: str
    ) -> tuple[PodRecord, ContainerRecord | None, GuestSession]:
        """Find the guest of a running pod, and what is to be reached in it."""
        self._sessions.check_room()
        record = self._parts.ledger.get(pod_id, call)
        agent = self._parts.agent(record)
        if capability not in agent.info.capabilities:
            raise UnsupportedError(f"The agent of pod {pod_id} ({record.agent_type}) cannot do {call.verb}.")
        require(f"Pod {pod_id}", record.state, _RUNNING, call.verb)
        container = None if container_id is None else find_container(record, container_id)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        return record, container, live.require_session()
