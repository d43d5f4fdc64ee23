"""What every `Storage` promises: the same tests on the mock and on the real one, so that no mock lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcnode.drivers.base import Storage
from vcnode.drivers.storage.local import LocalStorage
from vcnode.drivers.storage.mock import MockStorage
from vcnode.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, StorageError

VM, OTHER = "vm-0123456789ab", "vm-ba9876543210"


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    path = tmp_path / "roots"
    (path / "app").mkdir(parents=True)
    (path / "app" / "file").write_text("content")
    (path / "other").mkdir()
    return path


@pytest.fixture(params=["mock", pytest.param("local", marks=pytest.mark.root)])
async def storage(request, tmp_path: Path, roots: Path):
    made: LocalStorage | MockStorage
    if request.param == "mock":
        made = MockStorage([roots], run_dir=tmp_path / "run")
    else:
        made = LocalStorage(tmp_path / "state", tmp_path / "run", [roots])
    await made.open()
    yield made
    for vm_id in await made.vm_ids():
        await made.remove_vm_dir(vm_id)


def test_it_is_a_storage(storage):
    _: Storage = storage


async def test_vm_dirs_are_listed_until_they_are_removed(storage, tmp_path):
    assert await storage.make_vm_dir(VM) == tmp_path / "run" / "vms" / VM
    await storage.make_vm_dir(OTHER)
    assert list(await storage.vm_ids()) == [VM, OTHER]
    await storage.remove_vm_dir(VM)
    assert list(await storage.vm_ids()) == [OTHER]


async def test_vm_dir_is_made_once(storage):
    await storage.make_vm_dir(VM)
    with pytest.raises(AlreadyExistsError):
        await storage.make_vm_dir(VM)
    assert list(await storage.vm_ids()) == [VM]


async def test_removing_is_idempotent(storage, roots):
    await storage.remove_vm_dir(VM)
    await storage.unshare(VM, "c")
    await storage.remove_image("sha256:" + "0" * 64)
    await storage.make_vm_dir(VM)
    await storage.share(VM, "c", str(roots / "app"))
    await storage.unshare(VM, "c")
    await storage.unshare(VM, "c")
    await storage.remove_vm_dir(VM)
    await storage.remove_vm_dir(VM)


async def test_removing_the_vm_dir_takes_its_shares_along(storage, roots):
    await storage.make_vm_dir(VM)
    await storage.share(VM, "c", str(roots / "app"))
    await storage.remove_vm_dir(VM)
    assert (roots / "app" / "file").read_text() == "content"
    await storage.make_vm_dir(VM)
    await storage.share(VM, "c", str(roots / "app"))


async def test_a_note_goes_with_its_vm(storage):
    with pytest.raises(StorageError):
        await storage.write_note(VM, "early")
    for vm_id in (VM, OTHER):
        await storage.make_vm_dir(vm_id)
    await storage.write_note(VM, "first")
    await storage.write_note(VM, "zwei \u00fc")
    assert await storage.read_notes("vm-") == {VM: "zwei \u00fc"}
    assert await storage.read_notes("vm-b") == {}
    await storage.remove_vm_dir(VM)
    assert await storage.read_notes("vm-") == {}


async def test_share_names_are_unique_within_a_vm(storage, roots):
    for vm_id in (VM, OTHER):
        await storage.make_vm_dir(vm_id)
        await storage.share(vm_id, "c", str(roots / "app"))
    with pytest.raises(AlreadyExistsError):
        await storage.share(VM, "c", str(roots / "other"))
    await storage.unshare(VM, "c")
    await storage.share(VM, "c", str(roots / "other"))


async def test_share_needs_a_vm_dir(storage, roots):
    with pytest.raises(StorageError):
        await storage.share(VM, "c", str(roots / "app"))


@pytest.mark.parametrize("path", ["/etc", "relative", "{roots}/../etc", "{roots}-not"])
async def test_paths_outside_the_roots_are_refused(storage, roots, path):
    path = path.format(roots=roots)
    await storage.make_vm_dir(VM)
    for call in (
        storage.check_rootfs(path),
        storage.share(VM, "c", path),
        storage.build_image(path, timeout_s=10),
    ):
        with pytest.raises(InvalidArgumentError):
            await call


async def test_missing_paths_are_not_found(storage, roots):
    path = str(roots / "missing")
    await storage.make_vm_dir(VM)
    for call in (
        storage.check_rootfs(path),
        storage.share(VM, "c", path),
        storage.build_image(path, timeout_s=10),
    ):
        with pytest.raises(NotFoundError):
            await call


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\0b"])
async def test_odd_names_are_refused(storage, roots, name):
    await storage.make_vm_dir(VM)
    with pytest.raises(InvalidArgumentError):
        await storage.make_vm_dir(name)
    with pytest.raises(InvalidArgumentError):
        await storage.share(VM, name, str(roots / "app"))


async def test_image_is_there_from_its_building_to_its_removal(storage, roots):
    await storage.check_rootfs(str(roots / "app"))
    image = await storage.build_image(str(roots / "app"), timeout_s=30)
    assert image.digest.startswith("sha256:")
    assert len(image.digest) == 71
    assert await storage.image_file(image.digest) == image
    assert await storage.build_image(str(roots / "app"), timeout_s=30) == image
    await storage.remove_image(image.digest)
    with pytest.raises(NotFoundError):
        await storage.image_file(image.digest)


async def test_malformed_digest_is_refused(storage):
    for call in (storage.image_file("sha256:.."), storage.remove_image("sha256:..")):
        with pytest.raises(InvalidArgumentError):
            await call


async def test_writable_disk_is_there_from_its_making_to_its_removal(storage):
    first = await storage.make_layer(VM, 64, timeout_s=30)
    assert first.is_new
    again = await storage.make_layer(VM, 64, timeout_s=30)
    assert (again.path, again.is_new) == (first.path, False)
    held = [h for h in await storage.held(VM[:8]) if h.kind == "disk" and h.vm_id is not None]
    assert [h.vm_id for h in held] == [VM]
    await storage.free(held[0], timeout_s=10)
    assert [h for h in await storage.held(VM[:8]) if h.kind == "disk" and h.vm_id is not None] == []
    assert (await storage.make_layer(VM, 64, timeout_s=30)).is_new
    await storage.remove_layer(VM)
    await storage.remove_layer(VM)
    with pytest.raises(InvalidArgumentError):
        await storage.make_layer("../x", 64, timeout_s=30)
