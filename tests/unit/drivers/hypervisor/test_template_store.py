"""Templates on disk and in memory: what is damaged is found, and what is loaded cannot be changed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu.templates import BrokenTemplateError, TemplateStore, state_fd
from vcnode.errors import NotFoundError

MIB = 1024 * 1024
SIZE = 8 * MIB
KEY = "a" * 32
PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE. Source: linux/falloc.h."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TemplateStore]:
    made = TemplateStore(tmp_path / "templates")
    made.sweep()
    yield made
    made.close()


def publish(store: TemplateStore, key: str = KEY) -> Path:
    """A template with data in two places and holes elsewhere; returns its directory."""
    draft = store.draft(key, "vm-1")
    with draft.ram.open("wb") as ram:
        ram.truncate(SIZE)
        ram.write(b"begin")
        ram.seek(5 * MIB + 7)
        ram.write(b"end")
    draft.state.write_bytes(b"state")
    store.publish(key, draft)
    return draft.directory.parent / key


def test_what_is_loaded_is_what_was_published_and_sparse(store: TemplateStore):
    publish(store)
    loaded = store.load(KEY)
    assert loaded.state == b"state"
    assert os.pread(loaded.ram_fd, 5, 0) == b"begin"
    assert os.pread(loaded.ram_fd, 3, 5 * MIB + 7) == b"end"
    assert os.fstat(loaded.ram_fd).st_size == SIZE
    assert os.fstat(loaded.ram_fd).st_blocks * 512 <= 256 * 1024
    assert store.load(KEY) is loaded


def test_loaded_memory_refuses_writes_and_holes(store: TemplateStore):
    publish(store)
    fd = store.load(KEY).ram_fd
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, PUNCH, ctypes.c_long(0), ctypes.c_long(MIB)) == -1
    assert ctypes.get_errno() == errno.EPERM
    assert os.pread(fd, 5, 0) == b"begin"


@pytest.mark.parametrize("name", ["ram", "state", "manifest.json"])
def test_damage_is_found(store: TemplateStore, name: str):
    file = publish(store) / name
    with file.open("r+b") as damaged:
        damaged.seek(1)
        damaged.write(b"\x00")
    with pytest.raises(BrokenTemplateError):
        store.load(KEY)


def test_a_file_that_is_missing_is_damage_too(store: TemplateStore):
    (publish(store) / "state").unlink()
    with pytest.raises(BrokenTemplateError):
        store.load(KEY)


def test_clones_keep_the_memory_of_a_template_that_is_dropped(store: TemplateStore):
    directory = publish(store)
    clone = os.dup(store.load(KEY).ram_fd)
    try:
        store.drop(KEY)
        store.drop(KEY)
        assert not directory.exists()
        assert os.pread(clone, 5, 0) == b"begin"
    finally:
        os.close(clone)
    with pytest.raises(NotFoundError):
        store.load(KEY)


def test_a_sweep_removes_what_was_only_begun(store: TemplateStore, tmp_path: Path):
    kept = publish(store)
    begun = store.draft("b" * 32, "vm-2").directory
    (tmp_path / "templates" / "bare").mkdir()
    store.sweep()
    assert list((tmp_path / "templates").iterdir()) == [kept]
    assert not begun.exists()


def test_those_used_last_come_first(store: TemplateStore):
    old, new = publish(store, "c" * 32), publish(store, "d" * 32)
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    assert store.names() == [new.name, old.name]
    assert store.idle_s(old.name) > store.idle_s(new.name) > 1e9
    store.load(old.name)
    assert store.names() == [old.name, new.name]
    assert store.idle_s(old.name) < 60
    assert store.idle_s("e" * 32) == 0


def test_a_state_is_read_from_its_beginning():
    fd = state_fd(b"state")
    try:
        assert os.read(fd, 100) == b"state"
    finally:
        os.close(fd)
