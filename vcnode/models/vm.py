"""VMs, guests and networks as the pod service and the drivers speak of them; nothing here is on the bus."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from vcnode.models.base import Moment
from vcnode.models.hypervisor import DiskFormat, MachineType
from vcnode.models.network import DnsConfig, Endpoint, NetworkConfig, NetworkModel, NetworkNamespace
from vcnode.models.pod import ContainerResources, HypervisorType
from vcnode.models.probes import Probes


class Data(BaseModel):
    """Base of internal values: frozen, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DiskFile(Data):
    """A disk that a VM has from the start."""

    fd: int
    """The file that is written to, or read; inherited by the VM's process."""
    format: DiskFormat
    """What is in it."""
    read_only: bool = False
    """Whether the guest may not write."""
    base_fd: int | None = None
    """With it, the file above is what was written over this one, which is only read; inherited too."""
    base_format: DiskFormat = DiskFormat.RAW
    """What is in that."""


class VmConfig(Data):
    """How a VM is built and what it boots. The default is the node's own guest on its own machine."""

    machine_type: MachineType | None = None
    """None: what suits the host's architecture and what is booted."""
    kernel: str | None = None
    """What QEMU opens as the kernel. None: the node's, unless the guest starts from its disk."""
    initrd: str | None = None
    """What QEMU opens as the initramfs. None: the node's goes with its kernel, any other kernel has none."""
    firmware: str | None = None
    """What QEMU opens as the firmware. None: its own."""
    file_fds: tuple[int, ...] = ()
    """Descriptors that these name as ``/proc/self/fd/N``; inherited."""
    disks: tuple[DiskFile, ...] = ()
    """Disks, in the guest's order."""
    kernel_params: tuple[str, ...] = ()
    """Parameters for the kernel, after the node's own."""
    hypervisor_params: tuple[tuple[str, str], ...] = ()
    """Further switches of QEMU, without ``-``, and their values; empty: a switch without one."""
    cpu_model: str | None = None
    """As ``-cpu`` has it. None: the host's with KVM, else all that QEMU can do."""
    mem_prealloc: bool = False
    """Whether all memory is taken at the start."""
    huge_pages: bool = False
    """Whether the memory consists of the host's huge pages."""
    debug: bool = False
    """Whether guest and QEMU say more."""

    @property
    def from_disk(self) -> bool:
        """Whether the guest starts from its first disk, by firmware."""
        return bool(self.disks) and self.kernel is None and self.initrd is None


class Channel(Data):
    """A serial port of a VM, and the UNIX socket behind it."""

    channel_id: str
    """Names its socket, ``<id>.sock`` in the VM's directory."""
    name: str
    """Name in the guest."""


AGENT_CHANNELS = (Channel(channel_id="agent", name="vcnode.agent.0"),)
"""Of vcnode's own agent (contracts/guest-protocol.md)."""
SHARE_TAG = "vcnode-shared"
"""Mount tag of the 9p share, as vcnode's own agent knows it."""


class Share(Data):
    """A directory of the host that is a device of a VM from the start."""

    tag: str
    """By which the guest mounts it."""
    directory: str
    """What is shared, as the VM's process may open it."""
    virtio_fs: bool = False
    """Whether by virtio-fs, not 9p; the VM's memory is then shared with the process that serves it."""


SLOT_DISK = "slot-image"
"""Serial of the disk that a template and its clones have from the start: see `VmSpec.slot`."""
SLOT_BYTES = 1 << 40
"""Size that a template's guest takes that disk to have, and so most that an image in it can have."""


class SlotImage(Data):
    """An image for the disk `SLOT_DISK`."""

    digest: str
    """Of the image."""
    path: str
    """Its file."""


def channel_socket(directory: str, channel_id: str) -> Path:
    """Where the socket of a channel is."""
    return Path(directory, f"{channel_id}.sock")


class VmSpec(Data):
    """A VM to launch."""

    vm_id: str
    """Unique on the host; names its directory, sockets and tap."""
    uuid: str
    """Given to QEMU as ``-uuid``; proves the identity of a process that was found again."""
    vcpu_count: int
    """Virtual CPUs."""
    mem_size_mib: int
    """Guest memory in MiB."""
    directory: str
    """Host directory of this VM (exists, empty): sockets, console log, ``shared/``."""
    shared_dir: str
    """Host directory that the guest sees as the 9p share ``shared``."""
    netdevs: tuple[NetDev, ...] = ()
    """Network devices."""
    netns_path: str | None = None
    """Network namespace to run in; None: the node agent's own."""
    clone_of: str | None = None
    """Key of the template to start from; None: boot."""
    channels: tuple[Channel, ...] = AGENT_CHANNELS
    """Serial ports that lead to its agent."""
    share_tag: str = SHARE_TAG
    """Mount tag of the 9p share."""
    host_dirs: bool = True
    """Whether directories of the host may be shared with it: its process then needs rights on them."""
    shares: tuple[Share, ...] = ()
    """Further directories. By virtio-fs only of a VM that boots and becomes no template."""
    balloon: bool = False
    """Whether its memory can be changed while it runs. Never of a clone or a template: what a balloon gives
    back would be punched out of the template's file, which other VMs share."""
    config: VmConfig = VmConfig()
    """How it is built and what it boots. Only with the default there are templates."""
    template_key: str | None = None
    """Set when the VM is booted to become the template of this key (see `Templating.save_template`)."""
    slot: SlotImage | None = None
    """What is in the disk that a template's guest has met and its clones find again, without a search of the
    bus. None: nothing that can be used. A VM that boots for itself has no such disk."""

    @property
    def has_slot(self) -> bool:
        """Whether it has the disk `SLOT_DISK`: a template and its clones have."""
        return self.clone_of is not None or self.template_key is not None

    @property
    def shape(self) -> VmShape:
        """What the choice of a template hangs on."""
        return VmShape(
            vcpu_count=self.vcpu_count, mem_size_mib=self.mem_size_mib, netdev_count=len(self.netdevs)
        )


