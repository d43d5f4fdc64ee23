"""Writable disks: formatted once for a size, copied with their holes, whole or not there."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.storage import layers, qcow2
from vcnode.drivers.storage.layers import LayerStore
from vcnode.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError, StorageError

A, B = "vm-0123456789ab", "vm-0123456789cd"
pytestmark = pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs e2fsprogs")


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    made = LayerStore(tmp_path, reserve_bytes=0)
    made.sweep()
    return made


def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that are run from now on."""
    ran: list[str] = []
    real = layers.tools.run

    async def run(argv, **limits):
        ran.append(argv[0])
        return await real(argv, **limits)

    monkeypatch.setattr(layers.tools, "run", run)
    return ran


async def test_a_size_is_formatted_once_for_all_disks_of_it(store, monkeypatch, tmp_path):
    ran = runs(monkeypatch)
    first, second = await asyncio.gather(*(store.make(name, 64, timeout_s=30) for name in (A, B)))
    assert (first.is_new, second.is_new) == (True, True)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert ran == ["mkfs.ext4"]
    assert not (await store.make(A, 64, timeout_s=30)).is_new
    await store.make("vm-0123456789ef", 128, timeout_s=30)
    assert ran == ["mkfs.ext4"] * 2
    assert [held.name for held in store.held("vm-01234")] == [
        str(tmp_path / "layers" / name) for name in (A, B, "vm-0123456789ef")
    ]
    assert store.held("vm-other") == []


async def test_a_disk_is_sound_sparse_and_for_nobody_else(store):
    made = await store.make(A, 1024, timeout_s=30)
    stat = made.path.stat()
    assert stat.st_size == 1024 * 1024 * 1024
    assert stat.st_blocks * 512 < 2 * 1024 * 1024
    assert stat.st_mode & 0o777 == 0o600
    checked = await asyncio.to_thread(
        subprocess.run, ["e2fsck", "-fn", str(made.path)], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


async def test_what_was_written_stays_until_the_disk_is_removed(store):
    made = await store.make(A, 64, timeout_s=30)
    with made.path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"kept")
    assert (await store.make(A, 64, timeout_s=30)).path.read_bytes()[-4:] == b"kept"
    store.remove(A)
    store.remove(A)
    assert (await store.make(A, 64, timeout_s=30)).path.read_bytes()[-4:] == bytes(4)


async def test_what_a_killed_node_left_incomplete_is_swept_and_does_not_count(store, tmp_path):
    half = tmp_path / "layers" / f".new-{A}"
    half.write_bytes(b"half")
    assert store.held("vm-01234") == []
    store.sweep()
    assert not half.exists()
    assert (await store.make(A, 64, timeout_s=30)).is_new


async def test_without_space_nothing_is_made(tmp_path):
    store = LayerStore(tmp_path, reserve_bytes=1 << 60)
    store.sweep()
    with pytest.raises(ResourceExhaustedError):
        await store.make(A, 64, timeout_s=30)
    assert store.held("vm-") == []


async def test_a_format_that_fails_leaves_nothing_and_is_tried_again(store, monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "mkfs_argv", lambda target: ["false"])
    with pytest.raises(StorageError):
        await store.make(A, 64, timeout_s=30)
    assert list((tmp_path / "layers").iterdir()) == []
    monkeypatch.undo()
    assert (await store.make(A, 64, timeout_s=30)).is_new


async def test_a_missing_mkfs_says_what_to_install(store, monkeypatch):
    monkeypatch.setattr(layers, "mkfs_argv", lambda target: ["no-such-mkfs"])
    with pytest.raises(StorageError, match="e2fsprogs"):
        await store.make(A, 64, timeout_s=30)


async def test_it_does_not_take_for_ever(store, monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "mkfs_argv", lambda target: ["sleep", "60"])
    with pytest.raises(DeadlineExceededError):
        await store.make(A, 64, timeout_s=0.1)
    assert list((tmp_path / "layers").iterdir()) == []


async def test_odd_names_are_refused(store):
    with pytest.raises(InvalidArgumentError):
        await store.make("../x", 64, timeout_s=30)


def test_a_copy_has_the_same_holes_where_blocks_cannot_be_shared(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
        file.seek(8 * 1024 * 1024)
        file.write(b"x" * 5000)
    with source.open("rb") as src, target.open("wb") as dst:
        layers.clone(src.fileno(), dst.fileno())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks


async def test_an_overlay_is_made_once_and_kept(store, tmp_path):
    fd = await store.open_overlay(A, 1_000_001, timeout_s=30)
    os.pwrite(fd, b"kept", 1 << 20)
    os.close(fd)
    fd = await store.open_overlay(A, 1_000_001, timeout_s=30)
    assert os.pread(fd, 4, 1 << 20) == b"kept"
    assert qcow2.size_bytes(os.pread(fd, qcow2.HEADER_BYTES, 0), "o") == 1_000_448  # whole sectors
    os.close(fd)
    assert (tmp_path / "layers" / A).stat().st_mode & 0o777 == 0o600
    store.remove(A)
    assert store.held("vm-") == []


async def test_an_overlay_that_cannot_be_made_leaves_nothing(store, monkeypatch, tmp_path):
    for program, match in (("false", "log says why"), ("no-such-qemu-img", "qemu-utils")):
        monkeypatch.setattr(layers, "QEMU_IMG", program)
        with pytest.raises(StorageError, match=match):
            await store.open_overlay(A, 1 << 20, timeout_s=30)
        assert list((tmp_path / "layers").iterdir()) == []
