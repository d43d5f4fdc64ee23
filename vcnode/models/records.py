"""What the node's database holds: the truth about pods, from which statuses are made."""

from __future__ import annotations

from vcnode.models.base import Moment
from vcnode.models.image import ImageConfig
from vcnode.models.network import NetworkModel
from vcnode.models.pod import (
    AgentType,
    ContainerResources,
    ContainerSpec,
    ContainerState,
    HypervisorType,
    PodSpec,
    PodState,
)
from vcnode.models.vm import Data, NetworkAttachment, VmRecord
from vcnode.models.volumes import Volume


class Restarts(Data):
    """What a restart policy has done and is to do; all of it begins anew when a command starts something."""

    count: int = 0
    """Restarts so far."""
    streak: int = 0
    """Restarts in a row, without a healthy time between them; the one that is due counts."""
    at: Moment | None = None
    """When the next one is due."""
    cancelled: bool = False
    """Somebody has asked for a stop: no further ones."""


class ContainerRecord(Data):
    """A container of a pod. ``spec.id`` is always set here."""

    spec: ContainerSpec
    """As given, with the id filled in."""
    state: ContainerState = ContainerState.READY
    """Where it is in its life."""
    image_digest: str | None = None
    """The image's file when it was created; a later import under the same name changes nothing here."""
    image_config: ImageConfig = ImageConfig()
    """What that image says about the process to run."""
    resources: ContainerResources | None = None
    """Its limits, once a command has changed them."""
    layer_id: str | None = None
    """Of its writable disk, if it has one: made at the first start, removed with the container."""
    ready: bool = False
    """What its probes said last; without effect unless it runs."""
    pid: int | None = None
    """Main process in the guest."""
    exit_code: int | None = None
    """Once stopped."""
    oom_killed: bool = False
    """Whether its memory limit ended it."""
    reason: str | None = None
    """Why it stopped, where the exit code does not say it."""
    created_at: Moment
    """When it was created."""
    started_at: Moment | None = None
    """When it last started."""
    finished_at: Moment | None = None
    """When it last stopped."""
    restarts: Restarts = Restarts()
    """What its restart policy does."""

    @property
    def limits(self) -> ContainerResources:
        """Its limits now."""
        return self.resources or self.spec.resources


class PodNote(Data):
    """What the directory of a running pod's VM says, for a node agent that has lost its database."""

    node: str
    """The node's name."""
    epoch: int
    """The node's epoch when this was written."""
    record: PodRecord
    """The pod."""


class PodRecord(Data):
    """A pod. ``spec.id`` is always set here."""

    pod_id: str
    """Its id."""
    spec: PodSpec
    """As given, with the id filled in; its containers are those of the create."""
    hypervisor_type: HypervisorType
    """Chosen at create; a later change of the node's default changes nothing here."""
    agent_type: AgentType
    """Chosen at create."""
    network_model: NetworkModel
    """Chosen at create."""
    state: PodState
    """Where it is in its life."""
    reason: str | None = None
    """Why it failed, or why it was paused or stopped without a command."""
    resized_mib: int | None = None
    """Its memory, once a command has changed it."""
    resumes: bool = False
    """Its ``on_disconnect`` has paused it: it runs again once NATS is back."""
    revision: int = 1
    """Counts the changes."""
    created_at: Moment
    """When it was created."""
    started_at: Moment | None = None
    """When it last became running."""
    finished_at: Moment | None = None
    """When it last stopped or failed."""
    vm: VmRecord | None = None
    """Its VM, from just before the launch until all of it is gone."""
    network: NetworkAttachment | None = None
    """Its network, while it has one."""
    disk_id: str | None = None
    """Of the overlay over its disk image, if it has one: made at the first start, removed with the pod."""
    host_key: str | None = None
    """By which its guest has proved itself, if its agent asks for that."""
    volumes: tuple[Volume, ...] = ()
    """As given, and those that commands have added since."""
    containers: tuple[ContainerRecord, ...] = ()
    """In the order of creation."""
    leftovers: tuple[str, ...] = ()
    """What could not be freed."""
    restarts: Restarts = Restarts()
    """What its restart policy does."""
    phases_ms: dict[str, float] = {}
    """Milliseconds of each phase of the last start."""

    @property
    def mem_size_mib(self) -> int:
        """Its memory now."""
        return self.resized_mib or self.spec.resources.mem_size_mib


PodNote.model_rebuild()