class VmShape(Data):
    """What a template must have in common with its clones, besides kernel, guest image and QEMU."""

    vcpu_count: int
    """Virtual CPUs."""
    mem_size_mib: int
    """Guest memory in MiB."""
    netdev_count: int = 0
    """Network devices."""


class NetDev(Data):
    """One network device of a VM."""

    tap_fd: int
    """Open tap, inherited by the VM's process."""
    mac: str
    """Hardware address."""


class VmRecord(Data):
    """What must be kept to find a VM again after the node agent has restarted."""

    vm_id: str
    """Id of the VM."""
    uuid: str
    """Its UUID."""
    directory: str
    """Its directory on the host."""
    type: HypervisorType
    """Driver that runs it."""
    pid: int | None = None
    """Process id; None before the launch and for the mock."""
    pid_start_ticks: int | None = None
    """Start time of that process (field 22 of /proc/PID/stat): a reused pid has another."""
    accelerator: str | None = None
    """``kvm`` or ``tcg``."""
    helpers: tuple[tuple[int, int], ...] = ()
    """Pid and start time of each process that helps it, and ends with it."""
    uid: int | None = None
    """User id that its process has to itself; None: the node agent's."""
    balloon: bool = False
    """Whether it was launched with a balloon."""
    slot_digest: str | None = None
    """The image in its disk `SLOT_DISK`, as long as it lives; None: there is none that can be used."""


class VmExit(Data):
    """How a VM ended."""

    expected: bool
    """Whether ``stop`` had been called."""
    exit_code: int | None = None
    """Exit code of the process (negative: signal), if it was our child."""
    reason: str
    """One sentence: what QEMU's events, exit code and the guest's console say."""
    console_tail: str = ""
    """Last lines of the serial console."""


VOLUME_DISK = "v-"
"""How the ids of disks begin that are volumes of pods."""


class Disk(Data):
    """A disk to attach to a running VM."""

    disk_id: str
    """Unique within the VM; becomes the SCSI serial by which the guest finds it."""
    path: str
    """File on the host."""
    fd: int | None = None
    """That file, open; the hypervisor opens none itself then, now and when it is found again."""
    read_only: bool = True
    """Whether the guest may not write."""


class Port(Data):
    """A serial port to plug into a running VM, and what is behind it on the host."""

    port_id: str
    """Unique within the VM: of its device."""
    chardev_id: str
    """Unique within the VM: of the socket behind it."""
    name: str
    """Name in the guest."""
    fd: int
    """A UNIX socket: one that listens, or one that is connected."""
    listens: bool
    """Which of the two."""


class ContainerRoot(Data):
    """Where the guest finds a container's root. Exactly one of the two is set."""

    shared_name: str | None = None
    """Directory below the 9p share."""
    disk_id: str | None = None
    """Attached disk that holds an erofs image."""
    layer_disk_id: str | None = None
    """With ``disk_id``: attached disk for what is written over the image. None: the guest's memory."""


class GuestMount(Data):
    """What a container mounts besides its root; none of the first four: a tmpfs."""

    shared_name: str | None = None
    """Directory below the 9p share."""
    fs_tag: str | None = None
    """Tag of a virtio-fs device."""
    disk_id: str | None = None
    """Attached disk."""
    port: str | None = None
    """Name of a serial port."""
    fs: str | None = None
    """With ``disk_id``: its file system."""
    read_only: bool = False
    """With ``disk_id``: whether the disk is, for everybody."""
    path: str = ""
    """What in there it is; empty: all."""
    destination: str
    """Where the container has it."""
    options: tuple[str, ...] = ()
    """As of mount(8)."""


class GuestSecret(Data):
    """A file in a container's ``/run/secrets``."""

    name: str
    """Its name there."""
    mode: int
    """Its permissions."""
    data: bytes = Field(repr=False)
    """Its content."""


