"""Limits as files of a cgroup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vcnode.guest.agent import cgroups
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.params import Params


def files(**resources: Any) -> dict[str, str]:
    return cgroups.files(Params(resources, "resources"))


def test_no_limit_is_no_file() -> None:
    assert files() == {}
    assert files(cpu_quota_us=None, cpu_period_us=100_000, mem_limit_mib=None) == {}


def test_all_limits() -> None:
    found = files(cpu_quota_us=25_000, cpu_period_us=50_000, cpu_shares=2, mem_limit_mib=8, pids_limit=3)
    assert found == {
        "cpu.max": "25000 50000",
        "cpu.weight": "1",
        "memory.max": "8388608",
        "memory.oom.group": "1",
        "pids.max": "3",
    }
    assert files(cpu_quota_us=25_000)["cpu.max"] == "25000 100000"


@pytest.mark.parametrize(("shares", "weight"), [(2, 1), (1024, 39), (262_144, 10_000)])
def test_weights(shares: int, weight: int) -> None:
    assert cgroups.cpu_weight(shares) == weight


@pytest.mark.parametrize(
    "resources",
    [
        {"cpu_quota_us": 1},
        {"cpu_shares": 1},
        {"mem_limit_mib": 0},
        {"pids_limit": 0},
        {"x": 1},
        {"pids_limit": "5"},
    ],
)
def test_bad_limits_are_refused(resources: dict[str, Any]) -> None:
    with pytest.raises(Failure, match=next(iter(resources))):
        files(**resources)


def test_counters() -> None:
    content = "low 0\noom 3\noom_kill 2\noom_group_kill 1\nodd x\n"
    assert cgroups.counter(content, "oom_kill") == 2
    assert cgroups.counter(content, "odd") == 0
    assert cgroups.counter("", "oom_kill") == 0


def test_the_controllers_that_the_kernel_has_are_handed_down(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset memory pids")
    (tmp_path / "containers").mkdir()
    for directory in (tmp_path, tmp_path / "containers"):
        (directory / "cgroup.subtree_control").touch()
    cgroups.set_up(str(tmp_path))
    # Each write of the real file adds; of a plain one, the last stays.
    for directory in (tmp_path, tmp_path / "containers"):
        assert "cpu" not in (directory / "cgroup.subtree_control").read_text()
        assert "pids" in (directory / "cgroup.subtree_control").read_text()


def test_oom_kills_are_counted_from_the_mark(tmp_path: Path) -> None:
    group = cgroups.Cgroup("c", str(tmp_path))
    Path(group.path).mkdir(parents=True)
    events = Path(group.path) / "memory.events"
    assert not group.oom_killed()  # no memory controller
    events.write_text("oom_kill 4\n")
    group.mark_oom()
    assert not group.oom_killed()
    events.write_text("oom_kill 5\n")
    assert group.oom_killed()


def test_remove_of_what_is_not_there_succeeds(tmp_path: Path) -> None:
    cgroups.Cgroup("c", str(tmp_path)).remove()
