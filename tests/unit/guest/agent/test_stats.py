"""What a guest tells of what it uses: of files as the kernel writes them, and of this machine's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from vcnode.drivers.agent.native import stats as reader
from vcnode.guest.agent import stats
from vcnode.guest.agent.cgroups import Cgroup
from vcnode.guest.agent.loop import Loop

GROUP = {
    "cpu.stat": "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_throttled 2\nthrottled_usec 50\n",
    "memory.current": "5000\n",
    "memory.peak": "9000\n",
    "memory.max": "max\n",
    "memory.stat": "anon 1000\ninactive_file 1500\nactive_file 10\n",
    "memory.events": "oom 3\noom_kill 1\n",
    "pids.current": "4\n",
    "pids.max": "100\n",
    "io.stat": "8:0 rbytes=100 wbytes=200 rios=1 wios=2 x=0\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n7:0 \n",
}


def make_group(root: Path, container_id: str, files: dict[str, str]) -> Cgroup:
    group = Cgroup(container_id, str(root))
    Path(group.path).mkdir(parents=True)
    for name, content in files.items():
        (Path(group.path) / name).write_text(content)
    return group


def sampled(groups: dict[str, Cgroup], spoil: Path | None = None) -> dict[str, Any]:
    loop = Loop()
    found: list[dict[str, Any]] = []

    def done(result: dict[str, Any]) -> None:
        found.append(result)
        loop.stop()

    def begin() -> None:
        stats.Sample(loop, groups, done)
        if spoil is not None:
            shutil.rmtree(spoil)

    loop.call_later(0, begin)
    loop.run()
    loop.close()
    return found[0]


def test_a_container_is_what_its_cgroup_counts(tmp_path: Path) -> None:
    assert stats.container(make_group(tmp_path, "c1", GROUP).path) == {
        "cpu": {"usage_us": 300, "user_us": 200, "system_us": 100, "throttled_us": 50},
        "memory": {
            "used_bytes": 5000,
            "working_set_bytes": 3500,
            "peak_bytes": 9000,
            "limit_bytes": None,
            "oom_kill_count": 1,
        },
        "pid_count": 4,
        "pid_limit": 100,
        "block": {"read_bytes": 101, "written_bytes": 202, "read_count": 4, "write_count": 6},
    }


def test_what_the_kernel_does_not_count_is_left_open(tmp_path: Path) -> None:
    found = stats.container(make_group(tmp_path, "c1", {"cpu.stat": "usage_usec 7\n"}).path)
    assert found["cpu"]["usage_us"] == 7
    assert found["memory"] == {
        "used_bytes": 0,
        "working_set_bytes": 0,
        "peak_bytes": None,
        "limit_bytes": None,
        "oom_kill_count": 0,
    }
    assert (found["pid_count"], found["pid_limit"], found["block"]) == (0, None, None)


def test_disks_are_counted_once_and_in_bytes() -> None:
    lines = [
        b"   7       0 loop0 9 9 9 9 9 9 9 9 0 9 9",
        b"   8       0 sda 10 0 20 5 30 0 40 5 0 9 9 0 0 0 0",
        b"   8       1 sda1 10 0 20 5 30 0 40 5 0 9 9 0 0 0 0",
        b" 259       0 nvme0n1 1 0 2 5 3 0 4 5 0 9 9",
        b" 259       1 nvme0n1p1 1 0 2 5 3 0 4 5 0 9 9",
        b"  65       0 sdaa 1 0 1 0 1 0 1 0 0 0 0",
    ]
    expected = {"read_bytes": 23 * 512, "written_bytes": 45 * 512, "read_count": 12, "write_count": 34}
    assert stats.disks(lines) == expected


def test_interfaces_are_told_but_for_the_loopback() -> None:
    lines = [b"Inter-| Receive", b" face |bytes", b"    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0"]
    lines.append(b"  eth0:100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0")
    assert stats.interfaces(lines) == [
        {
            "name": "eth0",
            "received_bytes": 100,
            "received_packets": 2,
            "received_errors": 3,
            "received_dropped": 4,
            "sent_bytes": 500,
            "sent_packets": 6,
            "sent_errors": 7,
            "sent_dropped": 8,
        }
    ]


def test_the_node_reads_what_a_guest_tells_of_this_machine(tmp_path: Path) -> None:
    groups = {f"c{n}": make_group(tmp_path, f"c{n}", GROUP) for n in range(20)}
    result = sampled(groups)
    told = reader.guest(result)
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert told.mem_total_bytes == int(meminfo["MemTotal"].split()[0]) * 1024
    assert 0 < told.mem_available_bytes <= told.mem_total_bytes
    assert told.cpu.usage_us == told.cpu.user_us + told.cpu.system_us > 0
    assert told.pid_count > 0
    assert [entry.container_id for entry in reader.containers(result)] == list(groups)


def test_containers_that_go_away_meanwhile_are_left_out(tmp_path: Path) -> None:
    groups = {f"c{n}": make_group(tmp_path, f"c{n}", GROUP) for n in range(20)}
    found = sampled(groups, spoil=tmp_path)
    assert 0 < len(found["containers"]) < 20


def test_every_group_of_this_machine_can_be_read() -> None:
    """Whatever controllers it has: what a real kernel writes must not be too much for the reader."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    groups = [path for root in roots for path in root.iterdir() if path.is_dir()]
    if not groups:
        pytest.skip("this host has no cgroup v2 with groups in it")
    assert stats.container(str(groups[0]))["cpu"]["usage_us"] >= 0
