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


def test_oom_kills_are_those_since_the_last_question(tmp_path: Path) -> None:
    group = cgroups.Cgroup("c", str(tmp_path))
    Path(group.path).mkdir(parents=True)
    events = Path(group.path) / "memory.events"
    assert not group.oom_killed()  # no memory controller
    events.write_text("oom_kill 4\n")
    assert group.oom_killed()
    assert not group.oom_killed()
    events.write_text("oom_kill 5\n")
    assert group.oom_killed()


def test_remove_of_what_is_not_there_succeeds(tmp_path: Path) -> None:
    cgroups.Cgroup("c", str(tmp_path)).remove()


def group(tmp_path: Path, **contents: str) -> cgroups.Cgroup:
    """A group whose files are ordinary ones, in a kernel without a CPU controller."""
    path = tmp_path / cgroups.PARENT / "c"
    path.mkdir(parents=True)
    usual = {
        "memory.max": "max",
        "memory.oom.group": "0",
        "memory.current": str(30 << 20),
        "memory.stat": f"anon {9 << 20}\ninactive_file {10 << 20}\nactive_file {11 << 20}\n",
        "memory.swap.max": "9",
        "pids.max": "max",
        "pids.current": "3",
    }
    for name, content in {**usual, **{k.replace("_", ".", 1): v for k, v in contents.items()}}.items():
        (path / name).write_text(content + "\n")
    return cgroups.Cgroup("c", str(tmp_path))


def read(found: cgroups.Cgroup, *names: str) -> list[str]:
    return [Path(found.path, name).read_text().strip() for name in names]


def test_an_update_sets_what_is_given_and_lifts_the_rest(tmp_path: Path) -> None:
    found = group(tmp_path)
    names = ("memory.max", "memory.oom.group", "memory.swap.max", "pids.max")
    Path(found.path, "pids.max").write_text("77")
    found.update(files(mem_limit_mib=9))
    assert [text[:7] for text in read(found, *names)] == ["9437184", "1", "0", "max"]


@pytest.mark.parametrize(
    ("limits", "message"), [({"mem_limit_mib": 8}, "uses 9 MiB now"), ({"pids_limit": 2}, "has 3 processes")]
)
def test_an_update_below_what_is_in_use_changes_nothing(
    tmp_path: Path, limits: dict[str, int], message: str
) -> None:
    found = group(tmp_path)
    with pytest.raises(Failure, match=message) as caught:
        found.update(files(**limits))
    assert caught.value.code == "failed_precondition"
    assert read(found, "memory.max", "pids.max") == ["max", "max"]


def test_an_update_that_the_kernel_refuses_is_taken_back(tmp_path: Path) -> None:
    found = group(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        found.update(files(cpu_shares=2, mem_limit_mib=64))  # there is no cpu.weight
    found.update(files(mem_limit_mib=64))
    Path(found.path, "pids.max").unlink()
    with pytest.raises(OSError, match="No such file"):
        found.update(files(mem_limit_mib=32, pids_limit=5))
    assert read(found, "memory.max", "memory.oom.group") == [str(64 << 20), "1"]


def test_memory_that_could_be_given_away_is_the_kernels_estimate(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert cgroups.available_bytes(str(file)) == 65_536
    file.write_text("MemTotal: 100 kB\n")
    assert cgroups.available_bytes(str(file)) == 0
