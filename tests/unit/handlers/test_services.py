"""The node as it reports itself."""

from __future__ import annotations

from pathlib import Path

import vcnode
from tests.unit.handlers.fakes import NOW, World, pod_status
from vcnode.handlers.services import memory_mib
from vcnode.models.pod import PodState


def test_ping_tells_who_answers() -> None:
    ping = World(node_name="host-7").node.ping()
    assert (ping.node, ping.epoch, ping.version, ping.time) == ("host-7", 3, vcnode.__version__, NOW)


def test_info_counts_pods_and_running_ones() -> None:
    world = World()
    world.pods.pods = [pod_status("a"), pod_status("b", state=PodState.RUNNING)]
    info = world.node.info()
    assert (info.pod_count, info.running_pod_count, info.state) == (2, 1, "ready")
    assert info.mem_total_mib >= info.mem_available_mib > 0
    assert info.cpu_count >= 1


def test_memory_is_read_in_mib(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4194304 kB\nMemAvailable:   1048576 kB\nHugePages_Total: 0\n")
    assert memory_mib(meminfo) == (4096, 1024)


def test_unknown_memory_is_zero(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4194304 kB\n")
    assert memory_mib(meminfo) == (4096, 0)
