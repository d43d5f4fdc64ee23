"""What is asked and told of a container while it lives: waiting for it, and its processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vcnode.models.base import ContainerId, Moment, PodId, Reply, Request
from vcnode.models.pod import ContainerStatus

MAX_PROCESSES = 512
"""Most processes in one reply."""

WaitCondition = Literal["exited", "running", "removed"]


class ContainerWait(Request):
    """``container.wait``."""

    pod_id: PodId
    container_id: ContainerId
    condition: WaitCondition = "exited"
    """``exited``: its main process has ended (at once if that was before); a container that never ran is
    waited for. ``running``: it runs. ``removed``: it, or its pod, is gone."""


class ContainerWaited(Reply):
    """Reply of ``container.wait``."""

    pod_id: str
    """Pod that holds or held it."""
    container_id: str
    """The container."""
    condition: WaitCondition
    """What has come true."""
    container: ContainerStatus | None = None
    """The container when that came true; none once it is removed."""


class ContainerProcessesOf(Request):
    """``container.processes``."""

    pod_id: PodId
    container_id: ContainerId
    limit: int = Field(default=MAX_PROCESSES, ge=1, le=MAX_PROCESSES)
    """Most processes to list; ``total`` of the reply counts them all."""


class ContainerProcess(Reply):
    """One process of a container. All of it comes from the guest: take it for hostile text."""

    pid: int
    """Its id in the guest, as ``pid`` of the container's status."""
    ppid: int
    """Its parent's id in the guest; 0 for a parent outside."""
    container_pid: int
    """Its id inside the container: what programs there see, and take signals by."""
    uid: int
    """Effective user."""
    user: str | None = None
    """That user's name in the container's /etc/passwd."""
    state: str
    """One letter: ``R`` running, ``S`` sleeping, ``D`` in uninterruptible sleep, ``T`` stopped, ``Z`` dead
    and not waited for, ``I`` idle."""
    cpu_ms: int
    """Milliseconds of CPU, of user and system together."""
    rss_bytes: int
    """Memory in use."""
    started_at: Moment
    """When it started, by the guest's clock."""
    name: str
    """Name of its program, at most 15 characters."""
    args: tuple[str, ...]
    """Program and arguments, as it shows them; without control characters. Empty for one that is dead."""
    args_truncated: bool = False
    """Whether more of them were left out."""


class ContainerProcesses(Reply):
    """Reply of ``container.processes``."""

    pod_id: str
    """The pod."""
    container_id: str
    """The container."""
    processes: tuple[ContainerProcess, ...]
    """Its processes, oldest first."""
    total: int
    """How many there are."""
