"""What the QEMU driver finds on the host and frees, without any memory of having made it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import guests
from vcnode.aio import Tasks
from vcnode.drivers.audit import Held
from vcnode.drivers.hypervisor.qemu import Guest, QemuHypervisor
from vcnode.drivers.hypervisor.qemu.cgroup import Cgroups
from vcnode.drivers.hypervisor.qemu.process import named
from vcnode.drivers.hypervisor.qemu.templates import TemplateStore
from vcnode.drivers.storage.local import LocalStorage
from vcnode.errors import HypervisorError
from vcnode.models.vm import VmSpec
from vcnode.settings import QemuSettings

pytestmark = pytest.mark.vm

LIMIT_S = 45.0
MARK = f"vm-{os.getpid():x}q"
"""Of this run of the tests alone."""


def driver(guest_image: Path, state_dir: Path, tasks: Tasks) -> QemuHypervisor:
    guest = Guest(kernel=guest_image / "vmlinux", initrd=guest_image / "initrd")
    return QemuHypervisor(QemuSettings(accel="tcg"), guest, state_dir=state_dir, tasks=tasks)


async def test_a_vm_that_nobody_knows_is_found_by_its_name_and_freed(
    guest_image: Path, short_dir: Path
) -> None:
    """A VM that was to become a template, and whose node agent died."""
    vm_id = f"{MARK}1"
    async with Tasks() as first_life:
        node = driver(guest_image, short_dir, first_life)
        await node.open()
        storage = LocalStorage(short_dir, short_dir / "run", ())
        directory = await storage.make_vm_dir(vm_id)
        spec: VmSpec = guests.make_spec(short_dir).model_copy(
            update={
                "vm_id": vm_id,
                "directory": str(directory),
                "shared_dir": str(directory / "shared"),
                "template_key": "k" * 32,
            }
        )
        vm = await node.launch(spec, timeout_s=LIMIT_S)
        await vm.close()
        await node.close()

    async with Tasks() as second_life:
        node = driver(guest_image, short_dir, second_life)
        found = [*await node.held(MARK), *await storage.held(MARK)]
        group = Cgroups.find().of(vm_id)
        draft = short_dir / "templates" / f".{'k' * 32}.{vm_id}"
        assert found == [
            Held("process", str(vm.record.pid), vm_id),
            *([Held("cgroup", str(group.path), vm_id)] if group.path else []),
            Held("template", str(draft), vm_id),
            Held("mount", str(directory / "shared"), vm_id),
            Held("socket", str(directory / "agent.sock"), vm_id),
            Held("socket", str(directory / "qmp.sock"), vm_id),
            Held("directory", str(directory), vm_id),
        ]
        assert await node.held(f"{MARK}2") == []
        for held in found:
            owner = node if held.kind in ("process", "cgroup", "template") else storage
            await owner.free(held, timeout_s=LIMIT_S)
            await owner.free(held, timeout_s=LIMIT_S)
        assert named(MARK) == []
        assert [*await node.held(MARK), *await storage.held(MARK)] == []
        assert not directory.exists()
        assert not draft.exists()
        with pytest.raises(HypervisorError, match="no VM"):
            await node.free(Held("template", "k", None), timeout_s=1)
        await node.close()


async def test_only_the_very_vm_is_ended(guest_image: Path, short_dir: Path) -> None:
    """Its id may begin another one's."""
    async with Tasks() as tasks:
        node = driver(guest_image, short_dir, tasks)
        await node.open()
        spec = guests.make_spec(short_dir).model_copy(update={"vm_id": f"{MARK}34"})
        vm = await node.launch(spec, timeout_s=LIMIT_S)
        try:
            await node.free(Held("process", str(vm.record.pid), f"{MARK}3"), timeout_s=LIMIT_S)
            assert [(found.pid, found.vm_id) for found in named(MARK)] == [(vm.record.pid, f"{MARK}34")]
        finally:
            await vm.stop(grace_s=0)
            await vm.close()
            await node.close()


def test_a_template_that_was_all_but_published_is_swept(short_dir: Path) -> None:
    """Killed between the manifest and the rename."""
    store = TemplateStore(short_dir)
    draft = store.draft("key", "vm-1")
    (draft.directory / "manifest.json").write_text("{}")
    assert store.names() == []
    store.sweep()
    assert list(short_dir.iterdir()) == []
