"""All commands on one screen: verb, request, reply, and whether it changes something.

Handlers, bus, client, CLI and contracts are all derived from `COMMANDS`; a verb that is not here does
not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import Blob, ContainerId, HostPath, ImageName, Labels, NoNul, PodId, Reply, Request
from vcnode.models.console import ConsoleText, PodConsole
from vcnode.models.fleet import (
    Bid,
    DrainReport,
    NodeCordon,
    NodeDrain,
    NodeLabel,
    NodeStanding,
    PodBid,
    PodRelease,
    PodReleased,
    ReservationId,
)
from vcnode.models.living import (
    ContainerProcesses,
    ContainerProcessesOf,
    ContainerWait,
    ContainerWaited,
)
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.node import ImageStatus, NodeAudit, NodeInfo, NodePing
from vcnode.models.pod import (
    MAX_MEM_SIZE_MIB,
    MAX_OUTPUT_BYTES,
    MIN_MEM_SIZE_MIB,
    Cmd,
    ContainerResources,
    ContainerSpec,
    ContainerState,
    ContainerStatus,
    ExecResult,
    PodSpec,
    PodState,
    PodStatus,
    StopOutcome,
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
from vcnode.models.signals import Signal
from vcnode.models.stats import PodStats, PodStatsOf
from vcnode.models.volumes import MountTag, Volume


class Empty(Request):
    """A request without fields; an empty body counts as ``{}``."""


class PodCreate(Request):
    """``pod.create`` and ``pod.run``."""

    pod: PodSpec
    """The pod."""
    reservation: ReservationId | None = None
    """Of a bid: what the pod needs was kept for it. Used up when the pod is made."""


class PodName(Request):
    """A request that names a pod."""

    pod_id: PodId


class PodStop(Request):
    """``pod.stop``."""

    pod_id: PodId
    grace_s: float | None = Field(default=None, ge=0, le=3600)
    """Seconds that containers and guest may take; 0 kills at once. Default: the node's setting."""


class PodResize(PodName):
    """``pod.resize``."""

    mem_size_mib: int = Field(ge=MIN_MEM_SIZE_MIB, le=MAX_MEM_SIZE_MIB)
    """Memory that it is to have, in MiB; at most what its VM was started with."""


class PodAttachVolume(PodName):
    """``pod.attach_volume``."""

    volume: Volume
    """The volume."""


class PodDetachVolume(PodName):
    """``pod.detach_volume``."""

    mount_tag: MountTag
    """The volume."""


class PodDelete(Request):
    """``pod.delete``."""

    pod_id: PodId
    force: bool = False
    """Whether a running pod is stopped first; without it, deleting a running pod fails."""


class PodList(Request):
    """``pod.list``."""

    labels: Labels = {}
    """Only pods that carry all of these labels."""
    annotations: Labels = {}
    """Only pods that carry all of these annotations."""
    states: tuple[PodState, ...] = ()
    """Only pods in one of these states; empty means any."""


class ExecOptions(Request):
    """A command to run inside a pod, without a terminal."""

    cmd: Cmd
    """What to run; ``args`` must not be empty."""
    stdin: Blob = Blob()
    """Bytes for standard input, which is closed after them."""
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds after which the command is killed; the reply then says ``timed_out``."""
    max_output_bytes: int = Field(default=MAX_OUTPUT_BYTES, ge=0, le=MAX_OUTPUT_BYTES)
    """Bytes kept of each output stream; the rest is read, counted and dropped."""


class PodExec(ExecOptions):
    """``pod.exec``: run in the guest itself, outside all containers."""

    pod_id: PodId


class ContainerExec(ExecOptions):
    """``container.exec``: run inside a running container."""

    pod_id: PodId
    container_id: ContainerId


class ContainerCreate(Request):
    """``container.create``."""

    pod_id: PodId
    container: ContainerSpec
    """The container."""


class ContainerName(Request):
    """A request that names a container."""

    pod_id: PodId
    container_id: ContainerId


class ContainerStop(ContainerName):
    """``container.stop``."""

    grace_s: float | None = Field(default=None, ge=0, le=3600)
    """Seconds between the stop signal and SIGKILL. Default: the container's ``stop_timeout_s``."""


class ContainerKill(ContainerName):
    """``container.kill``."""

    signal: Signal = 9
    """Signal, by number or name."""
    all: bool = False
    """Whether every process of the container gets it, not only the main one."""


