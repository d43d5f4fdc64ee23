"""The switches of QEMU's command line: one small dataclass each.

Conventions: a class is named after the switch or the device behind it, its fields as QEMU names the
properties (QEMU mixes ``-`` and ``_``: ``hyphenated`` lists the former). A field that is None is left out; a
bool becomes ``on`` or ``off``; a comma in a value is doubled, as QEMU's option parser wants it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vcnode.drivers.hypervisor.qemu.machines import Transport


class Switch:
    """One switch with its properties; subclasses are frozen dataclasses.

    ``first`` names a leading property that is written without its name (``-device virtio-net-device,…``).
    """

    flag: ClassVar[str]
    first: ClassVar[str | None] = None
    hyphenated: ClassVar[frozenset[str]] = frozenset()

    def args(self) -> list[str]:
        """The switch as one or two arguments."""
        parts = [*((self.first,) if self.first else ()), *self.properties()]
        return [self.flag, ",".join(parts)] if parts else [self.flag]

    def properties(self, *besides: str) -> list[str]:
        """Its properties as ``name=value``, but for those named."""
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None and field.name not in besides:
                name = field.name.replace("_", "-") if field.name in self.hyphenated else field.name
                parts.append(f"{name}={_text(value)}")
        return parts


def _text(value: str | int | bool | Path) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


class VirtioDevice(Switch):
    """A virtio device, wired as the machine does it: ``-device virtio-net-device,…`` or ``-pci``.

    Subclasses name the ``kind`` and have ``transport`` as their first field.
    """

    flag = "-device"
    kind: ClassVar[str]
    transport: Transport

    def args(self) -> list[str]:
        """The switch as two arguments."""
        return [self.flag, ",".join([f"{self.kind}-{self.transport}", *self.properties("transport")])]


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
class MachineSwitch(Switch):
    """``-machine``."""

    flag = "-machine"
    hyphenated = frozenset({"memory_backend", "gic_version"})
    type: str
    memory_backend: str
    graphics: bool | None = None
    gic_version: str | None = None


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
    prealloc: bool | None = None


@dataclass(frozen=True, slots=True)
class MemoryBackendMemfd(Switch):
    """Guest memory of the VM's own: in huge pages, for which no mount of hugetlbfs is needed, or shared with
    those that serve its devices."""

    flag = "-object"
    first = "memory-backend-memfd"
    id: str
    size: str
    hugetlb: bool = True
    share: bool | None = None
    prealloc: bool | None = None


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
class Bios(Plain):
    """``-bios``: the firmware."""

    flag = "-bios"
    path: Path


@dataclass(frozen=True, slots=True)
class DebugItems(Plain):
    """``-d``: what QEMU itself says besides, on its standard error."""

    flag = "-d"
    items: str


@dataclass(frozen=True, slots=True)
class Given(Plain):
    """A parameter of the caller's, as it stands."""

    key: str
    value: str

    def args(self) -> list[str]:
        """Switch and value, if it has one."""
        return [f"-{self.key}", *((self.value,) if self.value else ())]


@dataclass(frozen=True, slots=True)
class Append(Plain):
    """``-append``: the kernel's command line."""

    flag = "-append"
    params: str


@dataclass(frozen=True, slots=True)
class ModernMmio(Plain):
    """Virtio devices without PCI speak version 1 of the protocol; by itself QEMU has them speak the draft."""

    flag = "-global"
    setting: str = "virtio-mmio.force-legacy=false"


@dataclass(frozen=True, slots=True)
class Incoming(Plain):
    """``-incoming``: wait for a state instead of booting."""

    flag = "-incoming"
    uri: str


@dataclass(frozen=True, slots=True)
class SocketChardev(Switch):
    """A listening UNIX socket that QEMU inherits, so that a client may connect before QEMU is up.

    ``server`` and ``wait`` None: one that is connected.
    """

    flag = "-chardev"
    first = "socket"
    id: str
    fd: int
    server: bool | None = True
    wait: bool | None = False


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
class VirtioSerialDevice(VirtioDevice):
    """The controller of serial ports."""

    kind = "virtio-serial"
    transport: Transport
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
class VirtioScsiDevice(VirtioDevice):
    """The controller of hot-plugged disks."""

    kind = "virtio-scsi"
    transport: Transport
    id: str


@dataclass(frozen=True, slots=True)
class ScsiDisk(Switch):
    """A disk on that controller from the start."""

    flag = "-device"
    first = "scsi-hd"
    bus: str
    drive: str
    serial: str


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
class Virtio9pDevice(VirtioDevice):
    """The share as the guest sees it."""

    kind = "virtio-9p"
    transport: Transport
    fsdev: str
    mount_tag: str


@dataclass(frozen=True, slots=True)
class VhostUserFsDevice(VirtioDevice):
    """A virtio-fs directory, served by a process of its own."""

    kind = "vhost-user-fs"
    transport: Transport
    chardev: str
    tag: str


@dataclass(frozen=True, slots=True)
class VirtioBalloonDevice(VirtioDevice):
    """What the guest puts memory into that it gives back. Never in a clone or a template: see `VmSpec`."""

    kind = "virtio-balloon"
    transport: Transport
    id: str


@dataclass(frozen=True, slots=True)
class AddFd(Switch):
    """An inherited descriptor that block nodes open as ``/dev/fdset/<set>``."""

    flag = "-add-fd"
    fd: int
    set: int


@dataclass(frozen=True, slots=True)
class Blockdev(Switch):
    """A block node, in JSON: its options nest."""

    flag = "-blockdev"
    options: Mapping[str, object]

    def args(self) -> list[str]:
        """Switch and JSON."""
        return [self.flag, json.dumps(self.options)]


@dataclass(frozen=True, slots=True)
class VirtioBlkDevice(VirtioDevice):
    """A disk that is there from the start."""

    kind = "virtio-blk"
    transport: Transport
    drive: str
    serial: str
    bootindex: int | None = None


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
class VirtioNetDevice(VirtioDevice):
    """A network card."""

    kind = "virtio-net"
    transport: Transport
    netdev: str
    mac: str
    romfile: str | None = None
    """Empty: no firmware of the card's own, which a guest that starts from the network would need."""
