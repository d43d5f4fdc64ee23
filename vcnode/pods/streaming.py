"""The commands that open sessions."""

from __future__ import annotations

from vcnode import aio
from vcnode.drivers.base import CopyDirection, GuestSession
from vcnode.errors import NotFoundError, UnsupportedError
from vcnode.models.call import Call
from vcnode.models.pod import ContainerState, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.sessions import (
    ContainerAttach,
    ContainerCopyIn,
    ContainerCopyOut,
    PodForward,
    Session,
    SessionExec,
    SessionKind,
    SessionOptions,
)
from vcnode.pods import features
from vcnode.pods.conduits import AttachWork, CopyWork, ProcessWork
from vcnode.pods.edits import find_container
from vcnode.pods.forwarding import ForwardWork
from vcnode.pods.lifecycle import require
from vcnode.pods.live import require_live
from vcnode.pods.opened import opened_process
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
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
        features.check_cmd(request.cmd, self._parts.agent(record).info, record.spec.agent_config, "cmd")
        if container is not None:
            require(
                f"Container {record.pod_id}/{request.container_id}",
                container.state,
                _CONTAINER_RUNNING,
                call.verb,
            )
            process = await opened_process(self._parts.secrets, request.cmd, container)
        else:
            process = await opened_process(self._parts.secrets, request.cmd, None)
        tty = request.tty
        running = await guest.execute(
            process,
            container_id=request.container_id,
            tty=None if tty is None else (tty.rows, tty.columns),
            timeout_s=REQUEST_LIMIT_S,
        )
        work = ProcessWork(running, self._parts.tasks, tty=tty is not None)
        return await self._open(
            "exec", request.pod_id, request.container_id, request, work, call, tty=tty is not None
        )

    async def attach(self, request: ContainerAttach, call: Call) -> Session:
        """Open a session with the streams of a container's main process; its end leaves that running.

        Raises:
            FailedPreconditionError: The pod or the container does not run.
            UnsupportedError: The pod's agent cannot attach.
        """
        record, container, guest = self._reach(request.pod_id, request.container_id, call, "attach")
        if container is None:
            raise NotFoundError(f"Pod {record.pod_id} has no container {request.container_id}.")
        name = f"Container {record.pod_id}/{request.container_id}"
        require(name, container.state, _CONTAINER_RUNNING, call.verb)
        tty = container.spec.tty
        running = await guest.attach(request.container_id, tty=tty, timeout_s=REQUEST_LIMIT_S)
        work = AttachWork(running, self._parts.tasks, tty=tty)
        return await self._open(
            "attach", request.pod_id, request.container_id, SessionOptions(), work, call, tty=tty
        )

    async def copy_in(self, request: ContainerCopyIn, call: Call) -> Session:
        """Open a session whose ``stdin`` is a tar stream that is unpacked in a container.

        Raises:
            FailedPreconditionError: The pod does not run, or the container was never started in it.
            UnsupportedError: The pod's agent cannot copy.
        """
        return await self._copy("in", request, call)

    async def copy_out(self, request: ContainerCopyOut, call: Call) -> Session:
        """Open a session whose ``stdout`` is a tar stream of a file or directory; raises as `copy_in`."""
        return await self._copy("out", request, call)

    async def _copy(
        self, direction: CopyDirection, request: ContainerCopyIn | ContainerCopyOut, call: Call
    ) -> Session:
        _, _, guest = self._reach(request.pod_id, request.container_id, call, "copy")
        running = await guest.copy(
            direction,
            container_id=request.container_id,
            path=request.path,
            max_bytes=request.max_bytes,
            timeout_s=REQUEST_LIMIT_S,
        )
        work = CopyWork(running, self._parts.tasks)
        kind: SessionKind = "copy_in" if direction == "in" else "copy_out"
        return await self._open(kind, request.pod_id, request.container_id, SessionOptions(), work, call)

    async def forward(self, request: PodForward, call: Call) -> Session:
        """Open a session through which its client makes connections to ports inside the pod.

        Raises:
            FailedPreconditionError: The pod does not run.
            UnsupportedError: The pod's agent cannot connect.
        """
        self._reach(request.pod_id, None, call, "forward")

        def guest() -> GuestSession:
            return self._reach(request.pod_id, None, call, "forward")[2]

        work = ForwardWork(guest, self._parts.tasks)
        return await self._open("forward", request.pod_id, None, SessionOptions(), work, call)

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
