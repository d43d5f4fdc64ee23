"""Cgroups of VMs: found by the mount, made where they can be, and harmless where they cannot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu.cgroup import BASE, Cgroup, Cgroups, Usage, cgroup2_mount
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
        "+memory",
        "+pids",
    }
    (tmp_path / BASE / "cgroup.controllers").write_text("hugetlb\n")
    found = Cgroups.find(V2.format(tmp_path))
    assert found.available
    assert "cpu, memory, pids" in (found.note or "")
    assert "not mounted" in (Cgroups.find(V1).note or "")
    lost = Cgroups.find(V2.format(tmp_path / "gone"))
    assert not lost.available
    assert "cannot be made" in (lost.note or "")


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
