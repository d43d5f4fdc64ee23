"""Disks by their serial."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vcnode.guest.agent import disks
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.loop import Loop


def page(serial: str) -> bytes:
    return b"\x00\x80" + len(serial).to_bytes(2, "big") + serial.encode()


def plug(root: Path, name: str, content: bytes | None) -> None:
    (root / name / "device").mkdir(parents=True)
    if content is not None:
        (root / name / "device/vpd_pg80").write_bytes(content)


def test_the_serial_is_what_the_page_says() -> None:
    assert disks.serial_of(page("d-one")) == "d-one"
    assert disks.serial_of(page("  d-one ")) == "d-one"
    assert disks.serial_of(page("d-one") + b"junk") == "d-one"
    assert disks.serial_of(b"") == ""
    assert disks.serial_of(b"\x00\x80\xff\xffabc") == "abc"


def test_a_disk_is_found_among_others(tmp_path: Path) -> None:
    plug(tmp_path, "loop0", page("d-one"))
    plug(tmp_path, "sda", None)
    plug(tmp_path, "sdb", page("d-other"))
    plug(tmp_path, "sdc", page("d-one"))
    assert disks.find("d-one", str(tmp_path)) == "sdc"
    assert disks.find("d-none", str(tmp_path)) is None


def test_a_disk_that_cannot_be_opened_yet_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug(tmp_path, "sda", page("d-one"))
    assert disks.find_usable("d-one", str(tmp_path), str(tmp_path / "dev")) is None

    def not_yet(*_: object) -> int:
        raise OSError(errno.ENXIO, "No such device or address")

    monkeypatch.setattr(disks.os, "open", not_yet)
    assert disks.find_usable("d-one", str(tmp_path), str(tmp_path)) is None
    monkeypatch.undo()
    assert disks.find_usable("d-one", str(tmp_path), str(tmp_path)) == "sda"


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_a_disk_that_is_there_is_given_at_once(tmp_path: Path, loop: Loop) -> None:
    plug(tmp_path, "sda", page("d-one"))
    found: list[str] = []
    waiting = disks.Disks(loop, str(tmp_path), str(tmp_path), str(tmp_path))
    cancel = waiting.when_there("d-one", found.append, pytest.fail)
    assert (found, cancel) == (["sda"], None)


def test_giving_up_says_so_once(tmp_path: Path, loop: Loop) -> None:
    failures: list[str] = []
    waiting = disks.Disks(loop, str(tmp_path), str(tmp_path))
    cancel = waiting.when_there("d-one", pytest.fail, lambda failure: failures.append(failure.code))
    assert cancel is not None
    assert failures == []
    cancel()
    assert failures == ["not_found"]
    loop.call_later(0, loop.stop)
    loop.run()
    assert failures == ["not_found"]


def test_a_disk_that_stays_is_neither_looked_for_again_nor_taken_out(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted: list[tuple[object, ...]] = []
    monkeypatch.setattr(disks.syscalls, "mount", lambda *args: mounted.append(args))
    monkeypatch.setattr(disks, "unmount_directory", lambda path: mounted.remove(mounted[0]))
    monkeypatch.setattr(disks, "_delete_device", pytest.fail)
    plug(tmp_path, "sdb", page("slot-image"))
    found: list[str] = []
    there = disks.Disks(loop, str(tmp_path / "mounts"), str(tmp_path), str(tmp_path))
    for _ in range(2):
        assert there.when_there("slot-image", found.append, pytest.fail) is None
        there.acquire("slot-image", found[-1])
        assert [args[0] for args in mounted] == ["/dev/sdb"]
        there.release("slot-image")
        assert mounted == []
        (tmp_path / "sdb" / "device" / "vpd_pg80").unlink(missing_ok=True)
    assert found == ["sdb", "sdb"]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EINVAL, Failure), (errno.EUCLEAN, Failure), (errno.EIO, OSError), (errno.ENODEV, OSError)],
)
def test_only_what_is_in_the_file_is_the_callers_fault(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    def mount(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disks.syscalls, "mount", mount)
    there = disks.Disks(loop, str(tmp_path / "mounts"), str(tmp_path), str(tmp_path))
    with pytest.raises(raised, match=os.strerror(number)):
        there.acquire("v-data", "sdb", fs="erofs")
    with pytest.raises(OSError, match=os.strerror(number)):
        there.acquire("d-image", "sdc")  # which the host has made