class GuestProcess(Data):
    """A process as the guest agent starts it; users and groups are resolved inside the root."""

    args: tuple[str, ...]
    """Program and arguments."""
    envs: tuple[tuple[str, str], ...] = Field(default=(), repr=False)
    """Environment; secrets are in clear here, and nowhere before."""
    workdir: str = "/"
    """Working directory."""
    user: str = "0"
    """Name or number; empty, for a process in the guest itself: as whom the agent runs such."""
    group: str | None = None
    """Name or number; None: the user's primary group."""
    supplementary_groups: tuple[str, ...] = ()
    """Names or numbers."""
    rlimits: tuple[tuple[str, int, int], ...] = ()
    """Name, soft, hard."""
    no_new_privileges: bool = True
    """PR_SET_NO_NEW_PRIVS."""
    capabilities: tuple[str, ...] = ()
    """Exactly these."""


class GuestContainer(Data):
    """A container as the guest agent makes it."""

    container_id: str
    """Its id."""
    root: ContainerRoot
    """Where its files are."""
    readonly: bool = False
    """Whether its root is mounted read-only."""
    hostname: str
    """In its UTS namespace."""
    process: GuestProcess
    """Main process."""
    secrets: tuple[GuestSecret, ...] = ()
    """Files for it alone."""
    mounts: tuple[GuestMount, ...] = ()
    """What it mounts besides its root."""
    secret_envs: tuple[str, ...] = ()
    """Variables of its environment that nobody may write down."""
    resources: ContainerResources = ContainerResources()
    """cgroup limits."""
    probes: Probes = Probes()
    """What the guest agent tries while it runs."""
    stop_signal: int = 15
    """Signal that asks it to end when its probes have failed."""
    stop_timeout_s: float = 0.0
    """Seconds between that and SIGKILL."""
    stdin: bool = False
    """Whether the input of its main process can be written to."""
    tty: bool = False
    """Whether its main process has a terminal."""


class Watchdog(Data):
    """When a guest ends by itself, for want of news."""

    after_s: float
    """Seconds from now."""
    grace_s: float
    """Most seconds that its containers get then."""


class GuestConfig(Data):
    """Identity of a guest, given once its agent answers."""

    hostname: str
    """Of the guest itself."""
    time_ns: int
    """Wall clock to set, in nanoseconds since 1970."""
    entropy: bytes
    """At least 32 fresh random bytes for the kernel's generator."""
    machine_id: str
    """32 hex digits."""
    endpoints: tuple[Endpoint, ...] = ()
    """Interfaces to set up, in the order of the VM's network devices."""
    dns: DnsConfig = DnsConfig()
    """Name resolution, for the guest and its containers."""
    watchdog: Watchdog | None = None
    """When the guest ends by itself unless it hears otherwise; see `GuestSession.set_watchdog`."""


class GuestContainerState(Data):
    """A container as the guest agent sees it."""

    container_id: str
    """Its id."""
    state: str
    """``created``, ``running``, ``paused`` or ``stopped``."""
    pid: int | None = None
    """Main process in the guest."""
    exit_code: int | None = None
    """Set once stopped."""
    oom_killed: bool = False
    """Whether its memory limit ended it."""
    finished_at: Moment | None = None
    """By the guest's clock."""
    resources: ContainerResources | None = None
    """Its limits; None: the agent does not say."""
    ready: bool | None = None
    """Whether its probes say that it is ready; None: the agent does not know."""
    probe_failure: str | None = None
    """Why its probes have ended it."""


class GuestInfo(Data):
    """A guest agent as it introduced itself."""

    agent_version: str
    """Version of the agent."""
    boot_id: str
    """The guest kernel's boot id."""
    kernel: str
    """The guest kernel's release."""
    host_key: str | None = None
    """The public key by which the guest has proved itself; None: it has none."""


class NetworkRequest(Data):
    """A pod that is about to be connected."""

    pod_id: str
    """Pod."""
    vm_id: str
    """Its VM; what a driver makes is named after it."""
    config: NetworkConfig = NetworkConfig()
    """What the caller wants."""


class NetworkAttachment(Data):
    """What a network driver holds, or is about to hold, for one VM; kept in the pod's record.

    A driver's ``plan`` makes it, which is when addresses and ports are taken: they are the pod's as long as
    its record has the attachment.
    """

    model: NetworkModel
    """Driver."""
    vm_id: str
    """VM that it was made for; what the driver makes is named after it, so this alone is enough to detach."""
    pod_id: str | None = None
    """Pod that it was planned for; None for a VM that has none yet."""
    config: NetworkConfig = NetworkConfig()
    """What was asked for."""
    netns_path: str | None = None
    """Network namespace in which the VM runs."""
    netns_created: bool = True
    """Whether the driver makes that namespace, and removes it."""
    endpoints: tuple[Endpoint, ...] = ()
    """Interfaces, in guest order."""
    dns: DnsConfig = DnsConfig()
    """Name resolution as the guest is to have it: what was asked for, completed by the driver."""

    @property
    def namespace(self) -> NetworkNamespace | None:
        """As callers see it."""
        if self.netns_path is None:
            return None
        return NetworkNamespace(path=self.netns_path, created=self.netns_created, endpoints=self.endpoints)


VmSpec.model_rebuild()
