"""Errors, cancellation and limits of the thin layer above; what it does is tested beside."""

import asyncio
import errno
import os
import threading

import pytest

from vcnode.drivers.storage import threads
from vcnode.drivers.storage.local import LocalStorage
from vcnode.errors import InvalidArgumentError, StorageError
from vcnode.models.hypervisor import DiskFormat

pytestmark = pytest.mark.root
VM = "vm-0123456789ab"


@pytest.fixture
async def storage(host):
    made = LocalStorage(host.state, host.run, [host.roots])
    await made.open()
    yield made
    for vm_id in await made.vm_ids():
        await made.remove_vm_dir(vm_id)


class Gate:
    """Holds a blocking call right after it has done its work."""

    def __init__(self, real) -> None:
        self.loop, self.reached, self.go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        self._real = real

    def __call__(self, *args, **kwargs):
        result = self._real(*args, **kwargs)
        self.loop.call_soon_threadsafe(self.reached.set)
        self.go_on.wait(10)
        return result


@pytest.mark.parametrize("call", ["make", "share"])
async def test_cancelled_call_leaves_nothing(storage, host, monkeypatch, call):
    if call == "share":
        await storage.make_vm_dir(VM)
    gate = Gate(getattr(storage._dirs, call))
    monkeypatch.setattr(storage._dirs, call, gate)
    work = storage.make_vm_dir(VM) if call == "make" else storage.share(VM, "c", str(host.roots / "app"))
    task = asyncio.create_task(work)
    await gate.reached.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=0)
    task.cancel()
    gate.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    if call == "share":
        assert os.listdir(host.run / "vms" / VM / "shared") == []
    else:
        assert list(await storage.vm_ids()) == []


async def test_a_file_whose_opening_is_cancelled_is_closed(storage, host):
    before = len(os.listdir("/proc/self/fd"))
    opening = asyncio.create_task(storage.open_file(str(host.roots / "plain")))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (PermissionError(errno.EPERM, "no"), "as root"),
        (OSError(errno.EIO, "disk on fire"), "log says why"),
    ],
)
async def test_what_the_host_says_becomes_a_storage_error(storage, monkeypatch, problem, text):
    def fail(*_):
        raise problem

    monkeypatch.setattr(storage._dirs, "remove", fail)
    with pytest.raises(StorageError, match=text) as caught:
        await storage.remove_vm_dir(VM)
    assert caught.value.__cause__ is problem
    assert "fire" not in caught.value.message
    monkeypatch.undo()


async def test_host_that_does_not_answer_is_given_up(storage, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(threads, "LIMIT_S", 0.05)
    monkeypatch.setattr(storage._roots, "check_directory", lambda _: release.wait(10))
    with pytest.raises(StorageError, match="does not answer"):
        await storage.check_rootfs("/x")
    release.set()


async def test_failing_undo_does_not_hide_the_error_nor_stop_the_rest(caplog):
    ran = []

    def make(undo):
        undo.append(lambda: ran.append("first"))
        undo.append(lambda: 1 / 0)
        undo.append(lambda: ran.append("last"))
        raise KeyError("the error")

    with pytest.raises(KeyError, match="the error"):
        await threads.make_in_thread(make)
    assert ran == ["last", "first"]
    assert "ZeroDivisionError" in caplog.text


async def test_a_disk_image_is_only_read_below_its_overlay(storage, host):
    image = host.roots / "disk.raw"
    image.write_bytes(b"base".ljust(4096))
    disk = await storage.open_disk(str(image), DiskFormat.RAW, overlay_id=VM, timeout_s=30)
    assert (disk.format, disk.base_format, disk.read_only) == (DiskFormat.QCOW2, DiskFormat.RAW, False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(disk.base_fd, b"x")
    os.close(disk.fd)
    os.close(disk.base_fd)
    itself = await storage.open_disk(str(image), DiskFormat.RAW, writable=True, timeout_s=30)
    assert (itself.base_fd, itself.read_only, os.write(itself.fd, b"x")) == (None, False, 1)
    os.close(itself.fd)
    with pytest.raises(InvalidArgumentError, match="no qcow2"):
        await storage.open_disk(str(image), DiskFormat.QCOW2, overlay_id=VM, timeout_s=30)
    await storage.remove_layer(VM)
    assert await storage.held("vm-") == []


async def test_a_private_file_must_be_its_owners_alone(host, tmp_path):
    storage = LocalStorage(host.state, host.run, [host.roots], secret_dirs=[tmp_path])
    key = tmp_path / "key"
    key.write_bytes(b"secret")
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        assert await storage.read_secret(str(key)) == b"secret"
        with pytest.raises(InvalidArgumentError, match="chmod 600"):
            await storage.read_secret(str(key), private=True)
    key.chmod(0o600)
    assert await storage.read_secret(str(key), private=True) == b"secret"
    os.chown(key, 4711, 0)
    with pytest.raises(InvalidArgumentError, match="user 4711"):
        await storage.read_secret(str(key), private=True)
