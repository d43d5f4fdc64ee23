"""The node as it reports itself."""

from __future__ import annotations

from vcnode.models.base import Moment, Reply
from vcnode.models.image import ImageConfig
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, HypervisorType


class DriverInfo(Reply):
    """One driver that this node offers."""

    type: str
    """Name of the driver, as used in a pod's spec."""
    version: str | None = None
    """Version of what it drives, such as QEMU's."""
    capabilities: tuple[str, ...] = ()
    """What it can do beyond the minimum; anything else answers ``not_implemented``."""
    mock: bool = False
    """Whether it only pretends."""
    notes: tuple[str, ...] = ()
    """Findings that an operator should know, such as why KVM is not used."""


class PoolStatus(Reply):
    """Spare VMs of one size."""

    vcpu_count: int
    """Virtual CPUs."""
    mem_size_mib: int
    """Guest memory in MiB."""
    wanted: int
    """How many shall wait."""
    ready: int
    """How many do."""


class NodeInfo(Reply):
    """What a node is and has."""

    node: str
    """Its name."""
    epoch: int
    """Grows with each start of the node agent on the same state directory."""
    version: str
    """Version of vcnode."""
    started_at: Moment
    """When this process became ready."""
    state: str
    """``ready``, ``cordoned`` (takes no new pods) or ``draining``."""
    reason: str | None = None
    """Why it is cordoned."""
    labels: dict[str, str] = {}
    """Its labels: those of the settings, as ``node.label`` has changed them."""
    taints: tuple[str, ...] = ()
    """Reasons for pods to stay away, from the settings."""
    mock: bool
    """True when the default hypervisor only pretends: no VM will run."""
    accelerator: str | None
    """``kvm`` or ``tcg``; None with the mock hypervisor."""
    default_hypervisor: HypervisorType
    """Used when a pod names none."""
    default_agent: AgentType
    """Used when a pod names none."""
    default_network: NetworkModel
    """Used when a pod names none."""
    hypervisors: tuple[DriverInfo, ...]
    """Hypervisor drivers on offer."""
    agents: tuple[DriverInfo, ...]
    """Agent drivers on offer."""
    networks: tuple[DriverInfo, ...]
    """Network drivers on offer."""
    pod_count: int
    """Pods known, in any state."""
    running_pod_count: int
    """Pods whose VM runs."""
    cpu_count: int
    """CPUs of the host."""
    mem_total_mib: int
    """Memory of the host in MiB."""
    mem_available_mib: int
    """Memory that the host could still give, in MiB."""
    allowed_roots: tuple[str, ...]
    """Directories under which host paths must lie."""
    xkeys: tuple[str, ...] = ()
    """Public curve keys for which secrets may be sealed: the node's own, then those that it shares."""
    pool: tuple[PoolStatus, ...] = ()
    """Spare VMs that wait for pods; their memory is taken, but given up when a pod needs it."""


class Amount(Reply):
    """So much of what pods need."""

    vcpu_count: int
    """Virtual CPUs."""
    mem_mib: int
    """Memory of VMs in MiB."""
    disk_mib: int = 0
    """Writable disks of containers in MiB."""
    pods: int
    """Pods, in any state."""


class NodeLease(Reply):
    """A node's entry in the bucket of nodes: it is alive, and this is what it has."""

    node: str
    """Its name."""
    identity: str
    """Made with the state directory: tells two nodes of one name apart."""
    epoch: int
    """Grows with each start of the node agent."""
    version: str
    """Version of vcnode."""
    state: str
    """``ready``, ``cordoned`` (takes no new pods) or ``draining``."""
    labels: dict[str, str] = {}
    """Its labels: those of the settings, as ``node.label`` has changed them."""
    taints: tuple[str, ...] = ()
    """Reasons for pods to stay away, from the settings."""
    mock: bool
    """True when the node only pretends to run VMs."""
    accelerator: str | None = None
    """``kvm`` or ``tcg``."""
    hypervisor_version: str | None = None
    """Version of the default hypervisor, such as QEMU's."""
    host: str
    """Name of its host."""
    pid: int
    """Process of the node agent."""
    lease_s: float
    """Seconds for which this is good; renewed three times as often."""
    renewed_at: Moment
    """The node's clock."""
    capacity: Amount
    """What the host has, and the pods that the node holds at most."""
    allocatable: Amount
    """What pods may have of it in all: over-commitment included, what the host keeps for itself not."""
    reserved: Amount
    """What pods have of that, in any state, and what bids have promised. The rest can be had."""
    used: Amount
    """What pods have whose VM runs or starts."""
    templates: tuple[str, ...] = ()
    """Sizes that start as clones at once, as ``<vCPUs>x<MiB>``."""
    images: tuple[str, ...] = ()
    """Names of images at hand, in their order; at most 64."""
    queued_starts: int = 0
    """Pods that wait to be started."""
    xkeys: tuple[str, ...] = ()
    """Public curve keys for which secrets may be sealed: the node's own, then those that it shares."""


class NodePing(Reply):
    """A sign of life."""

    node: str
    """Its name."""
    epoch: int
    """Grows with each start of the node agent."""
    version: str
    """Version of vcnode."""
    time: Moment
    """The node's clock."""
    mock: bool = False
    """True when the node only pretends to run VMs."""


class Holding(Reply):
    """One thing that the node holds on its host."""

    kind: str
    """``process``, ``directory``, ``mount``, ``socket``, ``template``, ``link``, …"""
    name: str
    """What an operator finds it by: a pid, a path, the name of an interface."""
    vm_id: str | None
    """VM that it is for; None when it belongs to the node as a whole."""
    pod_id: str | None
    """Pod of that VM; None for an orphan, for a template and for a VM that is to become one."""
    orphan: bool
    """Whether it is nobody's."""
    freed: bool
    """Whether this audit has removed it."""


class NodeAudit(Reply):
    """Everything that the node owns on its host."""

    node: str
    """Its name."""
    time: Moment
    """When it looked."""
    holdings: tuple[Holding, ...]
    """What it found, those removed by this very audit included."""
    orphan_count: int
    """How many of them are nobody's, removed or not."""
    freed_count: int
    """How many of those were removed."""
    problems: tuple[str, ...]
    """What could not be looked at or removed, one sentence each."""


class ImageStatus(Reply):
    """An image on this node."""

    name: str
    """Its name."""
    digest: str
    """``sha256:`` digest of the erofs file."""
    size_bytes: int
    """Size of that file."""
    imported_at: Moment
    """When it was made."""
    in_use: bool = False
    """Whether a container names it."""
    last_used_at: Moment | None = None
    """When a container was last created from it, as far as is known; may lag behind after a restart."""
    reference: str | None = None
    """Where it was pulled from; None when it was imported."""
    manifest_digest: str | None = None
    """Digest of the manifest that it was made of, if it came with one."""
    config: ImageConfig = ImageConfig()
    """What it says about the process to run."""
