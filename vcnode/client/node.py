"""One node: a typed method per command.

All methods take ``deadline_s``, seconds from now in which the command is to be done (the node gives up and
undoes it then); without it the command's own limit holds (`vcnode.models.commands`). Those that change
something also take

- ``command_id``: an idempotency key. The same command with the same id is carried out once, however often
  it is sent; use the id of a call whose outcome you do not know. Made anew when absent.
- ``expected_revision``: refuse unless the pod's revision is this one.

They raise the errors of `vcnode.errors`: what the node answered, `UnavailableError` when no such node
listens, and `DeadlineExceededError` when no answer came (the outcome is unknown: ask for the status, or send
the command again with the id in ``details["command_id"]``). When the connection is lost in between, the
command is sent again with the same id.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

from vcnode import tracing
from vcnode.client.requests import NobodyListensError, Requester
from vcnode.client.streams import Opening, StreamMethods
from vcnode.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NodeError,
    NotFoundError,
    UnavailableError,
    VcnodeError,
)
from vcnode.models import wire
from vcnode.models.base import Blob, Reply, Request
from vcnode.models.commands import (
    COMMANDS,
    Audit,
    ContainerCreate,
    ContainerDelete,
    ContainerDeleted,
    ContainerExec,
    ContainerKill,
    ContainerList,
    ContainerName,
    ContainerStatuses,
    ContainerStop,
    ContainerUpdate,
    Empty,
    ImageImport,
    ImagePull,
    ImageRef,
    ImageRemoved,
    ImageStatuses,
    PodAttachVolume,
    PodCreate,
    PodDelete,
    PodDeleted,
    PodDetachVolume,
    PodExec,
    PodList,
    PodName,
    PodResize,
    PodStatuses,
    PodStop,
    PodStopped,
    RegistryAuth,
)
from vcnode.models.console import ConsoleText, PodConsole
from vcnode.models.fleet import (
    Bid,
    Constraints,
    DrainReport,
    NodeCordon,
    NodeDrain,
    NodeLabel,
    NodeStanding,
    PodBid,
    PodRelease,
    PodReleased,
)
from vcnode.models.living import (
    MAX_PROCESSES,
    ContainerProcesses,
    ContainerProcessesOf,
    ContainerWait,
    ContainerWaited,
    WaitCondition,
)
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.node import ImageStatus, NodeAudit, NodeInfo, NodePing
from vcnode.models.pod import (
    MAX_OUTPUT_BYTES,
    Cmd,
    ContainerResources,
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    ExecResult,
    PodSpec,
    PodState,
    PodStatus,
)
from vcnode.models.sessions import (
    ContainerAttach,
    ContainerCopyIn,
    ContainerCopyOut,
    PodForward,
    Session,
    SessionClosed,
    SessionExec,
    SessionList,
    SessionName,
    SessionResume,
    Sessions,
)
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.models.subjects import Subjects
from vcnode.models.violations import violations_of
from vcnode.models.volumes import Volume

GRACE_S = 5.0
"""How much longer than its deadline a command's reply is awaited, so that the node can say what happened."""
NODE_DRAIN_S = COMMANDS["node.drain"].default_timeout_s
DRAIN_MARGIN_S = 60.0
"""Default deadline of a drain beyond its own ``timeout_s``: killing what is left takes time, too."""
EXEC_MARGIN_S = 30.0
"""Default deadline of an exec beyond its own ``timeout_s``."""

FOLLOW_WAIT_S = 15.0
"""Seconds that one request waits for output while a log is followed."""
FOLLOW_MARGIN_S = 5.0
"""Deadline of such a request beyond that, so that a node agent that was killed is asked again soon."""
STATS_MARGIN_S = 30.0
"""Deadline of a sample beyond the interval after which it is due."""
LOG_PATIENCE_S = 60.0
"""Seconds that a node may be away while one of its logs is followed."""
LOG_PAUSE_S = 1.0
"""Seconds between two attempts to reach it."""


class Read(TypedDict, total=False):
    """Options of a command that changes nothing."""

    deadline_s: float | None


class Change(Read, total=False):
    """Options of a command that changes something."""

    command_id: str | None
    expected_revision: int | None


