"""Cgroups of VMs: found by the mount, made where they can be, and harmless where they cannot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu.cgroup import (
    BASE,
    Cgroup,
    Cgroups,
    Limits,
    Usage,
    cgroup1_mounts,
    cgroup2_mount,
    disk_of,
)
from vcnode.models.stats import CpuStats

V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
V2 = "41 31 0:38 / {} rw,relatime - cgroup2 cgroup2 rw\n"


def hierarchy(path: Path, controllers: str) -> Path:
    (path / BASE).mkdir()
    (path / BASE / "cgroup.controllers").write_text(controllers + "\n")
    return path


def test_the_v2_mount_is_found_in_hybrid_mode() -> None:
    assert cgroup2_mount(V1 + V2.format("/sys/fs/cgroup/unified")) == Path("/sys/fs/cgroup/unified")
    assert cgroup2_mount(V1) is None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    found = Cgroups.find(V2.format(hierarchy(tmp_path, "cpu io memory pids hugetlb")))
    assert (found.available, found.note) == (True, None)
    assert set((tmp_path / BASE / "cgroup.subtree_control").read_text().split()) <= {
        "+cpu",
        "+io",
        "+memory",
        "+pids",
    }
    (tmp_path / BASE / "cgroup.controllers").write_text("hugetlb\n")
    found = Cgroups.find(V2.format(tmp_path))
    assert found.available
    assert "cpu, io, memory, pids" in (found.note or "")
    assert "not mounted" in (Cgroups.find(V1).note or "")
    lost = Cgroups.find(V2.format(tmp_path / "gone"))
    assert not lost.available
    assert "cannot be made" in (lost.note or "")


def test_controllers_are_asked_of_the_parent_too(tmp_path: Path) -> None:
    (hierarchy(tmp_path, "") / "cgroup.controllers").write_text("io\n")
    Cgroups.find(V2.format(tmp_path))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+io"


def test_only_groups_of_the_mark_are_listed(tmp_path: Path) -> None:
    found = Cgroups.find(V2.format(hierarchy(tmp_path, "")))
    for name in ("vm-a1", "vm-a2", "vm-b1"):
        found.of(name).make()
    assert found.ids("vm-a") == ["vm-a1", "vm-a2"]
    assert Cgroups(None).ids("vm-") == []


def test_usage_has_memory_where_it_is_counted(tmp_path: Path) -> None:
    group = Cgroup(tmp_path)
    assert group.usage() is None
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\nsystem_usec 2499999\n")
    cpu = CpuStats(usage_us=2_500_000, user_us=1, system_us=2_499_999)
    assert group.usage() == Usage(cpu, None)
    (tmp_path / "memory.current").write_text("4096\n")
    assert group.usage() == Usage(cpu, 4096)


def test_without_a_hierarchy_nothing_happens() -> None:
    none = Cgroups(None).of("vm-1")
    none.make()
    none.take(1)
    none.kill()
    assert none.remove()
    assert none.usage() is None


@pytest.mark.root
def test_a_group_is_killed_at_once_and_can_be_removed_then() -> None:
    groups = Cgroups.find()
    if not groups.available:
        pytest.skip(f"this host has no usable cgroup v2: {groups.note}")
    group = groups.of(f"vct-{os.getpid()}")
    group.make()
    child = subprocess.Popen(["sleep", "600"])
    try:
        group.take(child.pid)
        assert not group.remove()
        group.kill()
        assert child.wait(10) == -9
        assert group.remove()
        assert group.remove()
        group.take(child.pid)
    finally:
        child.kill()
        child.wait()


# ---- limits ------------------------------------------------------------------------------------------

LIMITS = Limits.of(2, 256, 128, io_bytes_per_s=1000)


def test_limits_follow_from_the_size() -> None:
    assert LIMITS.v2(["8:0", "8:16"]) == {
        "memory.max": str((256 + 128 + 512) << 20),
        "cpu.max": "300000 100000",
        "pids.max": "258",
        "io.max": "8:0 rbps=1000 wbps=1000\n8:16 rbps=1000 wbps=1000",
    }
    assert "io.max" not in Limits.of(1, 128, 0).v2(["8:0"])
    assert LIMITS.v1("memory", ()) == {"memory.limit_in_bytes": str(896 << 20)}
    assert LIMITS.v1("cpu", ()) == {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "300000"}
    assert LIMITS.v1("io", ["8:0"])["blkio.throttle.read_bps_device"] == "8:0 1000"


def test_a_group_is_bounded_by_v1_where_v2_lacks_the_controller(tmp_path: Path) -> None:
    v1 = tmp_path / "v1"
    for name in ("memory", "pids"):
        (v1 / name).mkdir(parents=True)
    (tmp_path / "v2").mkdir()
    mountinfo = V2.format(hierarchy(tmp_path / "v2", "cpu io")) + "".join(
        f"33 31 0:{n} / {v1 / name} rw - cgroup cgroup rw,{name}\n"
        for n, name in enumerate(("memory", "pids"))
    )
    found = Cgroups.find(mountinfo, disks=("8:0",))
    assert found.note is not None
    assert "cgroup v1 (memory, pids)" in found.note
    group = found.of("vm-1")
    assert group.path is not None
    for directory in (group.path, v1 / "memory/vcnode/vm-1", v1 / "pids/vcnode/vm-1"):
        directory.mkdir()
    for file in ("cpu.max", "io.max"):  # the kernel makes them; those of absent controllers are not there
        (group.path / file).touch()
    (v1 / "memory/vcnode/vm-1/memory.limit_in_bytes").touch()
    (v1 / "pids/vcnode/vm-1/pids.max").touch()
    group.make(LIMITS)
    assert (group.path / "cpu.max").read_text() == "300000 100000"
    assert (group.path / "io.max").read_text() == "8:0 rbps=1000 wbps=1000"
    assert (v1 / "memory/vcnode/vm-1/memory.limit_in_bytes").read_text() == str(896 << 20)
    assert (v1 / "pids/vcnode/vm-1/pids.max").read_text() == "258"
    group.take(17)
    assert (v1 / "pids/vcnode/vm-1/cgroup.procs").read_text() == "17"


def test_all_groups_of_a_vm_go(tmp_path: Path) -> None:
    group = Cgroup(tmp_path / "a", {"pids": tmp_path / "b"})
    group.make()
    assert group.remove()
    assert list(tmp_path.iterdir()) == []
    assert group.remove()


def test_v1_mounts_and_disks_are_found(tmp_path: Path) -> None:
    mountinfo = V1 + "35 31 0:33 / /cg/blkio rw - cgroup cgroup rw,blkio\n" + V2.format("/cg/unified")
    assert cgroup1_mounts(mountinfo) == {"cpu": Path("/sys/fs/cgroup/cpu"), "io": Path("/cg/blkio")}
    number = tmp_path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    disk = tmp_path / "devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "sda1/partition").write_text("1\n")
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / name).symlink_to(disk / "sda1")
    assert disk_of(tmp_path, tmp_path / "block") == "8:0"
    assert disk_of(tmp_path, tmp_path / "devices") is None