class ContainerDelete(ContainerName):
    """``container.delete``."""

    force: bool = False
    """Whether a running container is killed first."""


class ContainerUpdate(ContainerName):
    """``container.update``."""

    resources: ContainerResources
    """Limits to change: what is not given stays as it is, null lifts a limit."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.resources.model_fields_set:
            raise ValueError("'resources' must have at least one field")
        return self


class ContainerList(Request):
    """``container.list``."""

    pod_id: PodId | None = None
    """Only containers of this pod."""
    labels: Labels = {}
    """Only containers that carry all of these labels."""
    annotations: Labels = {}
    """Only containers that carry all of these annotations."""
    states: tuple[ContainerState, ...] = ()
    """Only containers in one of these states; empty means any."""


class ImageImport(Request):
    """``image.import``."""

    name: ImageName
    path: HostPath
    """On the node's host: an OCI image layout, a root filesystem, or a tar file of either or of ``docker
    save``."""


class RegistryAuth(Request):
    """Who pulls. It is used for this pull, and kept nowhere."""

    username: Annotated[NoNul, StringConstraints(pattern=r"^[^:\x00]+$", max_length=256)]
    """User name."""
    password: Annotated[NoNul, StringConstraints(max_length=16_384)] = Field(repr=False)
    """Password or token."""


class ImagePull(Request):
    """``image.pull``."""

    reference: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]{0,254}$")]
    """Image in a registry, such as ``registry.example/team/app:1.2``; without a registry, Docker Hub's."""
    name: ImageName | None = None
    """Name to give it on the node. Default: the reference."""
    auth: RegistryAuth | None = None
    """Credentials. Default: the node's, if it has some for that registry."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.reference != self.reference.lower():
            raise ValueError("'name' is required when 'reference' has upper case letters")
        return self


class ImageRef(Request):
    """A request that names an image."""

    name: ImageName


class Audit(Request):
    """``node.audit``."""

    repair: bool = False
    """Whether what is nobody's is removed."""


class PodStopped(Reply):
    """Reply of ``pod.stop``."""

    pod: PodStatus
    """The pod afterwards."""
    outcome: StopOutcome
    """``graceful``; ``forced`` when QEMU had to be killed; ``absent`` when nothing ran."""


class PodDeleted(Reply):
    """Reply of ``pod.delete``."""

    pod_id: str
    """The pod."""
    existed: bool
    """False when there was no such pod: deleting is idempotent."""


class PodStatuses(Reply):
    """Reply of ``pod.list``."""

    pods: tuple[PodStatus, ...]
    """Ordered by creation."""


class ContainerDeleted(Reply):
    """Reply of ``container.delete``."""

    pod_id: str
    """The pod."""
    container_id: str
    """The container."""
    existed: bool
    """False when there was no such container: deleting is idempotent."""


class ContainerStatuses(Reply):
    """Reply of ``container.list``."""

    containers: tuple[ContainerStatus, ...]
    """Ordered by pod, then by creation."""


class ImageStatuses(Reply):
    """Reply of ``image.list``."""

    images: tuple[ImageStatus, ...]
    """Ordered by name."""


class ImageRemoved(Reply):
    """Reply of ``image.remove``."""

    name: str
    """The image."""
    existed: bool
    """False when there was no such image: removing is idempotent."""


@dataclass(frozen=True, slots=True)
class Command:
    """One verb of the API."""

    verb: str
    request: type[Request]
    reply: type[Reply]
    mutates: bool
    """Whether it changes something: then it has a command id and its reply is kept."""
    summary: str
    default_timeout_s: float = 30.0
    """Limit when the caller sets no deadline."""


