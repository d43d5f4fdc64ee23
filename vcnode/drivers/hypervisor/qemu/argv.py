"""QEMU's command line as a pure function of what is to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.hypervisor.qemu.machines import Architecture, Machine, choose
from vcnode.drivers.hypervisor.qemu.process import NAME_PREFIX
from vcnode.drivers.hypervisor.qemu.switches import (
    AddFd,
    Append,
    Bios,
    Blockdev,
    Cpu,
    DebugItems,
    Display,
    Given,
    Incoming,
    Initrd,
    Kernel,
    KvmAccel,
    LocalFsdev,
    MachineSwitch,
    Memory,
    MemoryBackendFile,
    MemoryBackendMemfd,
    MemoryBackendRam,
    ModernMmio,
    Mon,
    Name,
    NoDefaults,
    NoReboot,
    NoUserConfig,
    PipeChardev,
    Sandbox,
    ScsiDisk,
    Serial,
    Smp,
    SocketChardev,
    Switch,
    TapNetdev,
    TcgAccel,
    Uuid,
    VhostUserFsDevice,
    Virtio9pDevice,
    VirtioBalloonDevice,
    VirtioBlkDevice,
    VirtioNetDevice,
    VirtioScsiDevice,
    VirtioSerialDevice,
    VirtSerialPort,
)
from vcnode.models.hypervisor import DiskFormat
from vcnode.models.vm import SLOT_BYTES, SLOT_DISK, DiskFile, Share, VmConfig, VmSpec

SCSI_BUS = "scsi0.0"
"""Where disks are plugged in."""
SERIAL_BUS = "serial0.0"
"""Where serial ports are."""
SERIAL_PORTS = 9
"""Ports of the bus: that which the kernel keeps for a console, two for an agent, the rest for sockets."""
SLOT_SET = 999
"""Number of the set of descriptors with the image in the slot; see `_set_of`."""
NO_TRACING = "initcall_blacklist=tracer_init_tracefs"
"""Keeps the node's kernel from making tracefs, some 10,000 files that nobody opens: 9 of the 82 MiB that
Debian's 6.1 leaves of 128 (kernel/trace/trace.c; admin-guide/kernel-parameters)."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that one command line is made of."""

    binary: str
    """QEMU, by name or path."""
    accelerator: str
    """``kvm`` or ``tcg``."""
    spec: VmSpec
    """The VM."""
    architecture: Architecture
    """The host's."""
    kernel: Path
    """The node's own kernel: for VMs that bring none."""
    initrd: Path
    """Its initramfs."""
    qmp_fd: int
    """Listening socket for QMP, inherited."""
    channel_fds: Sequence[int]
    """Listening socket of each of the VM's channels, inherited."""
    console: Path
    """FIFOs of the serial console, without their ``.in`` and ``.out``."""
    tcg_cache_mib: int = 128
    """Most memory for translated code, without KVM."""
    kernel_params: tuple[str, ...] = ()
    """For every kernel on this host."""
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
    virtio_fs_fds: Sequence[int] = ()
    """Connections with the processes that serve directories by virtio-fs, in their order; inherited."""
    slot_fd: int | None = None
    """Descriptor of the image in the slot; inherited."""
    file_fds: Sequence[int] = ()
    """Descriptors of files that paths above name as ``/proc/self/fd/N``; inherited."""

    @property
    def machine(self) -> Machine:
        """The machine of the VM. Raises UnsupportedError when there is none that can run it."""
        config = self.spec.config
        return choose(
            self.architecture,
            config.machine_type,
            from_disk=config.from_disk,
            firmware=config.firmware is not None,
        )


def kernel_params(machine: Machine, config: VmConfig, of_host: Sequence[str] = ()) -> tuple[str, ...]:
    """The kernel's command line: the node's part, then the pod's, which the kernel hears last.

    ``panic=-1`` and ``reboot=t``: a panic or reboot resets the machine, and ``-no-reboot`` ends QEMU then.
    """
    own = config.kernel_params
    # Whoever brings a kernel may want to trace what it does.
    quiet = ("quiet", NO_TRACING) if config.kernel is None else ("quiet",)
    loud = ("debug", "ignore_loglevel") if config.debug else quiet
    reboot = () if machine.reboot is None else (f"reboot={machine.reboot}",)
    mounts_disk = config.disks and config.kernel is not None and config.initrd is None
    root = ("root=/dev/vda", "rw") if mounts_disk and not any(p.startswith("root=") for p in own) else ()
    return (f"console={machine.console}", *loud, "panic=-1", *reboot, *of_host, *root, *own)


