"""What containers have written, as it is asked for and told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from vcnode.models.base import Blob, ContainerId, Moment, PodId, Reply, Request

MAX_LOG_BYTES = 128 * 1024
"""Most bytes of output in one reply; in JSON they may take six times as much."""
MAX_LOG_ENTRIES = 2_000
"""Most entries in one reply."""
MAX_LOG_WAIT_S = 240.0

LogStream = Literal["stdout", "stderr", "node"]


class ContainerLogs(Request):
    """``container.logs``."""

    pod_id: PodId
    container_id: ContainerId | None = None
    """The container; not needed when the pod has only one."""
    cursor: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")] | None = None
    """Where to go on: ``cursor`` of the reply before. Default: as ``tail`` and ``since`` say."""
    tail: int | None = Field(default=None, ge=0, le=1_000_000)
    """Begin so many lines before the end. Default: at the beginning of what is kept."""
    since: Moment | None = None
    """Only what was written at this time or later."""
    until: Moment | None = None
    """Only what was written before this time."""
    wait_s: float = Field(default=0.0, ge=0, le=MAX_LOG_WAIT_S)
    """Seconds to wait for output when there is none yet; to follow, ask again and again with ``cursor``."""
    max_bytes: int = Field(default=MAX_LOG_BYTES, ge=1, le=MAX_LOG_BYTES)
    """Most bytes of output in the reply."""


class LogEntry(Blob):
    """A piece of output: part of a line, or many lines."""

    time: Moment
    """When the guest agent read it, by the guest's clock."""
    stream: LogStream
    """``stdout``, ``stderr``; ``node``: a line by vcnode, about output that was lost."""


class ContainerLogEntries(Reply):
    """Reply of ``container.logs``."""

    pod_id: str
    """The pod."""
    container_id: str
    """The container."""
    entries: tuple[LogEntry, ...]
    """In the order in which they were written, both streams together."""
    cursor: str
    """Where the next request goes on."""
    more: bool
    """Whether there is more already."""
    ended: bool
    """Whether no more will come unless the container is started again."""
    missed_bytes: int = 0
    """Bytes between the request's ``cursor`` and the first entry that are not kept any more."""
