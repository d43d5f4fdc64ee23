"""vcnode.drivers.hypervisor.qemu.argv: the command line, switch by switch."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import argv, machines
from vcnode.drivers.hypervisor.qemu.machines import ARCHITECTURES
from vcnode.errors import InvalidArgumentError, UnsupportedError
from vcnode.models.hypervisor import DiskFormat, MachineType
from vcnode.models.vm import Channel, DiskFile, NetDev, Share, VmConfig, VmSpec

QUIET = "quiet initcall_blacklist=tracer_init_tracefs"
SPEC = VmSpec(
    vm_id="vm-0123456789ab",
    uuid="11111111-2222-3333-4444-555555555555",
    vcpu_count=2,
    mem_size_mib=256,
    directory="/run/vcnode/vms/vm-0123456789ab",
    shared_dir="/run/vcnode/vms/vm-0123456789ab/shared",
)
LAUNCH = argv.Launch(
    binary="/usr/bin/qemu-system-x86_64",
    accelerator="tcg",
    architecture=ARCHITECTURES["x86_64"],
    spec=SPEC,
    kernel=Path("/g/vmlinux"),
    initrd=Path("/g/initrd"),
    qmp_fd=7,
    channel_fds=(8,),
    console=Path("/run/vcnode/vms/vm-0123456789ab/console"),
)


def values(launch: argv.Launch, flag: str) -> list[str]:
    """What follows each *flag* on the command line."""
    args = argv.build(launch)
    return [value for name, value in pairwise(args) if name == flag]


def test_each_channel_is_a_port_of_its_own():
    ports = (Channel(channel_id="ctl", name="a.0"), Channel(channel_id="tty", name="a.1"))
    spec = SPEC.model_copy(update={"channels": ports, "share_tag": "mine"})
    launch = replace(LAUNCH, spec=spec, channel_fds=(8, 9))
    assert values(launch, "-chardev")[-2:] == [
        "socket,id=ctl0,fd=8,server=on,wait=off",
        "socket,id=tty0,fd=9,server=on,wait=off",
    ]
    assert values(launch, "-device")[1:3] == [
        "virtserialport,bus=serial0.0,chardev=ctl0,name=a.0",
        "virtserialport,bus=serial0.0,chardev=tty0,name=a.1",
    ]
    assert values(launch, "-device")[-1] == "virtio-9p-device,fsdev=share0,mount_tag=mine"
    assert argv.inherited_fds(launch) == (7, 8, 9)


def test_the_whole_command_line():
    assert argv.build(LAUNCH) == [
        "/usr/bin/qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        *("-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-name", "guest=vcnode-vm-0123456789ab"),
        *("-uuid", "11111111-2222-3333-4444-555555555555"),
        *("-machine", "type=microvm,memory-backend=ram"),
        *("-accel", "tcg,tb-size=128"),
        *("-cpu", "max,-erms"),
        *("-smp", "cpus=2"),
        *("-m", "size=256M"),
        *("-object", "memory-backend-ram,id=ram,size=256M"),
        *("-kernel", "/g/vmlinux"),
        *("-initrd", "/g/initrd"),
        *("-append", f"console=ttyS0 {QUIET} panic=-1 reboot=t"),
        *("-chardev", "socket,id=qmp0,fd=7,server=on,wait=off"),
        *("-mon", "chardev=qmp0,mode=control"),
        *("-chardev", "pipe,id=console0,path=/run/vcnode/vms/vm-0123456789ab/console"),
        *("-serial", "chardev:console0"),
        *("-device", "virtio-serial-device,id=serial0,max_ports=9"),
        *("-chardev", "socket,id=agent0,fd=8,server=on,wait=off"),
        *("-device", "virtserialport,bus=serial0.0,chardev=agent0,name=vcnode.agent.0"),
        *("-device", "virtio-scsi-device,id=scsi0"),
        "-fsdev",
        "local,id=share0,path=/run/vcnode/vms/vm-0123456789ab/shared,security_model=none,multidevs=remap",
        *("-device", "virtio-9p-device,fsdev=share0,mount_tag=vcnode-shared"),
    ]


def test_kvm_passes_the_hosts_cpu():
    kvm = replace(LAUNCH, accelerator="kvm")
    assert values(kvm, "-cpu") == ["host"]
    assert values(kvm, "-accel") == ["kvm"]


def test_each_tap_becomes_a_network_device():
    netdevs = (NetDev(tap_fd=9, mac="52:54:00:00:00:01"), NetDev(tap_fd=11, mac="52:54:00:00:00:02"))
    launch = replace(LAUNCH, spec=SPEC.model_copy(update={"netdevs": netdevs}))
    assert values(launch, "-netdev") == ["tap,id=net0,fd=9", "tap,id=net1,fd=11"]
    assert values(launch, "-device")[-1] == "virtio-net-device,netdev=net1,mac=52:54:00:00:00:02"
    assert argv.inherited_fds(launch) == (7, 8, 9, 11)


def test_vhost_moves_the_frames_where_the_host_has_it():
    netdevs = (NetDev(tap_fd=9, mac="52:54:00:00:00:01"),)
    launch = replace(LAUNCH, spec=SPEC.model_copy(update={"netdevs": netdevs}), vhost_fds=(12,))
    assert values(launch, "-netdev") == ["tap,id=net0,fd=9,vhost=on,vhostfd=12"]
    assert argv.inherited_fds(launch) == (7, 8, 9, 12)


def test_commas_in_paths_are_doubled():
    launch = replace(
        LAUNCH,
        spec=SPEC.model_copy(update={"shared_dir": "/a,readonly=on"}),
        console=Path("/b,c"),
        kernel=Path("/not,parsed"),
    )
    assert "path=/a,,readonly=on,security_model" in values(launch, "-fsdev")[0]
    assert values(launch, "-chardev")[1] == "pipe,id=console0,path=/b,,c"
    assert values(launch, "-kernel") == ["/not,parsed"]


@pytest.mark.parametrize(("share", "text"), [(True, "on"), (False, "off")])
def test_memory_in_a_file_for_templates_and_their_clones(share: bool, text: str):
    launch = replace(LAUNCH, ram_file=Path("/t/ram"), ram_share=share, incoming="defer")
    assert values(launch, "-object") == [f"memory-backend-file,id=ram,size=256M,mem-path=/t/ram,share={text}"]
    assert values(launch, "-incoming") == ["defer"]


def test_kernel_parameters_are_given_whole():
    launch = replace(LAUNCH, kernel_params=("a=b,c",))
    assert values(launch, "-append") == [f"console=ttyS0 {QUIET} panic=-1 reboot=t a=b,c"]


def test_a_balloon_is_for_memory_of_its_own_only():
    own = replace(LAUNCH, spec=SPEC.model_copy(update={"balloon": True}))
    assert values(own, "-device")[-1] == "virtio-balloon-device,id=balloon0"
    for shared in (True, False):
        of_a_file = replace(own, ram_file=Path("/t/ram"), ram_share=shared)
        assert not any("balloon" in arg for arg in argv.build(of_a_file))
    assert not any("balloon" in arg for arg in argv.build(LAUNCH))


Q35 = VmConfig(disks=(DiskFile(fd=20, format=DiskFormat.QCOW2),))


def configured(config: VmConfig, **changes: object) -> argv.Launch:
    return replace(LAUNCH, spec=SPEC.model_copy(update={"config": config, **changes}))


def test_a_guest_that_starts_from_its_disk_gets_firmware_and_pci():
    netdevs = (NetDev(tap_fd=9, mac="52:54:00:00:00:01"),)
    launch = configured(Q35, netdevs=netdevs, balloon=True)
    args = argv.build(launch)
    assert not {"-kernel", "-initrd", "-append"} & set(args)
    assert values(launch, "-machine") == ["type=q35,memory-backend=ram,graphics=off"]
    assert values(launch, "-device") == [
        "virtio-serial-pci,id=serial0,max_ports=9",
        "virtserialport,bus=serial0.0,chardev=agent0,name=vcnode.agent.0",
        "virtio-scsi-pci,id=scsi0",
        "virtio-9p-pci,fsdev=share0,mount_tag=vcnode-shared",
        "virtio-blk-pci,drive=disk0,serial=vcnode-0,bootindex=0",
        "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01,romfile=",
        "virtio-balloon-pci,id=balloon0",
    ]


def test_a_disk_is_opened_as_what_it_is_and_follows_no_name_in_its_header():
    launch = configured(Q35)
    assert values(launch, "-add-fd") == ["fd=20,set=1000"]
    assert [json.loads(text) for text in values(launch, "-blockdev")] == [
        {
            "driver": "qcow2",
            "node-name": "disk0",
            "read-only": False,
            "discard": "unmap",
            "file": {"driver": "file", "filename": "/dev/fdset/1000", "read-only": False, "discard": "unmap"},
            "backing": None,
        }
    ]
    assert argv.inherited_fds(launch) == (7, 8, 20)


def test_an_overlay_takes_the_writes_and_its_base_is_only_read():
    over = DiskFile(fd=20, format=DiskFormat.QCOW2, base_fd=21, base_format=DiskFormat.RAW)
    launch = configured(
        VmConfig(kernel="/k", disks=(over, DiskFile(fd=22, format=DiskFormat.RAW, read_only=True)))
    )
    assert values(launch, "-add-fd") == ["fd=21,set=1001", "fd=20,set=1000", "fd=22,set=1002"]
    base, disk, second = (json.loads(text) for text in values(launch, "-blockdev"))
    assert (base["driver"], base["read-only"], base["file"]["read-only"]) == ("raw", True, True)
    assert base["file"]["filename"] == "/dev/fdset/1001"
    assert (disk["backing"], disk["read-only"]) == ("disk0-base", False)
    assert (second["driver"], second["read-only"]) == ("raw", True)
    assert argv.inherited_fds(launch) == (7, 8, 20, 21, 22)
    # The machine for kernels has no firmware, so its disks have no order in which they start.
    assert values(launch, "-device")[-1] == "virtio-blk-device,drive=disk1,serial=vcnode-1"


@pytest.mark.parametrize(
    ("config", "kernel", "initrd", "params"),
    [
        (VmConfig(kernel="/k"), ["/k"], [], ""),
        (VmConfig(kernel="/k", initrd="/i"), ["/k"], ["/i"], ""),
        (VmConfig(initrd="/i"), ["/g/vmlinux"], ["/i"], ""),
        (VmConfig(kernel="/k", kernel_params=("a", "b=c")), ["/k"], [], " a b=c"),
        (VmConfig(kernel="/k", disks=Q35.disks), ["/k"], [], " root=/dev/vda rw"),
        (
            VmConfig(kernel="/k", disks=Q35.disks, kernel_params=("root=LABEL=x",)),
            ["/k"],
            [],
            " root=LABEL=x",
        ),
        (VmConfig(kernel="/k", initrd="/i", disks=Q35.disks), ["/k"], ["/i"], ""),
    ],
)
def test_what_boots(config: VmConfig, kernel: list[str], initrd: list[str], params: str):
    launch = configured(config)
    assert values(launch, "-kernel") == kernel
    assert values(launch, "-initrd") == initrd
    quiet = QUIET if config.kernel is None else "quiet"
    assert values(launch, "-append") == [f"console=ttyS0 {quiet} panic=-1 reboot=t{params}"]
    assert values(launch, "-machine")[0].startswith("type=microvm,")


def test_options_of_the_hypervisor():
    config = VmConfig(
        machine_type=MachineType.Q35,
        firmware="/fw",
        cpu_model="Skylake-Client,-erms",
        mem_prealloc=True,
        debug=True,
        hypervisor_params=(("rtc", "base=localtime"), ("S", "")),
    )
    launch = configured(config)
    assert values(launch, "-bios") == ["/fw"]
    assert values(launch, "-cpu") == ["Skylake-Client,-erms"]
    assert values(launch, "-object") == ["memory-backend-ram,id=ram,size=256M,prealloc=on"]
    assert values(launch, "-append") == ["console=ttyS0 debug ignore_loglevel panic=-1 reboot=t"]
    assert values(launch, "-d") == ["guest_errors,unimp"]
    assert argv.build(launch)[-3:] == ["-rtc", "base=localtime", "-S"]


def test_huge_pages_need_no_mount():
    launch = configured(VmConfig(huge_pages=True))
    assert values(launch, "-object") == ["memory-backend-memfd,id=ram,size=256M,hugetlb=on"]


def test_aarch64_has_a_machine_a_console_and_a_cpu_of_its_own():
    launch = replace(LAUNCH, architecture=ARCHITECTURES["aarch64"], binary="qemu-system-aarch64")
    assert values(launch, "-machine") == ["type=virt,memory-backend=ram,gic-version=max"]
    assert values(launch, "-cpu") == ["max,pauth-impdef=on"]
    assert values(launch, "-append") == [f"console=ttyAMA0 {QUIET} panic=-1"]
    assert values(launch, "-device")[0] == "virtio-serial-pci,id=serial0,max_ports=9"
    assert values(replace(launch, accelerator="kvm"), "-cpu") == ["host"]
    with pytest.raises(InvalidArgumentError, match="firmware_path"):
        argv.build(replace(launch, spec=SPEC.model_copy(update={"config": Q35})))
    with_firmware = Q35.model_copy(update={"firmware": "/efi"})
    from_disk = replace(launch, spec=SPEC.model_copy(update={"config": with_firmware}))
    assert (values(from_disk, "-kernel"), values(from_disk, "-bios")) == ([], ["/efi"])
    assert values(from_disk, "-machine") == values(launch, "-machine")


@pytest.mark.parametrize(
    ("arch", "machine_type", "from_disk", "match"),
    [
        ("x86_64", MachineType.VIRT, False, "virt does not go with x86_64"),
        ("aarch64", MachineType.Q35, False, "q35 does not go with aarch64"),
        ("x86_64", MachineType.MICROVM, True, "no firmware"),
    ],
)
def test_machines_that_cannot_run_the_guest(
    arch: str, machine_type: MachineType, from_disk: bool, match: str
):
    with pytest.raises(UnsupportedError, match=match):
        machines.choose(ARCHITECTURES[arch], machine_type, from_disk=from_disk)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UnsupportedError, match="riscv64"):
        machines.architecture("riscv64")


def test_volumes_are_devices_with_tags_and_virtio_fs_shares_the_memory():
    shares = (
        Share(tag="data", directory="/v/shared/volume.data"),
        Share(tag="fast", directory="/v/shared/volume.fast", virtio_fs=True),
        Share(tag="more", directory="/v/shared/volume.more"),
    )
    launch = replace(LAUNCH, spec=SPEC.model_copy(update={"shares": shares}), virtio_fs_fds=(21,))
    assert values(launch, "-fsdev")[1:] == [
        f"local,id=volume{n},path=/v/shared/volume.{tag},security_model=none,multidevs=remap"
        for n, tag in ((0, "data"), (2, "more"))
    ]
    assert values(launch, "-device")[-3:] == [
        "virtio-9p-device,fsdev=volume0,mount_tag=data",
        "vhost-user-fs-device,chardev=fs1,tag=fast",
        "virtio-9p-device,fsdev=volume2,mount_tag=more",
    ]
    assert "socket,id=fs1,fd=21" in values(launch, "-chardev")
    assert "memory-backend-memfd,id=ram,size=256M,hugetlb=off,share=on" in values(launch, "-object")
    assert values(launch, "-global") == ["virtio-mmio.force-legacy=false"]
    assert 21 in argv.inherited_fds(launch)


def test_templates_and_clones_have_a_slot_and_what_boots_for_itself_has_none() -> None:
    clone = replace(LAUNCH, spec=SPEC.model_copy(update={"clone_of": "k"}))
    making = replace(LAUNCH, spec=SPEC.model_copy(update={"template_key": "k"}))
    device = "scsi-hd,bus=scsi0.0,drive=slot-image,serial=slot-image"
    for launch in (clone, making):
        (node,) = map(json.loads, values(launch, "-blockdev"))
        assert (node["driver"], node["size"], node["read-only"]) == ("null-co", 1 << 40, True)
        assert device in values(launch, "-device")
    held = replace(clone, slot_fd=31)
    assert values(held, "-add-fd") == ["fd=31,set=999"]
    (node,) = map(json.loads, values(held, "-blockdev"))
    assert (node["driver"], node["file"]["filename"]) == ("raw", "/dev/fdset/999")
    assert node["read-only"] is node["file"]["read-only"] is True
    assert 31 in argv.inherited_fds(held)
    assert device not in values(LAUNCH, "-device")