_ALL = (
    Command("pod.create", PodCreate, PodStatus, True, "Prepare a pod; its VM does not run yet."),
    Command("pod.start", PodName, PodStatus, True, "Start a pod's VM and all its containers.", 120.0),
    Command("pod.run", PodCreate, PodStatus, True, "Create and start a pod.", 120.0),
    Command("pod.stop", PodStop, PodStopped, True, "Stop a pod's containers and VM.", 120.0),
    Command("pod.pause", PodName, PodStatus, True, "Stop a pod's vCPUs; its memory stays."),
    Command("pod.resume", PodName, PodStatus, True, "Let a paused pod run again.", 60.0),
    Command("pod.resize", PodResize, PodStatus, True, "Change a running pod's memory.", 60.0),
    Command("pod.attach_volume", PodAttachVolume, PodStatus, True, "Add a volume to a pod."),
    Command("pod.detach_volume", PodDetachVolume, PodStatus, True, "Take a volume away from a pod."),
    Command("pod.delete", PodDelete, PodDeleted, True, "Free and forget a pod that is not running.", 120.0),
    Command("pod.list", PodList, PodStatuses, False, "List pods."),
    Command("pod.status", PodName, PodStatus, False, "Show one pod."),
    Command("pod.stats", PodStatsOf, PodStats, False, "Show what a pod and its containers use.", 300.0),
    Command("pod.console", PodConsole, ConsoleText, False, "Show what a pod's guest wrote to its console."),
    Command("pod.exec", PodExec, ExecResult, True, "Run a command in a pod's guest.", 600.0),
    Command("container.create", ContainerCreate, ContainerStatus, True, "Add a container to a pod."),
    Command("container.start", ContainerName, ContainerStatus, True, "Start a container.", 60.0),
    Command("container.stop", ContainerStop, ContainerStatus, True, "Stop a container.", 120.0),
    Command("container.kill", ContainerKill, ContainerStatus, True, "Send a signal to a container."),
    Command("container.pause", ContainerName, ContainerStatus, True, "Freeze all processes of a container."),
    Command("container.resume", ContainerName, ContainerStatus, True, "Let a paused container go on."),
    Command("container.update", ContainerUpdate, ContainerStatus, True, "Change a container's limits."),
    Command("container.delete", ContainerDelete, ContainerDeleted, True, "Remove a stopped container."),
    Command("container.exec", ContainerExec, ExecResult, True, "Run a command in a container.", 600.0),
    Command("container.wait", ContainerWait, ContainerWaited, False, "Wait for a container.", 300.0),
    Command(
        "container.processes",
        ContainerProcessesOf,
        ContainerProcesses,
        False,
        "List a container's processes.",
    ),
    Command("container.logs", ContainerLogs, ContainerLogEntries, False, "Show a container's output.", 300.0),
    Command("container.list", ContainerList, ContainerStatuses, False, "List containers."),
    Command("container.status", ContainerName, ContainerStatus, False, "Show one container."),
    Command("container.attach", ContainerAttach, Session, True, "Attach to a container's main process."),
    Command("container.copy_in", ContainerCopyIn, Session, True, "Unpack a tar stream in a container.", 60.0),
    Command("container.copy_out", ContainerCopyOut, Session, True, "Pack files of a container.", 60.0),
    Command("pod.forward", PodForward, Session, True, "Connect to ports inside a pod."),
    Command(
        "session.exec", SessionExec, Session, True, "Start a command with its streams in a session.", 60.0
    ),
    Command("session.resume", SessionResume, Session, True, "Take over the streams of a session."),
    Command("session.close", SessionName, SessionClosed, True, "End a session and what it runs."),
    Command("session.list", SessionList, Sessions, False, "List sessions."),
    Command("image.import", ImageImport, ImageStatus, True, "Make an image of a directory or tar.", 600.0),
    Command("image.pull", ImagePull, ImageStatus, True, "Fetch an image from a registry.", 600.0),
    Command("image.list", Empty, ImageStatuses, False, "List images."),
    Command("image.status", ImageRef, ImageStatus, False, "Show one image."),
    Command("image.remove", ImageRef, ImageRemoved, True, "Remove an image that no container uses."),
    Command("pod.bid", PodBid, Bid, False, "Ask whether a pod could run here, and keep what it needs.", 5.0),
    Command("pod.release", PodRelease, PodReleased, False, "Give up what a bid has kept."),
    Command("node.label", NodeLabel, NodeStanding, True, "Change the node's labels."),
    Command("node.cordon", NodeCordon, NodeStanding, True, "Take no new pods."),
    Command("node.uncordon", Empty, NodeStanding, True, "Take new pods again."),
    Command("node.drain", NodeDrain, DrainReport, True, "Stop all pods, and take no new ones.", 600.0),
    Command("node.audit", Audit, NodeAudit, True, "List what the node holds on its host.", 300.0),
    Command("node.info", Empty, NodeInfo, False, "Show what the node is and has."),
    Command("node.ping", Empty, NodePing, False, "Ask for a sign of life."),
)

COMMANDS: dict[str, Command] = {c.verb: c for c in _ALL}
"""Every command by its verb."""

BROADCAST = frozenset({"node.ping", "pod.bid"})
"""Verbs that every node also answers on the ``all`` subject."""
