"""What ``vcnode top`` shows, from leases, statuses and samples."""

from __future__ import annotations

import asyncio
import io
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from vcnode.cli import top_data, top_view
from vcnode.client import Fleet
from vcnode.client.view import NodeView
from vcnode.errors import FailedPreconditionError, UnsupportedError
from vcnode.models.network import NetworkModel
from vcnode.models.node import Amount, NodeLease
from vcnode.models.pod import (
    AgentType,
    ContainerState,
    ContainerStatus,
    PodSpec,
    PodState,
    PodStatus,
)
from vcnode.models.stats import (
    BlockStats,
    ContainerMemory,
    ContainerStats,
    CpuStats,
    PodStats,
    VmStats,
    idle_interface,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MIB = 1 << 20


def node(name: str = "n1", *, alive: bool = True) -> NodeView:
    amount = Amount(vcpu_count=2, mem_mib=512, pods=2)
    lease = NodeLease(
        node=name,
        identity="i",
        epoch=1,
        version="1",
        state="ready",
        mock=False,
        host="h",
        pid=1,
        lease_s=30,
        renewed_at=NOW,
        capacity=amount,
        allocatable=amount,
        reserved=amount,
        used=amount,
    )
    return NodeView(lease, 0.0, None if alive else 1.0)


def status(pod_id: str, state: PodState = PodState.RUNNING, node_name: str = "n1") -> PodStatus:
    container = ContainerStatus(
        pod_id=pod_id, container_id="c1", state=ContainerState.RUNNING, created_at=NOW
    )
    return PodStatus(
        pod_id=pod_id,
        node=node_name,
        state=state,
        revision=1,
        created_at=NOW,
        hostname=pod_id,
        resources=PodSpec().resources,
        agent_type=AgentType.NATIVE,
        network_model=NetworkModel.NOOP,
        containers=(container,),
    )


def sample(pod_id: str, at_s: float, *, cpu_s: float, pss_mib: int, moved: int = 0) -> PodStats:
    cpu = CpuStats(usage_us=int(cpu_s * 1e6), user_us=0, system_us=0)
    interface = idle_interface("eth0").model_copy(update={"received_bytes": moved})
    block = BlockStats(read_bytes=moved, written_bytes=moved, read_count=0, write_count=0)
    memory = ContainerMemory(used_bytes=9, working_set_bytes=pss_mib, oom_kill_count=0)
    return PodStats(
        pod_id=pod_id,
        node="n1",
        time=NOW + timedelta(seconds=at_s),
        vm=VmStats(
            cpu=cpu,
            thread_count=4,
            resident_bytes=pss_mib * MIB + 1,
            pss_bytes=pss_mib * MIB,
            overhead_bytes=7 * MIB,
            read_bytes=moved,
            written_bytes=0,
            interfaces=(interface,),
        ),
        containers=(ContainerStats(container_id="c1", cpu=cpu, memory=memory, pid_count=3, block=block),),
    )


def key(pod_id: str) -> tuple[str, str]:
    return "n1", pod_id


def three() -> top_data.Snapshot:
    """One that is busy, one that is large, one that does not answer."""
    pods = {key(name): status(name) for name in ("busy", "large", "mute")}
    before = {
        key("busy"): sample("busy", 0, cpu_s=1, pss_mib=20),
        key("large"): sample("large", 0, cpu_s=1, pss_mib=99),
    }
    now = {
        key("busy"): sample("busy", 2, cpu_s=2, pss_mib=20, moved=4000),
        key("large"): sample("large", 2, cpu_s=1.02, pss_mib=99),
    }
    return top_data.rows([node()], pods, now, before)


def test_rates_are_those_between_two_samples() -> None:
    busy, large, mute = three().pods
    assert (busy.cpu_percent, large.cpu_percent, mute.cpu_percent) == (50.0, 1.0, None)
    assert (busy.received_bytes_per_s, busy.sent_bytes_per_s, busy.disk_bytes_per_s) == (2000, 0, 2000)
    assert (busy.memory_bytes, busy.overhead_bytes, mute.memory_bytes) == (20 * MIB, 7 * MIB, None)
    container = three().containers[0]
    assert (container.cpu_percent, container.disk_bytes_per_s, container.pids) == (50.0, 4000, 3)
    assert (three().nodes[0].cpu_percent, three().nodes[0].memory_bytes) == (51.0, 119 * MIB)


def test_a_pod_that_was_started_anew_has_no_rate() -> None:
    before = {key("p1"): sample("p1", 0, cpu_s=9, pss_mib=1, moved=100)}
    now = {key("p1"): sample("p1", 2, cpu_s=1, pss_mib=1)}
    (pod,) = top_data.rows([node()], {key("p1"): status("p1")}, now, before).pods
    assert (pod.cpu_percent, pod.received_bytes_per_s, pod.disk_bytes_per_s) == (None, None, None)


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("cpu", ["busy", "large", "mute"]),
        ("memory", ["large", "busy", "mute"]),
        ("name", ["busy", "large", "mute"]),
    ],
)
def test_what_uses_most_comes_first(sort: top_data.SortKey, order: list[str]) -> None:
    found = three().by(sort)
    assert [pod.pod_id for pod in found.pods] == [row.pod_id for row in found.containers] == order