def own_guest(architecture: Architecture) -> tuple[str, ...]:
    """What of the command line is as it is for all VMs of the node's own guest: machine, CPU, parameters."""
    machine = choose(architecture, None, from_disk=False)
    return (machine.type, machine.transport, architecture.tcg_cpu, *kernel_params(machine, VmConfig()))


def switches(launch: Launch) -> Iterator[Switch]:
    """Every switch of the VM, in the order of the command line."""
    spec, machine, config = launch.spec, launch.machine, launch.spec.config
    transport = machine.transport
    yield from (NoDefaults(), NoUserConfig(), NoReboot(), Display(), Sandbox())
    yield Name(f"{NAME_PREFIX}{spec.vm_id}")
    yield Uuid(spec.uuid)
    yield MachineSwitch(
        machine.type, memory_backend="ram", graphics=machine.graphics, gic_version=machine.gic_version
    )
    yield KvmAccel() if launch.accelerator == "kvm" else TcgAccel(tb_size=launch.tcg_cache_mib)
    yield Cpu(config.cpu_model or ("host" if launch.accelerator == "kvm" else launch.architecture.tcg_cpu))
    yield Smp(cpus=spec.vcpu_count)
    yield Memory(f"{spec.mem_size_mib}M")
    yield _memory_backend(launch)
    if transport == "device" and any(share.virtio_fs for share in spec.shares):
        yield ModernMmio()  # virtiofsd knows nothing else
    yield from _boot(launch)
    yield SocketChardev(id="qmp0", fd=launch.qmp_fd)
    yield Mon(chardev="qmp0")
    yield PipeChardev(id="console0", path=launch.console)
    yield Serial("chardev:console0")
    yield VirtioSerialDevice(transport, id="serial0", max_ports=SERIAL_PORTS)
    for channel, fd in zip(spec.channels, launch.channel_fds, strict=True):
        yield SocketChardev(id=f"{channel.channel_id}0", fd=fd)
        yield VirtSerialPort(bus=SERIAL_BUS, chardev=f"{channel.channel_id}0", name=channel.name)
    yield VirtioScsiDevice(transport, id="scsi0")
    if spec.has_slot:
        yield from _slot(launch)
    yield LocalFsdev(id="share0", path=launch.share or Path(spec.shared_dir))
    yield Virtio9pDevice(transport, fsdev="share0", mount_tag=spec.share_tag)
    for index, share in enumerate(spec.shares):
        yield from _share(index, share, launch)
    for index, disk in enumerate(config.disks):
        yield from _disk(index, disk, machine)
    for index, netdev in enumerate(spec.netdevs):
        vhost_fd = launch.vhost_fds[index] if launch.vhost_fds else None
        vhost = None if vhost_fd is None else True
        yield TapNetdev(id=f"net{index}", fd=netdev.tap_fd, vhost=vhost, vhostfd=vhost_fd)
        romfile = "" if transport == "pci" else None
        yield VirtioNetDevice(transport, netdev=f"net{index}", mac=netdev.mac, romfile=romfile)
    if spec.balloon and launch.ram_file is None:
        yield VirtioBalloonDevice(transport, id="balloon0")
    if config.debug:
        yield DebugItems("guest_errors,unimp")
    if launch.incoming is not None:
        yield Incoming(launch.incoming)
    for key, value in config.hypervisor_params:
        yield Given(key, value)


def _share(index: int, share: Share, launch: Launch) -> Iterator[Switch]:
    """A directory that the guest finds by its tag."""
    transport = launch.machine.transport
    if share.virtio_fs:
        fd = launch.virtio_fs_fds[sum(each.virtio_fs for each in launch.spec.shares[:index])]
        yield SocketChardev(id=f"fs{index}", fd=fd, server=None, wait=None)
        yield VhostUserFsDevice(transport, chardev=f"fs{index}", tag=share.tag)
    else:
        yield LocalFsdev(id=f"volume{index}", path=Path(share.directory))
        yield Virtio9pDevice(transport, fsdev=f"volume{index}", mount_tag=share.tag)