ReplyT = TypeVar("ReplyT", bound=Reply)
RequestT = TypeVar("RequestT", bound=Request)


class NodeClient(StreamMethods):
    """Commands to one node; see the module for what all methods share."""

    def __init__(self, requester: Requester, subjects: Subjects, name: str) -> None:
        try:
            subjects.rpc(name, "node.ping")
        except ValueError as exc:
            raise InvalidArgumentError.field("node", f"{name!r} cannot be the name of a node") from exc
        self._requester = requester
        self._subjects = subjects
        self._name = name

    @property
    def name(self) -> str:
        """The node's name."""
        return self._name

    # Pods

    async def pod_create(
        self,
        spec: PodSpec,
        *,
        reservation: str | None = None,
        **options: Unpack[Change],
    ) -> PodStatus:
        """Prepare a pod; its VM does not run yet. A *reservation* of a bid is used up."""
        request = _make(PodCreate, pod=spec, reservation=reservation)
        return await self._send("pod.create", request, PodStatus, options)

    async def pod_start(
        self,
        pod_id: str,
        **options: Unpack[Change],
    ) -> PodStatus:
        """Start a pod's VM and all its containers."""
        request = _make(PodName, pod_id=pod_id)
        return await self._send("pod.start", request, PodStatus, options)

    async def pod_run(
        self,
        spec: PodSpec,
        *,
        reservation: str | None = None,
        **options: Unpack[Change],
    ) -> PodStatus:
        """Create and start a pod. A *reservation* of a bid is used up."""
        request = _make(PodCreate, pod=spec, reservation=reservation)
        return await self._send("pod.run", request, PodStatus, options)

    async def pod_stop(
        self,
        pod_id: str,
        *,
        grace_s: float | None = None,
        **options: Unpack[Change],
    ) -> PodStopped:
        """Stop a pod's containers and VM, by force after *grace_s* seconds (None: the node's setting)."""
        request = _make(PodStop, pod_id=pod_id, grace_s=grace_s)
        return await self._send("pod.stop", request, PodStopped, options)

    async def pod_pause(self, pod_id: str, **options: Unpack[Change]) -> PodStatus:
        """Stop a pod's vCPUs; its memory stays. Nothing in it can be reached until `pod_resume`."""
        return await self._send("pod.pause", _make(PodName, pod_id=pod_id), PodStatus, options)

    async def pod_resume(self, pod_id: str, **options: Unpack[Change]) -> PodStatus:
        """Let a paused pod run again, with its clock set."""
        return await self._send("pod.resume", _make(PodName, pod_id=pod_id), PodStatus, options)

    async def pod_resize(self, pod_id: str, mem_size_mib: int, **options: Unpack[Change]) -> PodStatus:
        """Change a running pod's memory, within what its VM was started with (``template`` `never` only)."""
        request = _make(PodResize, pod_id=pod_id, mem_size_mib=mem_size_mib)
        return await self._send("pod.resize", request, PodStatus, options)

    async def pod_attach_volume(self, pod_id: str, volume: Volume, **options: Unpack[Change]) -> PodStatus:
        """Add a volume to a pod; containers that are created from then on can mount it."""
        request = _make(PodAttachVolume, pod_id=pod_id, volume=volume)
        return await self._send("pod.attach_volume", request, PodStatus, options)

    async def pod_detach_volume(self, pod_id: str, mount_tag: str, **options: Unpack[Change]) -> PodStatus:
        """Take a volume away from a pod that no container mounts."""
        request = _make(PodDetachVolume, pod_id=pod_id, mount_tag=mount_tag)
        return await self._send("pod.detach_volume", request, PodStatus, options)

    async def pod_delete(
        self,
        pod_id: str,
        *,
        force: bool = False,
        **options: Unpack[Change],
    ) -> PodDeleted:
        """Free and forget a pod; with *force* it is stopped first."""
        request = _make(PodDelete, pod_id=pod_id, force=force)
        return await self._send("pod.delete", request, PodDeleted, options)

    async def pod_bid(
        self,
        spec: PodSpec,
        constraints: Constraints | None = None,
        *,
        hold_s: float = 10.0,
        explain: bool = True,
        **options: Unpack[Read],
    ) -> Bid:
        """Ask whether a pod could run here; what it needs is kept for *hold_s* seconds. See `Fleet.place`."""
        request = _make(
            PodBid, pod=spec, constraints=constraints or Constraints(), hold_s=hold_s, explain=explain
        )
        return await self._send("pod.bid", request, Bid, options)

    async def pod_release(self, reservation: str, **options: Unpack[Read]) -> PodReleased:
        """Give up what a bid has kept. Idempotent."""
        return await self._send(
            "pod.release", _make(PodRelease, reservation=reservation), PodReleased, options
        )

    async def pod_list(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        states: Sequence[PodState] = (),
        **options: Unpack[Read],
    ) -> PodStatuses:
        """List pods that carry all *labels* and *annotations* and are in one of *states* (empty: any)."""
        more = {"annotations": dict(annotations)} if annotations else {}
        request = _make(PodList, labels=dict(labels or {}), states=tuple(states), **more)
        return await self._send("pod.list", request, PodStatuses, options)

    async def pod_status(self, pod_id: str, **options: Unpack[Read]) -> PodStatus:
        """Show one pod."""
        request = _make(PodName, pod_id=pod_id)
        return await self._send("pod.status", request, PodStatus, options)

    async def pod_exec(
        self,
        pod_id: str,
        cmd: Cmd | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        **options: Unpack[Change],
    ) -> ExecResult:
        """Run a command in the guest itself; see `container_exec`."""
        request = _make(
            PodExec,
            pod_id=pod_id,
            cmd=_cmd(cmd),
            stdin=Blob.of(stdin),
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
        )
        options.setdefault("deadline_s", None if timeout_s is None else timeout_s + EXEC_MARGIN_S)
        return await self._send("pod.exec", request, ExecResult, options)

    # Containers

    async def container_create(
        self,
        pod_id: str,
        spec: ContainerSpec,
        **options: Unpack[Change],
    ) -> ContainerStatus:
        """Add a container to a pod."""
        request = _make(ContainerCreate, pod_id=pod_id, container=spec)
        return await self._send("container.create", request, ContainerStatus, options)

    async def container_start(
        self,
        pod_id: str,
        container_id: str,
        **options: Unpack[Change],
    ) -> ContainerStatus:
        """Start a container of a running pod."""
        request = _make(ContainerName, pod_id=pod_id, container_id=container_id)
        return await self._send("container.start", request, ContainerStatus, options)

    async def container_stop(
        self,
        pod_id: str,
        container_id: str,
        *,
        grace_s: float | None = None,
        **options: Unpack[Change],
    ) -> ContainerStatus:
        """Send the stop signal, then SIGKILL after *grace_s* seconds (None: as the container says)."""
        request = _make(ContainerStop, pod_id=pod_id, container_id=container_id, grace_s=grace_s)
        return await self._send("container.stop", request, ContainerStatus, options)

    async def container_kill(
        self,
        pod_id: str,
        container_id: str,
        *,
        signal: int = 9,
        all: bool = False,  # noqa: A002 -- the field's name in the contract
        **options: Unpack[Change],
    ) -> ContainerStatus:
        """Send a signal to the main process, or to *all* processes of the container."""
        request = _make(ContainerKill, pod_id=pod_id, container_id=container_id, signal=int(signal), all=all)
        return await self._send("container.kill", request, ContainerStatus, options)

    async def container_delete(
        self,
        pod_id: str,
        container_id: str,
        *,
        force: bool = False,
        **options: Unpack[Change],
    ) -> ContainerDeleted:
        """Remove a container; with *force* it is killed first."""
        request = _make(ContainerDelete, pod_id=pod_id, container_id=container_id, force=force)
        return await self._send("container.delete", request, ContainerDeleted, options)

    async def container_exec(
        self,
        pod_id: str,
        container_id: str,
        cmd: Cmd | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
        **options: Unpack[Change],
    ) -> ExecResult:
        """Run a command inside a running container and return its output.

        Args:
            pod_id: Pod.
            container_id: Container.
            cmd: Program and arguments, or a `Cmd` with environment, user, and so on.
            stdin: Bytes for its standard input, which is closed after them.
            timeout_s: Seconds after which it is killed; the result then says ``timed_out``.
            max_output_bytes: Bytes kept of each output stream.
            options: See the module; by default ``deadline_s`` is 30 s more than *timeout_s*.
        """
        request = _make(
            ContainerExec,
            pod_id=pod_id,
            container_id=container_id,
            cmd=_cmd(cmd),
            stdin=Blob.of(stdin),
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
        )
        options.setdefault("deadline_s", None if timeout_s is None else timeout_s + EXEC_MARGIN_S)
        return await self._send("container.exec", request, ExecResult, options)

    async def container_pause(
        self, pod_id: str, container_id: str, **options: Unpack[Change]
    ) -> ContainerStatus:
        """Freeze all processes of a container."""
        request = _make(ContainerName, pod_id=pod_id, container_id=container_id)
        return await self._send("container.pause", request, ContainerStatus, options)

    async def container_resume(
        self, pod_id: str, container_id: str, **options: Unpack[Change]
    ) -> ContainerStatus:
        """Let a paused container go on."""
        request = _make(ContainerName, pod_id=pod_id, container_id=container_id)
        return await self._send("container.resume", request, ContainerStatus, options)

    async def container_update(
        self, pod_id: str, container_id: str, resources: ContainerResources, **options: Unpack[Change]
    ) -> ContainerStatus:
        """Change limits of a container: those fields of *resources* that are set; None lifts a limit."""
        request = _make(ContainerUpdate, pod_id=pod_id, container_id=container_id, resources=resources)
        return await self._send("container.update", request, ContainerStatus, options)

    async def container_wait(
        self,
        pod_id: str,
        container_id: str,
        condition: WaitCondition = "exited",
        **options: Unpack[Read],
    ) -> ContainerWaited:
        """Wait until the container's main process has ended, runs, or the container is gone.

        Returns at once if that is so; `DeadlineExceededError` says that it is not so yet.
        """
        request = _make(ContainerWait, pod_id=pod_id, container_id=container_id, condition=condition)
        return await self._send("container.wait", request, ContainerWaited, options)

    async def container_processes(
        self, pod_id: str, container_id: str, *, limit: int = MAX_PROCESSES, **options: Unpack[Read]
    ) -> ContainerProcesses:
        """List the processes of a container, the oldest first."""
        request = _make(ContainerProcessesOf, pod_id=pod_id, container_id=container_id, limit=limit)
        return await self._send("container.processes", request, ContainerProcesses, options)

    async def pod_stats(
        self,
        pod_id: str,
        *,
        guest: bool = True,
        after: datetime | None = None,
        interval_s: float = 1.0,
        **options: Unpack[Read],
    ) -> PodStats:
        """What a pod uses now, or *interval_s* after the sample of the time *after*.

        Without *guest* the guest is not woken, and the reply has its VM only. `follow_stats` goes on asking.
        """
        request = _make(PodStatsOf, pod_id=pod_id, guest=guest, after=after, interval_s=interval_s)
        return await self._send("pod.stats", request, PodStats, options)

    async def pod_console(
        self, pod_id: str, *, max_bytes: int = 64 * 1024, **options: Unpack[Read]
    ) -> ConsoleText:
        """The last *max_bytes* of what the guest of a pod that runs or is paused wrote to its console."""
        request = _make(PodConsole, pod_id=pod_id, max_bytes=max_bytes)
        return await self._send("pod.console", request, ConsoleText, options)

    async def follow_stats(
        self, pod_id: str, *, guest: bool = True, interval_s: float = 1.0
    ) -> AsyncIterator[PodStats]:
        """A sample now and then one every *interval_s* seconds, until the pod stops.

        Who takes longer than that misses samples; nothing waits for him.

        Raises:
            VcnodeError: As `pod_stats`, but for the end of a pod that was there: that ends the iteration.
        """
        after: datetime | None = None
        while True:
            try:
                sample = await self.pod_stats(
                    pod_id,
                    guest=guest,
                    after=after,
                    interval_s=interval_s,
                    deadline_s=interval_s + STATS_MARGIN_S,
                )
            except (FailedPreconditionError, NotFoundError):
                if after is None:
                    raise
                return
            after = sample.time
            yield sample

    async def container_logs(
        self,
        pod_id: str,
        container_id: str | None = None,
        *,
        cursor: str | None = None,
        tail: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        wait_s: float = 0.0,
        **options: Unpack[Read],
    ) -> ContainerLogEntries:
        """One piece of what a container has written; see `vcnode.models.logs.ContainerLogs` for the fields.

        `follow_logs` puts the pieces together.
        """
        request = _make(
            ContainerLogs,
            pod_id=pod_id,
            container_id=container_id,
            cursor=cursor,
            tail=tail,
            since=since,
            until=until,
            wait_s=wait_s,
        )
        return await self._send("container.logs", request, ContainerLogEntries, options)

    async def follow_logs(
        self,
        pod_id: str,
        container_id: str | None = None,
        *,
        follow: bool = True,
        cursor: str | None = None,
        tail: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> AsyncIterator[ContainerLogEntries]:
        """Everything that a container has written and, with *follow*, writes until it ends.

        Goes on where it was when the node agent or the connection was away for up to a minute: nothing is
        repeated. Yields replies with entries; ``cursor`` of the last is where a later call goes on.
        """
        away_since: float | None = None
        while True:
            try:
                reply = await self.container_logs(
                    pod_id,
                    container_id,
                    cursor=cursor,
                    tail=tail,
                    since=since,
                    until=until,
                    wait_s=FOLLOW_WAIT_S if follow else 0.0,
                    deadline_s=FOLLOW_WAIT_S + FOLLOW_MARGIN_S if follow else None,
                )
            except (UnavailableError, DeadlineExceededError):
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if not follow or cursor is None or now - away_since > LOG_PATIENCE_S:
                    raise
                await asyncio.sleep(LOG_PAUSE_S)
                continue
            away_since, cursor = None, reply.cursor
            if reply.entries or reply.missed_bytes:
                yield reply
            if not reply.more and (reply.ended or not follow):
                return

    async def container_list(
        self,
        *,
        pod_id: str | None = None,
        states: Sequence[ContainerState] = (),
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        **options: Unpack[Read],
    ) -> ContainerStatuses:
        """List containers, of one pod or of all, in one of *states* (empty: any), that carry all of these."""
        carried = {"labels": dict(labels or {}), "annotations": dict(annotations or {})}
        more = {name: value for name, value in carried.items() if value}
        request = _make(ContainerList, pod_id=pod_id, states=tuple(states), **more)
        return await self._send("container.list", request, ContainerStatuses, options)

    async def container_status(
        self, pod_id: str, container_id: str, **options: Unpack[Read]
    ) -> ContainerStatus:
        """Show one container."""
        request = _make(ContainerName, pod_id=pod_id, container_id=container_id)
        return await self._send("container.status", request, ContainerStatus, options)

    # Sessions

    async def session_exec(self, request: SessionExec, **options: Unpack[Change]) -> Session:
        """Start a command with its streams in a session; `exec_stream` does it all."""
        return await self._send("session.exec", request, Session, options)

    async def container_attach(self, pod_id: str, container_id: str, **options: Unpack[Change]) -> Session:
        """Open a session with a container's main process; `attach` does it all."""
        request = _make(ContainerAttach, pod_id=pod_id, container_id=container_id)
        return await self._send("container.attach", request, Session, options)

    async def container_copy_in(self, request: ContainerCopyIn, **options: Unpack[Change]) -> Session:
        """Open a session with a tar stream into a container; `copy_in` does it all."""
        return await self._send("container.copy_in", request, Session, options)

    async def container_copy_out(self, request: ContainerCopyOut, **options: Unpack[Change]) -> Session:
        """Open a session with a tar stream out of a container; `copy_out` does it all."""
        return await self._send("container.copy_out", request, Session, options)

    async def pod_forward(self, pod_id: str, **options: Unpack[Change]) -> Session:
        """Open a session with a pod's ports; `forward` does it all."""
        return await self._send("pod.forward", _make(PodForward, pod_id=pod_id), Session, options)

    async def session_resume(self, session_id: str, **options: Unpack[Change]) -> Session:
        """Take over the streams of a session; `resume_stream` does it all."""
        return await self._send(
            "session.resume", _make(SessionResume, session_id=session_id), Session, options
        )

    async def _open_session(self, verb: str, request: Request, options: Opening) -> Session:
        sent: Change = {"command_id": options.get("command_id"), "deadline_s": options.get("deadline_s")}
        return await self._send(verb, request, Session, sent)

    async def session_close(self, session_id: str, **options: Unpack[Change]) -> SessionClosed:
        """End a session and what it runs."""
        request = _make(SessionName, session_id=session_id)
        return await self._send("session.close", request, SessionClosed, options)

    async def session_list(self, *, pod_id: str | None = None, **options: Unpack[Read]) -> Sessions:
        """List sessions, of one pod or of all."""
        return await self._send("session.list", _make(SessionList, pod_id=pod_id), Sessions, options)

    # Images

    async def image_import(self, name: str, path: str, **options: Unpack[Change]) -> ImageStatus:
        """Make an image of a directory or tar file on the node's host."""
        request = _make(ImageImport, name=name, path=path)
        return await self._send("image.import", request, ImageStatus, options)

    async def image_pull(
        self,
        reference: str,
        *,
        name: str | None = None,
        auth: RegistryAuth | None = None,
        **options: Unpack[Change],
    ) -> ImageStatus:
        """Fetch an image from a registry, under *name* (None: under its reference)."""
        request = _make(ImagePull, reference=reference, name=name, auth=auth)
        return await self._send("image.pull", request, ImageStatus, options)

    async def image_list(self, **options: Unpack[Read]) -> ImageStatuses:
        """List images."""
        return await self._send("image.list", Empty(), ImageStatuses, options)

    async def image_status(self, name: str, **options: Unpack[Read]) -> ImageStatus:
        """Show one image."""
        request = _make(ImageRef, name=name)
        return await self._send("image.status", request, ImageStatus, options)

    async def image_remove(self, name: str, **options: Unpack[Change]) -> ImageRemoved:
        """Remove an image that no container uses."""
        request = _make(ImageRef, name=name)
        return await self._send("image.remove", request, ImageRemoved, options)

    # The node itself

    async def node_label(
        self,
        set: Mapping[str, str] | None = None,  # noqa: A002 -- as the field is called
        *,
        remove: Sequence[str] = (),
        **options: Unpack[Change],
    ) -> NodeStanding:
        """Set and remove labels of the node; survives its restarts."""
        request = _make(NodeLabel, set=dict(set or {}), remove=tuple(remove))
        return await self._send("node.label", request, NodeStanding, options)

    async def node_cordon(self, reason: str = "", **options: Unpack[Change]) -> NodeStanding:
        """Have the node take no new pods; those that it has go on."""
        return await self._send("node.cordon", _make(NodeCordon, reason=reason), NodeStanding, options)

    async def node_uncordon(self, **options: Unpack[Change]) -> NodeStanding:
        """Have the node take new pods again."""
        return await self._send("node.uncordon", Empty(), NodeStanding, options)

    async def node_drain(
        self,
        *,
        timeout_s: float = 300.0,
        delete: bool = False,
        reason: str = "drained",
        **options: Unpack[Change],
    ) -> DrainReport:
        """Cordon the node and stop its pods, low priorities first, by force after *timeout_s* seconds."""
        request = _make(NodeDrain, timeout_s=timeout_s, delete=delete, reason=reason)
        if options.get("deadline_s") is None and timeout_s + DRAIN_MARGIN_S > NODE_DRAIN_S:
            options["deadline_s"] = timeout_s + DRAIN_MARGIN_S
        return await self._send("node.drain", request, DrainReport, options)

    async def node_audit(self, *, repair: bool = False, **options: Unpack[Change]) -> NodeAudit:
        """List what the node holds on its host; with *repair*, remove what is nobody's."""
        return await self._send("node.audit", _make(Audit, repair=repair), NodeAudit, options)

    async def node_info(self, **options: Unpack[Read]) -> NodeInfo:
        """Show what the node is and has."""
        return await self._send("node.info", Empty(), NodeInfo, options)

    async def node_ping(self, **options: Unpack[Read]) -> NodePing:
        """Ask for a sign of life."""
        return await self._send("node.ping", Empty(), NodePing, options)

    async def enqueue(self, verb: str, request: Request, **options: Unpack[Change]) -> str:
        """Put a command into the node's queue, where it waits while the node is away.

        Commands about one pod run in the order in which they were put there. The outcome is an event
        ``command.done``, ``command.rejected`` or ``command.expired`` (``deadline_s`` had passed before the
        node came to it) that carries the command's id.

        Args:
            verb: Such as ``pod.run``; only commands that change something.
            request: Its request, such as ``PodCreate``.
            options: As for the other methods.

        Returns:
            The command's id.

        Raises:
            InvalidArgumentError: No such command, or one that changes nothing.
            UnavailableError: JetStream did not take it, or its answer was lost: send it again with the id in
                ``details["command_id"]``. The queue is made by the first node that connects.
        """
        command = COMMANDS.get(verb)
        if command is None or not command.mutates:
            raise InvalidArgumentError.field("verb", f"{verb!r} is no command that changes something")
        headers = _headers(options, self._requester.actor)
        command_id = headers.setdefault(wire.COMMAND_ID, f"c-{uuid.uuid4().hex}")
        try:
            await self._requester.enqueue(
                self._subjects.cmd(self._name, verb),
                request.model_dump_json(exclude_unset=True).encode(),
                headers,
                stream=self._subjects.command_stream,
            )
        except UnavailableError as exc:
            raise _with_id(exc, headers) from exc
        return command_id

    async def _send(self, verb: str, request: Request, reply: type[ReplyT], options: Read | Change) -> ReplyT:
        """Send one command and read its reply."""
        command = COMMANDS[verb]
        deadline_s = options.get("deadline_s")
        headers = _headers(options, self._requester.actor)
        if command.mutates:
            headers.setdefault(wire.COMMAND_ID, f"c-{uuid.uuid4().hex}")
        try:
            msg = await self._requester.request(
                self._subjects.rpc(self._name, verb),
                request.model_dump_json(exclude_unset=True).encode(),
                headers,
                timeout_s=(command.default_timeout_s if deadline_s is None else deadline_s) + GRACE_S,
            )
        except NobodyListensError as exc:
            raise self._absent() from exc
        except TimeoutError as exc:
            raise DeadlineExceededError(
                f"Node {self._name} did not answer {verb} in time; ask for the status.",
                command_id=headers.get(wire.COMMAND_ID),
            ) from exc
        if (error := wire.parse_error(msg.data, msg.headers or {})) is not None:
            raise _with_id(error, headers)
        try:
            return reply.model_validate_json(msg.data)
        except ValidationError as exc:
            raise NodeError(
                f"The reply of node {self._name} to {verb} is not what this version of vcnode understands."
            ) from exc

    def _absent(self) -> UnavailableError:
        return UnavailableError(
            f"No node named {self._name} listens under {self._subjects.prefix!r}; "
            "is it running, and is it on this NATS server?",
            node=self._name,
        )


def _headers(options: Read | Change, actor: str | None) -> dict[str, str]:
    headers = {} if actor is None else {wire.ACTOR: actor}
    if (trace := tracing.current()) is not None:
        headers[wire.TRACEPARENT] = trace
    if (command_id := options.get("command_id")) is not None:
        headers[wire.COMMAND_ID] = str(command_id)
    if (deadline_s := options.get("deadline_s")) is not None:
        headers[wire.DEADLINE] = (datetime.now(UTC) + timedelta(seconds=deadline_s)).isoformat()
    if (revision := options.get("expected_revision")) is not None:
        headers[wire.EXPECTED_REVISION] = str(revision)
    return headers


def _with_id(error: VcnodeError, headers: Mapping[str, str]) -> VcnodeError:
    if wire.COMMAND_ID in headers:
        error.details.setdefault("command_id", headers[wire.COMMAND_ID])
    return error


def _make(model: type[RequestT], **fields: Any) -> RequestT:
    """Build a request, leaving out what the caller did not give.

    Raises:
        InvalidArgumentError: A value is wrong; ``violations`` says which, as if the node had refused it.
    """
    try:
        return model(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as exc:
        violations = violations_of(exc, model)
        raise InvalidArgumentError(
            f"{violations[0]['field']}: {violations[0]['message']}", violations=violations
        ) from exc


def _cmd(cmd: Cmd | Sequence[str]) -> Cmd:
    return cmd if isinstance(cmd, Cmd) else _make(Cmd, args=tuple(cmd))
