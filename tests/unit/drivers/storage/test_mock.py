from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from vcnode.drivers.base import PullSource
from vcnode.drivers.faults import OPERATIONS, FaultPlan
from vcnode.drivers.storage.mock import MockStorage, MockWorld
from vcnode.errors import StorageError
from vcnode.models.hypervisor import DiskFormat

ROOTS = [Path("/srv")]
DIGEST = "sha256:" + "0" * 64


async def test_it_touches_nothing_on_disk(tmp_path):
    storage = MockStorage([tmp_path / "roots"], run_dir=tmp_path / "run")
    path = await storage.make_vm_dir("vm-1")
    await storage.share("vm-1", "c", str(tmp_path / "roots" / "anything"))
    await storage.build_image(str(tmp_path / "roots" / "image"), timeout_s=1)
    assert path == tmp_path / "run" / "vms" / "vm-1"
    assert list(tmp_path.iterdir()) == []


async def test_its_world_outlives_it_and_tells_what_it_holds():
    world = MockWorld()
    before = MockStorage(ROOTS, world=world)
    await before.make_vm_dir("vm-1")
    await before.share("vm-1", "c", "/srv/app")
    image = await before.build_image("/srv/app", timeout_s=1)
    assert world.shares == {("vm-1", "c"): "/srv/app"}
    assert not world.empty
    after = MockStorage(ROOTS, world=world)
    await after.remove_vm_dir("vm-1")
    assert world.empty
    assert await after.image_file(image.digest) == image


async def test_images_differ_by_the_name_of_their_source():
    storage = MockStorage(ROOTS)
    a, b = [await storage.build_image(f"/srv/{name}", timeout_s=1) for name in "ab"]
    assert a.digest != b.digest


@pytest.mark.parametrize("operation", sorted(op for op in OPERATIONS if op.startswith("storage.")))
async def test_planned_faults_happen_before_anything_changes(operation):
    storage = MockStorage(ROOTS, faults=FaultPlan.parse(f"{operation}:1=fail"))
    calls = {
        "make_vm_dir": lambda: storage.make_vm_dir("vm-1"),
        "remove_vm_dir": lambda: storage.remove_vm_dir("vm-1"),
        "check_rootfs": lambda: storage.check_rootfs("/srv/a"),
        "open_file": lambda: storage.open_file("/srv/a"),
        "open_disk": lambda: storage.open_disk("/srv/a", DiskFormat.RAW, overlay_id="vm-1", timeout_s=1),
        "share": lambda: storage.share("vm-1", "c", "/srv/a"),
        "open_hook": lambda: storage.open_hook("/srv/a"),
        "listen": lambda: storage.listen("vm-1", "/srv/a.sock"),
        "connect": lambda: storage.connect("/srv/a.sock"),
        "unshare": lambda: storage.unshare("vm-1", "c"),
        "build_image": lambda: storage.build_image("/srv/a", timeout_s=1),
        "pull_image": lambda: storage.pull_image(PullSource("app"), lambda _: None, AsyncMock(), timeout_s=1),
        "image_file": lambda: storage.image_file(DIGEST),
        "remove_image": lambda: storage.remove_image(DIGEST),
        "image_files": lambda: storage.image_files(),
        "blank_image": lambda: storage.blank_image(timeout_s=1),
        "make_layer": lambda: storage.make_layer("vm-1", 64, timeout_s=1),
        "remove_layer": lambda: storage.remove_layer("vm-1"),
        "held": lambda: storage.held("vm-"),
        "write_note": lambda: storage.write_note("vm-1", "note"),
        "read_secret": lambda: storage.read_secret("/secrets/a"),
        "read_notes": lambda: storage.read_notes("vm-"),
    }
    with pytest.raises(StorageError):
        await calls[operation.removeprefix("storage.")]()
    assert storage.world == MockWorld()