def _memory_backend(launch: Launch) -> Switch:
    config, size = launch.spec.config, f"{launch.spec.mem_size_mib}M"
    if launch.ram_file is not None:
        return MemoryBackendFile(id="ram", size=size, mem_path=launch.ram_file, share=launch.ram_share)
    prealloc = config.mem_prealloc or None
    shared = any(share.virtio_fs for share in launch.spec.shares)
    if config.huge_pages or shared:
        return MemoryBackendMemfd(
            id="ram", size=size, prealloc=prealloc, hugetlb=config.huge_pages, share=shared or None
        )
    return MemoryBackendRam(id="ram", size=size, prealloc=prealloc)


def _boot(launch: Launch) -> Iterator[Switch]:
    """What the VM starts: a kernel that QEMU loads, or what the firmware finds on the first disk."""
    config = launch.spec.config
    if config.firmware is not None:
        yield Bios(Path(config.firmware))
    if config.from_disk:
        return
    yield Kernel(launch.kernel if config.kernel is None else Path(config.kernel))
    if config.initrd is not None:
        yield Initrd(Path(config.initrd))
    elif config.kernel is None:
        yield Initrd(launch.initrd)
    yield Append(" ".join(kernel_params(launch.machine, config, launch.kernel_params)))


def _disk(index: int, disk: DiskFile, machine: Machine) -> Iterator[Switch]:
    """A disk of files that QEMU inherits open, so that it needs no right on them.

    The base is named here and not left to what the overlay's header says; that of a base counts for nothing.
    Source: QEMU qapi/block-core.json; docs/system/images.rst; "-add-fd" of qemu(1).
    """
    node, over = f"disk{index}", disk.base_fd is not None
    if disk.base_fd is not None:
        yield AddFd(fd=disk.base_fd, set=_set_of(index, base=True))
        yield Blockdev(_node(f"{node}-base", disk.base_format, _set_of(index, base=True), read_only=True))
    yield AddFd(fd=disk.fd, set=_set_of(index, base=False))
    options = _node(node, disk.format, _set_of(index, base=False), read_only=disk.read_only)
    yield Blockdev(options | {"backing": f"{node}-base"} if over else options)
    bootindex = index if machine.boots_disks else None
    yield VirtioBlkDevice(machine.transport, drive=node, serial=f"vcnode-{index}", bootindex=bootindex)


def _slot(launch: Launch) -> Iterator[Switch]:
    """The disk that a template and its clones have from the start; a clone may have another file in it."""
    if launch.slot_fd is not None:
        yield AddFd(fd=launch.slot_fd, set=SLOT_SET)
        yield Blockdev(_node(SLOT_DISK, DiskFormat.RAW, SLOT_SET, read_only=True))
    else:
        nothing = {"driver": "null-co", "size": SLOT_BYTES, "read-zeroes": True, "read-only": True}
        yield Blockdev({"node-name": SLOT_DISK, **nothing})
    yield ScsiDisk(bus=SCSI_BUS, drive=SLOT_DISK, serial=SLOT_DISK)


def _set_of(index: int, *, base: bool) -> int:
    """The number of a set of descriptors; those that QMP adds later get the smallest that are free."""
    return 1000 + 2 * index + base


def _node(name: str, format_: DiskFormat, fd_set: int, *, read_only: bool) -> dict[str, object]:
    common = {"read-only": read_only, "discard": "ignore" if read_only else "unmap"}
    file = {"driver": "file", "filename": f"/dev/fdset/{fd_set}", **common}
    bare = {"backing": None} if format_ is DiskFormat.QCOW2 else {}
    return {"driver": format_.value, "node-name": name, **common, "file": file, **bare}


def build(launch: Launch) -> list[str]:
    """The command line of one VM. Pure: the same input gives the same arguments."""
    return [launch.binary, *(arg for switch in switches(launch) for arg in switch.args())]


def inherited_fds(launch: Launch) -> tuple[int, ...]:
    """Descriptors that the command line names, which QEMU must inherit under the same numbers."""
    config = launch.spec.config
    disks = (fd for disk in config.disks for fd in (disk.fd, disk.base_fd))
    return (
        launch.qmp_fd,
        *launch.channel_fds,
        *(netdev.tap_fd for netdev in launch.spec.netdevs),
        *launch.vhost_fds,
        *launch.virtio_fs_fds,
        *launch.file_fds,
        *config.file_fds,
        *(fd for fd in (launch.ram_fd, launch.state_fd, launch.slot_fd, *disks) if fd is not None),
    )
