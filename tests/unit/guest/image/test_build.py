"""What a build does around the work; the work itself is tested in tests/integration/test_guest_image.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.guest.image.archives import Archive, debian
from vcnode.guest import image
from vcnode.guest.image import __main__ as program
from vcnode.guest.image.packages import Package

AGENT = {"vcnode/__init__.py": b'__version__ = "1"', "vcnode/guest/agent/init.py": b"def main(): ..."}


def _build(tmp_path: Path, archive: Archive, *, offline: bool = False) -> image.GuestImage:
    return image.build(
        tmp_path / "guest", cache_dir=tmp_path / "cache", index=archive, agent_sources=AGENT, offline=offline
    )


def _without_kernel() -> Archive:
    return Archive([package for package in debian() if package.name != "linux-image-amd64"])


def _left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


def test_outdated_lists_are_refreshed_once_and_the_build_goes_on(tmp_path: Path) -> None:
    archive = _without_kernel()

    def refresh() -> None:
        archive.packages.update({package.name: package for package in debian()})

    archive.after_refresh = refresh
    with pytest.raises(image.GuestImageError, match="damaged"):  # the packages here are none
        _build(tmp_path, archive)
    assert archive.refreshed == 1
    assert "busybox-static" in archive.downloaded


def test_lists_that_refresh_does_not_mend_are_an_error(tmp_path: Path) -> None:
    archive = _without_kernel()
    archive.after_refresh = lambda: None
    with pytest.raises(image.GuestImageError, match="apt-get update"):
        _build(tmp_path, archive)
    assert archive.refreshed == 1


def test_a_download_that_the_archive_no_longer_has_refreshes_the_lists(tmp_path: Path) -> None:
    archive = Archive(debian())
    archive.fail_download = True

    def refresh() -> None:
        archive.fail_download = False
        archive.packages["zlib1g"] = Package("zlib1g", "2", "amd64", archive.packages["zlib1g"].sha256, 6)

    archive.after_refresh = refresh
    with pytest.raises(image.GuestImageError, match="damaged"):
        _build(tmp_path, archive)
    assert (tmp_path / "cache/zlib1g_2_amd64.deb").exists()


def test_offline_asks_nobody(tmp_path: Path) -> None:
    for archive in (_without_kernel(), Archive(debian())):
        archive.after_refresh = lambda: None
        with pytest.raises(image.GuestImageError):
            _build(tmp_path, archive, offline=True)
        assert archive.refreshed == 0
        assert archive.downloaded == []


def test_a_failed_build_leaves_nothing_but_locks_and_cache(tmp_path: Path) -> None:
    with pytest.raises(image.GuestImageError):
        _build(tmp_path, Archive(debian()))
    assert _left(tmp_path) == {".guest.lock", "cache"}


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(image.GuestImageError, match="cannot be written"):
        _build(tmp_path, Archive(debian()))


def test_the_program_tells_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program.main(["--out", str(tmp_path / "guest"), "--cache", str(tmp_path / "cache")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_lines_say_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = program.Lines()
    for done in range(0, 101, 10):
        lines(image.Progress("download", done, 100, ""))
    lines(image.Progress("write", 0, 1, "x"))
    assert capsys.readouterr().out.splitlines() == [
        "download: 0 % of 0 MB", "download: 25 % of 0 MB", "download: 50 % of 0 MB",
        "download: 75 % of 0 MB", "download: 100 % of 0 MB", "write: x",
    ]  # fmt: skip


def test_the_cache_is_the_users_own_unless_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert image.default_cache_dir() == Path("/var/cache/vcnode")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert image.default_cache_dir() == tmp_path / "vcnode"
