"""Templates as the pod service uses them: made once, in the background, and dropped when broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.drivers.hypervisor.mock import MockHypervisor
from vcnode.errors import FailedPreconditionError, UnsupportedError
from vcnode.models.pod import PodState, PodStatus
from vcnode.settings import PoolSettings, ShapeSettings, TemplateSettings

Make = Callable[..., World]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[World] = []

    def make(faults: str = "", *, templates: bool = True, **settings: object) -> World:
        made.append(World(tmp_path, faults, templates=templates, **settings))
        return made[-1]

    yield make
    for world in made:
        await world.close()


async def run(world: World, pod_id: str, **fields: object) -> PodStatus:
    status = await world.pods.run(pod(pod_id, **fields), world.call("pod.run"))
    assert status.state is PodState.RUNNING
    return status


async def made(world: World) -> None:
    """Wait until nothing is being made."""
    async with asyncio.timeout(10):
        while making := set(world.pods.templates._making.values()):
            await asyncio.wait(making)


async def test_the_first_pod_boots_and_the_next_are_cloned(make: Make):
    world = await make().start()
    assert "boot" in (await run(world, "p1")).phases_ms
    second = await run(world, "p2")
    assert "restore" in second.phases_ms
    assert "boot" not in second.phases_ms
    assert world.observed.templates_made == 1


async def test_pods_that_come_together_make_one_template(make: Make):
    world = await make().start()
    await asyncio.gather(*(run(world, f"p{n}") for n in range(4)))
    await made(world)
    assert world.plan.log.count("hypervisor.save_template") == 1
    assert len(world.vms.alive) == 4
    assert len(world.host.vm_dirs) == 4


async def test_never_boots_and_teaches_nothing(make: Make):
    world = await make().start()
    assert "boot" in (await run(world, "p1", template="never")).phases_ms
    await made(world)
    assert world.vms.templates == {}


async def test_require_waits_for_the_template(make: Make):
    world = await make().start()
    assert "restore" in (await run(world, "p1", template="require")).phases_ms


async def test_require_fails_where_none_can_be_made(make: Make):
    world = await make("hypervisor.save_template:*=fail").start()
    with pytest.raises(FailedPreconditionError, match="requires a template"):
        await run(world, "p1", template="require")
    assert world.leaks == []


async def test_require_fails_where_the_driver_has_none(make: Make):
    world = await make(templates=False).start()
    with pytest.raises(UnsupportedError, match="requires a template"):
        await run(world, "p1", template="require")


async def test_a_template_serves_the_next_life_of_the_node_agent(make: Make):
    world = await make().start()
    await run(world, "p1")
    await made(world)
    await world.restart()
    await world.pods.recover()
    assert "restore" in (await run(world, "p2", template="require")).phases_ms
    assert world.plan.log.count("hypervisor.save_template") == 0


async def test_another_input_costs_one_slow_start_and_makes_the_template_anew(make: Make, monkeypatch):
    world = await make().start()
    await run(world, "p1")
    await made(world)
    plain = MockHypervisor.template_key
    monkeypatch.setattr(MockHypervisor, "template_key", lambda self, shape: f"new-{plain(self, shape)}")
    assert "boot" in (await run(world, "p2")).phases_ms
    await made(world)
    assert "restore" in (await run(world, "p3")).phases_ms
    assert world.observed.templates_made == 2


@pytest.mark.parametrize("step", ["hypervisor.clone:1", "agent.connect:3"])
async def test_a_broken_template_costs_a_slow_start(make: Make, step: str):
    world = await make(f"{step}=fail").start()
    await run(world, "p1")
    await made(world)
    second = await run(world, "p2")
    assert "boot" in second.phases_ms
    assert world.observed.templates_broken == 1
    await made(world)
    assert "restore" in (await run(world, "p3")).phases_ms


@pytest.mark.parametrize(
    "step", ["storage.make_vm_dir:2", "hypervisor.launch:2", "agent.connect:2", "hypervisor.save_template:1"]
)
async def test_a_template_that_cannot_be_made_leaves_nothing(make: Make, step: str):
    world = await make(f"{step}=fail").start()
    await run(world, "p1")
    await made(world)
    assert world.vms.templates == {}
    assert len(world.vms.alive) == len(world.host.vm_dirs) == 1
    assert world.pods.templates.making == set()


def with_settings(world: World, **changed: object) -> World:
    world.settings = world.settings.model_copy(update=changed)
    return world


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, ["new", "old", "oldest"]),
        ({"max_age_s": 50}, ["new"]),
        ({"max_age_s": 150}, ["new", "old"]),
        ({"max_total_mib": 30}, ["new", "old", "oldest"]),
        ({"max_total_mib": 29}, ["new", "old"]),
        ({"max_total_mib": 10}, ["new"]),
    ],
)
async def test_templates_go_by_age_and_size(make: Make, limits: dict[str, int], left: list[str]):
    world = await with_settings(make(), templates=TemplateSettings(**limits)).start()
    mib = 1024 * 1024
    world.vms.templates = {"new": "vm-1", "old": "vm-2", "oldest": "vm-3"}
    world.vms.template_facts = {"new": (10 * mib, 1), "old": (10 * mib, 100), "oldest": (10 * mib, 200)}
    await world.pods.templates.evict()
    assert list(world.vms.templates) == left


async def test_templates_that_are_to_be_ready_stay(make: Make):
    limits = TemplateSettings(warm=(ShapeSettings(),), max_age_s=1, max_total_mib=0)
    pool = (PoolSettings(mem_size_mib=512),)
    world = await with_settings(make(), templates=limits, pool=pool).start()
    keys = [f"mock-1-{mem}-0" for mem in (256, 512, 1024)]
    world.vms.templates = dict.fromkeys(keys, "vm-1")
    world.vms.template_facts = dict.fromkeys(keys, (1 << 30, 1e6))
    await world.pods.templates.evict()
    assert list(world.vms.templates) == keys[:2]


async def test_listed_shapes_are_made_at_the_start(make: Make):
    shapes = (ShapeSettings(), ShapeSettings(mem_size_mib=512))
    world = make()
    warm = TemplateSettings(warm=shapes)
    world.settings = world.settings.model_copy(update={"templates": warm})
    await world.start()
    world.pods.templates.warm()
    await made(world)
    assert len(world.vms.templates) == 2
    assert "restore" in (await run(world, "p1")).phases_ms
