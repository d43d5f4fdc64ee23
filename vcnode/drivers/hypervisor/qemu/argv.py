"""QEMU's command line as a pure function: one small dataclass per switch.

Conventions: a class is named after the switch or the device behind it, its fields as QEMU names the
properties (QEMU mixes ``-`` and ``_``: ``hyphenated`` lists the former). A field that is None is left out; a
bool becomes ``on`` or ``off``; a comma in a value is doubled, as QEMU's option parser wants it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vcnode.drivers.hypervisor.qemu.process import NAME_PREFIX
from vcnode.models.vm import VmSpec

AGENT_PORT = "vcnode.agent.0"
"""Name of the serial port at which the guest agent listens (contracts/guest-protocol.md)."""
SHARE_TAG = "vcnode-shared"
"""Mount tag of the 9p share."""
SCSI_BUS = "scsi0.0"
"""Where disks are plugged in."""

KERNEL_PARAMS = ("console=ttyS0", "quiet", "panic=-1", "reboot=t")
"""``panic=-1`` and ``reboot=t``: a panic or reboot resets the machine, and ``-no-reboot`` ends QEMU then."""
TCG_CPU = "max,-erms"
"""CPU of a guest without KVM.

``max`` lets an idle guest stop its tick, and boots faster than the default model. With ``erms`` the guest's
kernel copies and clears memory by one ``rep movsb`` or ``rep stosb``, which TCG carries out byte by byte:
three times as slow as the loops that it takes otherwise (measured with QEMU 7.2).
"""


class Switch:
    """One switch with its properties; subclasses are frozen dataclasses.

    ``first`` names a leading property that is written without its name (``-device virtio-net-device,…``).
    """

    flag: ClassVar[str]
    first: ClassVar[str | None] = None
    hyphenated: ClassVar[frozenset[str]] = frozenset()

    def args(self) -> list[str]:
        """The switch as one or two arguments."""
        parts = [self.first] if self.first else []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                name = field.name.replace("_", "-") if field.name in self.hyphenated else field.name
                parts.append(f"{name}={_text(value)}")
        return [self.flag, ",".join(parts)] if parts else [self.flag]


def _text(value: str | int | bool | Path) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


class Plain(Switch):
    """A switch whose one value is taken as it stands: no properties, no escaping."""

    def args(self) -> list[str]:
        """Switch and value."""
        return [self.flag, *(str(getattr(self, f.name)) for f in dataclasses.fields(self))]  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class NoDefaults(Plain):
    """No device that was not asked for."""

    flag = "-nodefaults"


@dataclass(frozen=True, slots=True)
class NoUserConfig(Plain):
    """No configuration files of the host."""

    flag = "-no-user-config"


@dataclass(frozen=True, slots=True)
class NoReboot(Plain):
    """A reset of the guest ends QEMU."""

    flag = "-no-reboot"


@dataclass(frozen=True, slots=True)
class Display(Plain):
    """``-display``."""

    flag = "-display"
    type: str = "none"


@dataclass(frozen=True, slots=True)
class Name(Switch):
    """``-name``: shown by ps."""

    flag = "-name"
    guest: str


@dataclass(frozen=True, slots=True)
class Uuid(Plain):
    """``-uuid``: proves whose process this is."""

    flag = "-uuid"
    uuid: str


@dataclass(frozen=True, slots=True)
class Sandbox(Switch):
    """``-sandbox``: seccomp filters on QEMU itself."""

    flag = "-sandbox"
    first = "on"
    obsolete: str = "deny"
    elevateprivileges: str = "deny"
    spawn: str = "deny"
    resourcecontrol: str = "deny"


@dataclass(frozen=True, slots=True)
class Machine(Switch):
    """``-machine``."""

    flag = "-machine"
    hyphenated = frozenset({"memory_backend"})
    type: str
    memory_backend: str


@dataclass(frozen=True, slots=True)
class KvmAccel(Plain):
    """``-accel kvm``."""

    flag = "-accel"
    name: str = "kvm"


@dataclass(frozen=True, slots=True)
class TcgAccel(Switch):
    """``-accel tcg``; translated code takes up to ``tb_size`` MiB, and QEMU's own default is 1 GiB."""

    flag = "-accel"
    first = "tcg"
    hyphenated = frozenset({"tb_size"})
    tb_size: int


@dataclass(frozen=True, slots=True)
class Cpu(Plain):
    """``-cpu``."""

    flag = "-cpu"
    model: str


