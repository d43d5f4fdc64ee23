"""Sessions: what carries the streams of one exec, attach, copy or forward (docs/streams.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from vcnode.models.base import ContainerId, Moment, PodId, Reply, Request
from vcnode.models.pod import Cmd

SessionId = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-f]{32}$"),
    Field(description="Session id, from the reply that opened it. Who knows it can take it over."),
]
SessionKind = Literal["exec", "attach", "copy_in", "copy_out", "forward"]
ContainerPath = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=4096)]
MAX_COPY_BYTES = 1 << 40
"""Most bytes that one copy may move."""


class TerminalSize(Request):
    """Size of a terminal."""

    rows: int = Field(default=24, ge=1, le=10_000)
    """Lines."""
    columns: int = Field(default=80, ge=1, le=10_000)
    """Characters of a line."""


class SessionOptions(Request):
    """What becomes of a session without its client."""

    when_lost: Literal["kill", "keep"] = "kill"
    """Whether the session ends, and its process with it, when nothing is heard of the client any more; or is
    kept for ``session.resume``."""
    lost_after_s: float = Field(default=20.0, ge=5, le=3600)
    """Seconds of silence after which the client counts as lost. Clients speak every 2.5 s."""
    keep_s: float = Field(default=600.0, ge=0, le=86_400)
    """Seconds for which a session without a client is kept, also one that its client has detached from."""


class SessionExec(SessionOptions):
    """``session.exec``."""

    pod_id: PodId
    container_id: ContainerId | None = None
    """A running container; absent: the guest itself, outside all containers."""
    cmd: Cmd
    """What to run; ``args`` must not be empty."""
    tty: TerminalSize | None = None
    """Run it on a terminal of that size. Then all output is ``stdout``."""


class ContainerAttach(Request):
    """``container.attach``."""

    pod_id: PodId
    container_id: ContainerId
    """A running container. Input goes to its main process only if it was made with ``stdin``."""


class ContainerCopyOut(Request):
    """``container.copy_out``."""

    pod_id: PodId
    container_id: ContainerId
    """A container of the pod; it need not run."""
    path: ContainerPath
    """The file or directory; what is below it on the same file system comes along."""
    max_bytes: int = Field(default=MAX_COPY_BYTES, ge=0, le=MAX_COPY_BYTES)
    """Most bytes of content."""


class ContainerCopyIn(Request):
    """``container.copy_in``."""

    pod_id: PodId
    container_id: ContainerId
    """A container of the pod; it need not run."""
    path: ContainerPath
    """The directory to unpack into. Where there is none of that name, the first name in the archive becomes
    it."""
    max_bytes: int = Field(default=MAX_COPY_BYTES, ge=0, le=MAX_COPY_BYTES)
    """Most bytes of content."""


class PodForward(Request):
    """``pod.forward``."""

    pod_id: PodId


class SessionName(Request):
    """A request that names a session."""

    session_id: SessionId


class SessionResume(SessionName):
    """``session.resume``."""


class SessionList(Request):
    """``session.list``."""

    pod_id: PodId | None = None
    """Only sessions of this pod."""


class SessionSubjects(Reply):
    """Where the frames of a session go."""

    stdin: str
    """Data to the node."""
    stdout: str
    """Data from the node, ``stderr`` excepted."""
    stderr: str
    """The standard error output of a process."""
    control: str
    """States and messages, in both directions."""


class StreamPosition(Reply):
    """A stream of a session that is open."""

    stream: int
    """Its number: even ones go to the node, odd ones come from it."""
    offset: int
    """Bytes at which the client goes on: all before them was consumed."""


class Session(Reply):
    """A session as its client needs it: the reply of what opens or resumes one."""

    session_id: str
    """Names the session; to be kept secret."""
    kind: SessionKind
    """What it is for."""
    pod_id: str
    """The pod."""
    container_id: str | None = None
    """The container; None: the guest itself, or the whole pod."""
    epoch: int
    """Number of this attachment; stands in each frame, and frames of another are ignored."""
    window_bytes: int
    """Bytes of one stream that may be under way or unread, in each direction."""
    chunk_bytes: int
    """Most bytes of data in one message."""
    lost_after_s: float
    """Seconds of silence after which the node counts the client as lost."""
    subjects: SessionSubjects
    """Where to publish and what to subscribe to."""
    streams: tuple[StreamPosition, ...]
    """All that are open."""
    tty: bool = False
    """Whether there is a terminal at the other end."""


class SessionStatus(Reply):
    """A session as others see it: without its id, which is a secret."""

    kind: SessionKind
    """What it is for."""
    pod_id: str
    """The pod."""
    container_id: str | None = None
    """The container; None: the guest itself, or the whole pod."""
    command_id: str
    """The command that opened it."""
    attached: bool
    """Whether a client is there."""
    opened_at: Moment
    """When it was opened."""


class Sessions(Reply):
    """Reply of ``session.list``."""

    sessions: tuple[SessionStatus, ...]
    """Ordered by their opening."""


class SessionClosed(Reply):
    """Reply of ``session.close``."""

    existed: bool
    """False when there was no such session: closing is idempotent."""
