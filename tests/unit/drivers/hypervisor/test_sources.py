"""What a template is known by, and that those on disk outlive the node agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import sources
from vcnode.drivers.hypervisor.qemu.sources import Sources
from vcnode.models.vm import VmShape

SHAPE = VmShape(vcpu_count=1, mem_size_mib=256, netdev_count=1)
BUILD, ACCELERATOR = "QEMU 7.2", "tcg"
LIMIT_S = 10.0


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(b"kernel")
    initrd.write_bytes(b"initrd")
    return kernel, initrd


@pytest.fixture
async def open_sources(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    opened: list[Sources] = []

    async def make(build: str = BUILD, accelerator: str = ACCELERATOR) -> Sources:
        opened.append(Sources(tmp_path / "templates"))
        await opened[-1].open(build, accelerator)
        return opened[-1]

    yield make
    for made in opened:
        made.close()


async def test_the_same_inputs_give_the_same_key_in_every_life(open_sources, files):
    first, second = await open_sources(), await open_sources()
    assert first.key(SHAPE, files) == second.key(SHAPE, files)


@pytest.mark.parametrize("index", [0, 1], ids=["kernel", "initrd"])
async def test_another_guest_image_is_another_template(open_sources, files, index: int):
    found = await open_sources()
    before = found.key(SHAPE, files)
    files[index].write_bytes(b"a newer one")
    assert found.key(SHAPE, files) != before


@pytest.mark.parametrize(
    "change",
    [{"vcpu_count": 2}, {"mem_size_mib": 512}, {"netdev_count": 2}],
    ids=["vcpus", "memory", "devices"],
)
async def test_another_shape_is_another_template(open_sources, files, change: dict[str, int]):
    found = await open_sources()
    assert found.key(SHAPE.model_copy(update=change), files) != found.key(SHAPE, files)


@pytest.mark.parametrize("inputs", [("QEMU 8.2", ACCELERATOR), (BUILD, "kvm")], ids=["QEMU", "accelerator"])
async def test_another_qemu_or_accelerator_is_another_template(open_sources, files, inputs):
    assert (await open_sources(*inputs)).key(SHAPE, files) != (await open_sources()).key(SHAPE, files)


async def test_another_layout_of_the_vm_is_another_template(open_sources, files, monkeypatch):
    found = await open_sources()
    before = found.key(SHAPE, files)
    monkeypatch.setattr(sources, "LAYOUT", ("another",))
    assert found.key(SHAPE, files) != before


def publish(found: Sources, key: str) -> Path:
    draft = found._store.draft(key, "vm-1")
    draft.ram.write_bytes(b"memory" * 1000)
    draft.state.write_bytes(b"state")
    found._store.publish(key, draft)
    return draft.directory.parent / key


async def test_a_template_outlives_the_node_agent(open_sources, files):
    first = await open_sources()
    key = first.key(SHAPE, files)
    publish(first, key)
    first.close()
    second = await open_sources()
    assert await second.load(second.key(SHAPE, files), timeout_s=LIMIT_S)
    assert [info.key for info in await second.list()] == [key]


async def test_a_template_that_was_damaged_meanwhile_is_dropped_and_missed(open_sources, files):
    first = await open_sources()
    key = first.key(SHAPE, files)
    directory = publish(first, key)
    first.close()
    (directory / "ram").write_bytes(b"memorx" * 1000)
    second = await open_sources()
    assert not await second.load(key, timeout_s=LIMIT_S)
    assert not directory.exists()
