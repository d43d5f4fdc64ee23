from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vcnode.guest.image import place
from vcnode.guest.image.errors import GuestImageError


def _directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_new_directory_takes_an_empty_place(tmp_path: Path) -> None:
    place.replace_directory(_directory(tmp_path / "new", "new"), tmp_path / "target")
    assert (tmp_path / "target/file").read_text() == "new"
    assert not (tmp_path / "new").exists()


def test_a_new_directory_changes_places_with_the_old(tmp_path: Path) -> None:
    target = _directory(tmp_path / "target", "old")
    with (target / "file").open() as held:
        place.replace_directory(_directory(tmp_path / "new", "new"), target)
        assert (target / "file").read_text() == "new"
        assert (tmp_path / "new/file").read_text() == "old"
        assert held.read() == "old"


def test_without_exchange_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_exchange", lambda first, second: False)
    target = _directory(tmp_path / "target", "old")
    place.replace_directory(_directory(tmp_path / "new", "new"), target)
    assert (target / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "target"}


def test_a_failed_replacement_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _directory(tmp_path / "target", "old")
    for exchange in (True, False):
        if not exchange:
            monkeypatch.setattr(place, "_exchange", lambda first, second: False)
        with pytest.raises(OSError, match="No such file"):
            place.replace_directory(tmp_path / "absent", target)
        assert (target / "file").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_files_are_readable_for_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        place.write_directory(tmp_path / "image", {"a": b"1"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "image/a").stat().st_mode) == 0o644


def test_sweep_removes_what_killed_builds_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".guest.build-abc", "guest", ".other.build-abc"):
        _directory(tmp_path / name, "")
    place.sweep(tmp_path / "guest")
    assert {path.name for path in tmp_path.iterdir()} == {"guest", ".other.build-abc"}


def test_the_lock_is_waited_for(tmp_path: Path) -> None:
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        with place.exclusive(tmp_path / "lock", waiting.set):
            entered.set()

    thread = threading.Thread(target=second)
    with place.exclusive(tmp_path / "lock", lambda: pytest.fail("nobody holds it")):
        thread.start()
        assert waiting.wait(10)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()


def test_the_lock_of_a_killed_builder_is_free(tmp_path: Path) -> None:
    holder = f"""
import pathlib, sys
from vcnode.guest.image import place
with place.exclusive(pathlib.Path({str(tmp_path / "lock")!r}), lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    with place.exclusive(tmp_path / "lock", lambda: pytest.fail("somebody holds it")):
        pass


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(GuestImageError, match="cannot be written"),
        place.exclusive(tmp_path / "file/lock", lambda: None),
    ):
        pass
