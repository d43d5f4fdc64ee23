"""Pulls, and which images go when room is short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.pods.world import World, container, pod
from vcnode.errors import InvalidArgumentError, NotFoundError, StorageError
from vcnode.models.commands import ImagePull, RegistryAuth
from vcnode.models.node import ImageStatus
from vcnode.models.pod import Cmd
from vcnode.pods.collecting import MIB, victims
from vcnode.settings import ImageSettings

APP = ImagePull(reference="registry.example/app:1", name="app")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path).start()
    yield world
    await world.close()


async def test_a_pulled_image_tells_its_way_and_says_what_runs(world: World) -> None:
    image = await world.images.pull(APP, world.call("image.pull"))
    assert (image.name, image.reference, image.config.cmd) == ("app", APP.reference, ("sh",))
    assert await world.kinds("image/app") == ["image.pulling", "image.pulling", "image.pulled"]
    # The image has a command, so that the container needs none.
    await world.pods.create(pod(containers=[container(image="app", cmd=Cmd())]), world.call())
    assert world.store.pods["p1"].containers[0].image_config == image.config


async def test_an_image_without_a_command_needs_one_in_the_container(world: World) -> None:
    await world.images.import_("bare", "/roots/bare", world.call())
    with pytest.raises(InvalidArgumentError, match=r"pod\.containers\[0\]\.cmd\.args"):
        await world.pods.create(pod(containers=[container(image="bare", cmd=Cmd())]), world.call())


async def test_the_same_pull_at_once_is_done_once(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.pull_image:1=delay(0.05)").start()
    made = await asyncio.gather(*(world.images.pull(APP, world.call()) for _ in range(5)))
    assert len({image.digest for image in made}) == 1
    assert world.plan.log.count("storage.pull_image") == 1
    assert (await world.kinds("image/app")).count("image.pulled") == 1
    await world.close()


async def test_who_pulls_matters_even_at_the_same_time(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.pull_image:1=delay(0.05)").start()
    other = APP.model_copy(update={"name": "b", "auth": RegistryAuth(username="u", password="p")})
    await asyncio.gather(world.images.pull(APP, world.call()), world.images.pull(other, world.call()))
    assert world.plan.log.count("storage.pull_image") == 2
    await world.close()


async def test_a_pull_goes_on_while_one_of_its_callers_waits(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.pull_image:1=delay(0.1)").start()
    first, second = [asyncio.ensure_future(world.images.pull(APP, world.call())) for _ in range(2)]
    await world.until_event("image.pulling")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).name == "app"
    await world.close()


async def test_a_pull_that_nobody_waits_for_has_ended_when_the_last_is_told(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.pull_image:1=delay(30)").start()
    before = world.tasks.count
    pull = asyncio.ensure_future(world.images.pull(APP, world.call()))
    await world.until_event("image.pulling")
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert world.tasks.count == before
    assert world.images.list().images == ()
    assert (await world.images.pull(APP, world.call())).name == "app"
    await world.close()


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.pull_image:1=fail").start()
    outcomes = await asyncio.gather(
        *(world.images.pull(APP, world.call()) for _ in range(2)), return_exceptions=True
    )
    assert {type(outcome) for outcome in outcomes} == {StorageError}
    assert (await world.images.pull(APP, world.call())).name == "app"
    with pytest.raises(NotFoundError):
        await world.images.pull(ImagePull(reference="missing/app"), world.call())
    await world.close()


# ---- room --------------------------------------------------------------------------------------------


def image(name: str, size_mib: int, age_s: float, used_age_s: float | None = None) -> ImageStatus:
    return ImageStatus(
        name=name,
        digest=f"sha256:{name.split('-')[0]}",
        size_bytes=size_mib * MIB,
        imported_at=NOW - timedelta(seconds=age_s),
        last_used_at=None if used_age_s is None else NOW - timedelta(seconds=used_age_s),
    )


A, B, C = image("a", 40, 300), image("b", 40, 200), image("c", 40, 100)


@pytest.mark.parametrize(
    ("images", "in_use", "high", "low", "age", "gone"),
    [
        ([A, B, C], [], 120, 0, 0, []),
        ([A, B, C], [], 119, 80, 0, ["a"]),
        ([A, B, C], [], 119, 79, 0, ["a", "b"]),
        ([A, B, C], [], 119, 0, 0, ["a", "b", "c"]),
        ([A, B, C], ["a"], 119, 80, 0, ["b"]),
        ([A, B, C], [], 119, 0, 150, ["a", "b"]),
        ([A, B, C], ["a", "b", "c"], 0, 0, 0, []),
        ([image("a", 40, 300, 5), B, C], [], 119, 80, 0, ["b"]),
        # Two names share one file: it counts once, and is gone with the second.
        ([image("a-1", 40, 300), image("a-2", 40, 250), B], [], 79, 40, 0, ["a-1", "a-2"]),
    ],
)
def test_those_that_were_not_used_for_longest_go_first(
    images: list[ImageStatus], in_use: list[str], high: int, low: int, age: float, gone: list[str]
) -> None:
    assert victims(images, in_use, NOW, high_mib=high, low_mib=low, min_age_s=age) == gone


async def test_a_pull_makes_room_and_says_what_went(tmp_path: Path) -> None:
    settings = ImageSettings(gc_high_mib=0, gc_low_mib=0, gc_min_age_s=12)
    world = await World(tmp_path, images=settings).start()
    await world.images.import_("used", "/roots/used", world.call())
    await world.pods.create(pod(containers=[container(image="used")]), world.call())
    await world.images.import_("old", "/roots/old", world.call())
    for _ in range(12):
        world.clock()
    await world.images.pull(APP, world.call())
    assert {i.name for i in world.images.list().images} == {"used", "app"}
    assert await world.kinds("image/old") == ["image.imported", "image.removed"]
    assert len(world.host.images) == 2
    await world.close()


@pytest.mark.parametrize("settled", [True, False])
async def test_a_file_that_gets_no_record_goes_unless_its_record_may_come_yet(
    world: World, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    late: list[Any] = []

    async def refuse(work: Any) -> None:
        late.append(work)
        raise StorageError("The disk has not answered.", settled=settled)

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "write", refuse)
        with pytest.raises(StorageError):
            await world.images.import_("app", "/roots/app", world.call("image.import"))
    assert len(await world.storage.image_files()) == (0 if settled else 1)
    if not settled:
        await world.store.write(late[0])
        await world.images.resolve("app")