@dataclass(frozen=True, slots=True)
class Smp(Switch):
    """``-smp``."""

    flag = "-smp"
    cpus: int


@dataclass(frozen=True, slots=True)
class Memory(Switch):
    """``-m``."""

    flag = "-m"
    size: str


@dataclass(frozen=True, slots=True)
class MemoryBackendRam(Switch):
    """Guest memory of the VM's own."""

    flag = "-object"
    first = "memory-backend-ram"
    id: str
    size: str


@dataclass(frozen=True, slots=True)
class MemoryBackendFile(Switch):
    """Guest memory in a file: shared while a template is made, private (copy-on-write) in its clones."""

    flag = "-object"
    first = "memory-backend-file"
    hyphenated = frozenset({"mem_path"})
    id: str
    size: str
    mem_path: Path
    share: bool


@dataclass(frozen=True, slots=True)
class Kernel(Plain):
    """``-kernel``."""

    flag = "-kernel"
    path: Path


@dataclass(frozen=True, slots=True)
class Initrd(Plain):
    """``-initrd``."""

    flag = "-initrd"
    path: Path


@dataclass(frozen=True, slots=True)
class Append(Plain):
    """``-append``: the kernel's command line."""

    flag = "-append"
    params: str


@dataclass(frozen=True, slots=True)
class Incoming(Plain):
    """``-incoming``: wait for a state instead of booting."""

    flag = "-incoming"
    uri: str


@dataclass(frozen=True, slots=True)
class SocketChardev(Switch):
    """A listening UNIX socket that QEMU inherits, so that a client may connect before QEMU is up."""

    flag = "-chardev"
    first = "socket"
    id: str
    fd: int
    server: bool = True
    wait: bool = False


@dataclass(frozen=True, slots=True)
class PipeChardev(Switch):
    """A pair of FIFOs, ``path.in`` and ``path.out``."""

    flag = "-chardev"
    first = "pipe"
    id: str
    path: Path


@dataclass(frozen=True, slots=True)
class Mon(Switch):
    """``-mon``: where QMP is spoken."""

    flag = "-mon"
    chardev: str
    mode: str = "control"


@dataclass(frozen=True, slots=True)
class Serial(Plain):
    """``-serial``: the guest's console."""

    flag = "-serial"
    target: str


@dataclass(frozen=True, slots=True)
class VirtioSerialDevice(Switch):
    """The controller of serial ports."""

    flag = "-device"
    first = "virtio-serial-device"
    id: str
    max_ports: int


@dataclass(frozen=True, slots=True)
class VirtSerialPort(Switch):
    """One named serial port."""

    flag = "-device"
    first = "virtserialport"
    bus: str
    chardev: str
    name: str


@dataclass(frozen=True, slots=True)
class VirtioScsiDevice(Switch):
    """The controller of hot-plugged disks."""

    flag = "-device"
    first = "virtio-scsi-device"
    id: str


@dataclass(frozen=True, slots=True)
class LocalFsdev(Switch):
    """A host directory to share.

    ``multidevs=remap``: what is bind-mounted below it comes from several file systems, whose inode numbers
    would collide in the guest.
    """

    flag = "-fsdev"
    first = "local"
    id: str
    path: Path
    security_model: str = "none"
    multidevs: str = "remap"


@dataclass(frozen=True, slots=True)
class Virtio9pDevice(Switch):
    """The share as the guest sees it."""

    flag = "-device"
    first = "virtio-9p-device"
    fsdev: str
    mount_tag: str


@dataclass(frozen=True, slots=True)
class VirtioBalloonDevice(Switch):
    """What the guest puts memory into that it gives back. Never in a clone or a template: see `VmSpec`."""

    flag = "-device"
    first = "virtio-balloon-device"
    id: str


@dataclass(frozen=True, slots=True)
class TapNetdev(Switch):
    """A tap that QEMU inherits as an open descriptor; QEMU itself does without vhost where that fails."""

    flag = "-netdev"
    first = "tap"
    id: str
    fd: int
    vhost: bool | None = None
    vhostfd: int | None = None


@dataclass(frozen=True, slots=True)
class VirtioNetDevice(Switch):
    """A network card."""

    flag = "-device"
    first = "virtio-net-device"
    netdev: str
    mac: str


