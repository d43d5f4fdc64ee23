"""vcnode.drivers.hypervisor.qemu.argv: the command line, switch by switch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import argv
from vcnode.models.vm import NetDev, VmSpec

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
    spec=SPEC,
    kernel=Path("/g/vmlinux"),
    initrd=Path("/g/initrd"),
    qmp_fd=7,
    agent_fd=8,
    console=Path("/run/vcnode/vms/vm-0123456789ab/console"),
)


def values(launch: argv.Launch, flag: str) -> list[str]:
    """What follows each *flag* on the command line."""
    args = argv.build(launch)
    return [value for name, value in pairwise(args) if name == flag]


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
        *("-append", "console=ttyS0 quiet panic=-1 reboot=t"),
        *("-chardev", "socket,id=qmp0,fd=7,server=on,wait=off"),
        *("-mon", "chardev=qmp0,mode=control"),
        *("-chardev", "pipe,id=console0,path=/run/vcnode/vms/vm-0123456789ab/console"),
        *("-serial", "chardev:console0"),
        *("-device", "virtio-serial-device,id=serial0,max_ports=4"),
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
    launch = replace(LAUNCH, kernel_params=("console=ttyS0", "a=b,c"))
    assert values(launch, "-append") == ["console=ttyS0 a=b,c"]


def test_a_balloon_is_for_memory_of_its_own_only():
    own = replace(LAUNCH, spec=SPEC.model_copy(update={"balloon": True}))
    assert values(own, "-device")[-1] == "virtio-balloon-device,id=balloon0"
    for shared in (True, False):
        of_a_file = replace(own, ram_file=Path("/t/ram"), ram_share=shared)
        assert not any("balloon" in arg for arg in argv.build(of_a_file))
    assert not any("balloon" in arg for arg in argv.build(LAUNCH))
