"""Rehearsals: spares do once what a start will ask of them, nothing of it is left, and none is in the way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.pods.test_pool import ONE, spare_ids, until_ready
from tests.unit.pods.test_templates import made
from tests.unit.pods.world import World, container, pod
from vcnode.models.vm import GuestProcess
from vcnode.pods import pool as pool_module

STEPS = ["agent.configure", "agent.create_container", "agent.start_container", "agent.delete_container"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be made is tried again at once."""
    monkeypatch.setattr(pool_module, "PAUSES_S", (0.0,))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A node with an image, whose pool is not filled yet."""
    made = await World(tmp_path, templates=True, pool=ONE).start()
    await made.images.import_("app", "/roots/app", made.call())
    yield made
    await made.close()


async def filled(world: World) -> str:
    """Fill the pool; the id of its spare."""
    world.pods.pool.start()
    await until_ready(world, 1)
    [spare] = spare_ids(world)
    return spare


async def test_a_spare_rehearses_and_keeps_nothing_of_it(world: World) -> None:
    spare = await filled(world)
    steps = [entry for entry in world.plan.log if entry in STEPS]
    assert steps == [*STEPS[1:], *STEPS]  # the template has no identity
    assert world.guests.by_vm_id[spare].containers == {}
    assert world.vms.machines[spare].disks == {}
    status = await world.pods.run(pod(containers=[container(image="app")]), world.call("pod.run"))
    assert status.hypervisor is not None
    assert status.hypervisor.vm_id == spare
    config = world.guests.by_vm_id[spare].config
    assert config is not None
    assert config.hostname == "p1"
    assert "container.exited" not in await world.kinds()


async def test_what_becomes_a_template_rehearses_without_an_identity(world: World) -> None:
    await world.pods.run(pod(), world.call("pod.run"))
    await made(world)
    log = world.plan.log
    saved = log.index("hypervisor.save_template")
    assert log[:saved].count("agent.create_container") == 2  # the pod's own, and the rehearsal's
    assert log[:saved].count("agent.configure") == 1


@pytest.mark.parametrize("operation", ["storage.blank_image", "vm.attach_disk", *STEPS, "vm.detach_disk"])
async def test_one_that_goes_wrong_costs_that_vm_and_is_not_tried_again(world: World, operation: str) -> None:
    world.plan.rules = world.plan.parse(f"{operation}:1=fail").rules
    spare = await filled(world)
    # A template, a spare, and the one that went wrong, unless that came before there was one.
    assert world.plan.log.count("hypervisor.launch") == 2 + (operation != "storage.blank_image")
    assert world.observed.templates_broken == 0
    assert world.host.vm_dirs == {spare}
    assert [m.spec.vm_id for m in world.vms.alive] == [spare]


async def test_a_guest_that_never_ends_its_rehearsal_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = GuestProcess(args=("sleep", "infinity"))
    monkeypatch.setattr("vcnode.pods.rehearsal.LIMIT_S", 0.05)
    monkeypatch.setattr("vcnode.pods.rehearsal.GuestProcess", lambda **_: sleeper)
    await filled(world)