@dataclass(frozen=True, slots=True)
class Launch:
    """All that one command line is made of."""

    binary: str
    """QEMU, by name or path."""
    accelerator: str
    """``kvm`` or ``tcg``."""
    spec: VmSpec
    """The VM."""
    kernel: Path
    """Uncompressed ELF kernel."""
    initrd: Path
    """Its initramfs."""
    qmp_fd: int
    """Listening socket for QMP, inherited."""
    agent_fd: int
    """Listening socket that leads to the guest agent's port, inherited."""
    console: Path
    """FIFOs of the serial console, without their ``.in`` and ``.out``."""
    tcg_cache_mib: int = 128
    """Most memory for translated code, without KVM."""
    kernel_params: tuple[str, ...] = KERNEL_PARAMS
    """The kernel's command line."""
    ram_file: Path | None = None
    """File that holds the guest's memory; None: memory of its own."""
    ram_share: bool = False
    """Whether writes reach ``ram_file``: when a template is made, never in a clone."""
    ram_fd: int | None = None
    """Memory behind ``ram_file``, if that names an inherited descriptor."""
    state_fd: int | None = None
    """Where the state is read from or written to by a later QMP command; inherited."""
    vhost_fds: Sequence[int] = ()
    """Open /dev/vhost-net, one for each network device; inherited. Empty: QEMU moves the frames itself."""
    incoming: str | None = None
    """Where the state comes from, such as ``defer``; None: boot."""
    share: Path | None = None
    """The directory behind the 9p share, as QEMU is to open it; None: as the VM has it."""
    file_fds: Sequence[int] = ()
    """Descriptors of files that paths above name as ``/proc/self/fd/N``; inherited."""


def switches(launch: Launch) -> Iterator[Switch]:
    """Every switch of the VM, in the order of the command line."""
    spec = launch.spec
    size = f"{spec.mem_size_mib}M"
    yield from (NoDefaults(), NoUserConfig(), NoReboot(), Display(), Sandbox())
    yield Name(f"{NAME_PREFIX}{spec.vm_id}")
    yield Uuid(spec.uuid)
    yield Machine(type="microvm", memory_backend="ram")
    yield KvmAccel() if launch.accelerator == "kvm" else TcgAccel(tb_size=launch.tcg_cache_mib)
    yield Cpu("host" if launch.accelerator == "kvm" else TCG_CPU)
    yield Smp(cpus=spec.vcpu_count)
    yield Memory(size)
    if launch.ram_file is None:
        yield MemoryBackendRam(id="ram", size=size)
    else:
        yield MemoryBackendFile(id="ram", size=size, mem_path=launch.ram_file, share=launch.ram_share)
    yield Kernel(launch.kernel)
    yield Initrd(launch.initrd)
    yield Append(" ".join(launch.kernel_params))
    yield SocketChardev(id="qmp0", fd=launch.qmp_fd)
    yield Mon(chardev="qmp0")
    yield PipeChardev(id="console0", path=launch.console)
    yield Serial("chardev:console0")
    yield VirtioSerialDevice(id="serial0", max_ports=4)
    yield SocketChardev(id="agent0", fd=launch.agent_fd)
    yield VirtSerialPort(bus="serial0.0", chardev="agent0", name=AGENT_PORT)
    yield VirtioScsiDevice(id="scsi0")
    yield LocalFsdev(id="share0", path=launch.share or Path(spec.shared_dir))
    yield Virtio9pDevice(fsdev="share0", mount_tag=SHARE_TAG)
    for index, netdev in enumerate(spec.netdevs):
        vhost_fd = launch.vhost_fds[index] if launch.vhost_fds else None
        vhost = None if vhost_fd is None else True
        yield TapNetdev(id=f"net{index}", fd=netdev.tap_fd, vhost=vhost, vhostfd=vhost_fd)
        yield VirtioNetDevice(netdev=f"net{index}", mac=netdev.mac)
    if spec.balloon and launch.ram_file is None:
        yield VirtioBalloonDevice(id="balloon0")
    if launch.incoming is not None:
        yield Incoming(launch.incoming)


def build(launch: Launch) -> list[str]:
    """The command line of one VM. Pure: the same input gives the same arguments."""
    return [launch.binary, *(arg for switch in switches(launch) for arg in switch.args())]


def inherited_fds(launch: Launch) -> tuple[int, ...]:
    """Descriptors that the command line names, which QEMU must inherit under the same numbers."""
    return (
        launch.qmp_fd,
        launch.agent_fd,
        *(netdev.tap_fd for netdev in launch.spec.netdevs),
        *launch.vhost_fds,
        *launch.file_fds,
        *(fd for fd in (launch.ram_fd, launch.state_fd) if fd is not None),
    )
