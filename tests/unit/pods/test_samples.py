"""Samples for metrics: read when somebody scrapes, without waking guests unless the settings say so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.pods import samples
from vcnode.settings import StatsSettings


def count(world: World, operation: str) -> int:
    return world.plan.log.count(operation)


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are never young enough to be given again."""
    monkeypatch.setattr(samples, "FRESH_S", 0.0)


async def test_a_scrape_reads_each_vm_once_and_wakes_nobody(world: World) -> None:
    for pod_id in ("p1", "p2"):
        await world.pods.run(pod(pod_id), world.call())
    await world.pods.create(pod("p3"), world.call())
    await asyncio.gather(*(world.pods.samples.refresh() for _ in range(10)))
    await world.pods.samples.refresh()
    assert count(world, "vm.read_stats") == 2
    assert count(world, "agent.read_stats") == 0
    assert [sample.pod_id for sample in world.pods.samples.latest()] == ["p1", "p2"]
    values = world.pods.samples.latest()[0].values
    assert values["size_bytes"] == 256 << 20
    assert values["cpu_seconds"] == 0
    assert "available_bytes" not in values


@pytest.mark.usefixtures("stale")
async def test_memory_is_looked_at_more_rarely_and_kept_in_between(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.samples.refresh()
    assert world.pods.samples._known["p1"].vm is not None
    assert world.pods.samples._known["p1"].vm.pss_bytes is not None
    await world.pods.samples.refresh()
    assert count(world, "vm.read_stats") == 2
    assert world.pods.samples._known["p1"].vm.pss_bytes is None
    assert world.pods.samples.latest()[0].values["overhead_bytes"] == 0


@pytest.mark.usefixtures("stale")
async def test_pods_that_stop_are_forgotten_and_new_lives_begin_anew(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.samples.refresh()
    first = world.pods.samples._known["p1"]
    await world.pods.stop("p1", 0, world.call())
    await world.pods.samples.refresh()
    assert world.pods.samples.latest() == []
    await world.pods.start("p1", world.call())
    await world.pods.samples.refresh()
    assert world.pods.samples._known["p1"].vm_id != first.vm_id


@pytest.mark.usefixtures("stale")
async def test_guests_are_asked_at_their_own_pace_if_the_settings_say_so(tmp_path: Path) -> None:
    world = await World(tmp_path, stats=StatsSettings(guest_interval_s=3600)).start()
    for pod_id in ("p1", "p2"):
        await world.pods.run(pod(pod_id, (container("c1"), container("c2"))), world.call())
    await world.pods.pause("p2", world.call())
    for _ in range(3):
        await world.pods.samples.refresh()
        assert world.pods.samples._asking is not None
        await world.pods.samples._asking
    assert count(world, "agent.read_stats") == 1
    (one, paused) = world.pods.samples.latest()
    assert list(one.containers) == ["c1", "c2"]
    assert one.containers["c1"]["pids"] == 1
    assert paused.containers == {}
    await world.close()


@pytest.mark.usefixtures("stale")
async def test_a_vm_that_cannot_be_read_does_not_spoil_the_others(tmp_path: Path) -> None:
    world = await World(tmp_path, "vm.read_stats:1=fail").start()
    for pod_id in ("p1", "p2"):
        await world.pods.run(pod(pod_id), world.call())
    await world.pods.samples.refresh()
    assert ["cpu_seconds" in sample.values for sample in world.pods.samples.latest()] == [False, True]
    await world.close()


async def test_a_scrape_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "REFRESH_LIMIT_S", 0.05)
    world = await World(tmp_path, "vm.read_stats:1=hang").start()
    await world.pods.run(pod(), world.call())
    await world.pods.samples.refresh()
    await world.close()


async def test_without_series_nothing_is_read(tmp_path: Path) -> None:
    world = await World(tmp_path, stats=StatsSettings(pod_series=False)).start()
    await world.pods.run(pod(), world.call())
    await world.pods.samples.refresh()
    assert count(world, "vm.read_stats") == 0
    await world.close()