@pytest.mark.parametrize(
    ("lines", "counts", "shown"),
    [
        (20, (1, 3, 3), (1, 3, 3)),
        (20, (9, 0, 0), (5, 0, 0)),
        (20, (1, 99, 99), (1, 9, 10)),
        (20, (1, 99, 4), (1, 15, 4)),
        (20, (1, 2, 99), (1, 2, 17)),
        (0, (1, 1, 1), (1, 0, 0)),
    ],
)
def test_the_lines_are_shared(lines: int, counts: tuple[int, int, int], shown: tuple[int, int, int]) -> None:
    assert top_view.shares(lines, *counts) == shown


def test_a_screen_fits_into_the_terminal() -> None:
    pods = {key(f"p{n:02}"): status(f"p{n:02}") for n in range(50)}
    snapshot = top_data.rows([node()], pods, {}, {})
    for height in (10, 24, 60):
        out = Console(file=io.StringIO(), width=120, height=height)
        lines = out.render_lines(top_view.screen(snapshot, "cpu", height=height, containers=True))
        assert len(lines) <= height


class FakeFleet:
    """Pods that answer when all who may ask at once have asked."""

    def __init__(self, count: int) -> None:
        self.nodes = {"n1": node(), "lost": node("lost", alive=False)}
        self.pods = {key(f"p{n}"): status(f"p{n}") for n in range(count)}
        self.pods[key("stopped")] = status("stopped", PodState.STOPPED)
        self.pods["lost", "p0"] = status("p0", node_name="lost")
        self.asked: list[tuple[str, bool]] = []
        self.at_once = self.most = 0
        self.client = SimpleNamespace(node=lambda name: SimpleNamespace(pod_stats=self.pod_stats))

    async def pod_stats(self, pod_id: str, *, guest: bool = True, **_: Any) -> PodStats:
        self.asked.append((pod_id, guest))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if pod_id == "p1":
            raise FailedPreconditionError("It has just stopped.")
        if pod_id == "p2" and guest:
            raise UnsupportedError("It has no agent.")
        return sample(pod_id, 0, cpu_s=1, pss_mib=1)


async def test_pods_that_run_are_asked_a_few_at_a_time() -> None:
    fleet = FakeFleet(50)
    gatherer = top_data.Gatherer(cast(Fleet, fleet), node=None, guests=True)
    found = await gatherer.snapshot()
    assert fleet.most == top_data.CONCURRENCY
    assert {pod.pod_id for pod in found.pods if pod.memory_bytes is None} == {"p1", "stopped"}
    assert ("p2", False) in fleet.asked
    assert len(fleet.asked) == 51
    assert {row.node for row in found.nodes} == {"n1"}
    fleet.asked.clear()
    await top_data.Gatherer(cast(Fleet, fleet), node="n1", guests=False).snapshot()
    assert not any(guest for _, guest in fleet.asked)
