from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.guest.image.archives import make_deb
from vcnode.guest.image import debs
from vcnode.guest.image.errors import GuestImageError


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./lib/x/libc.so.6", "/usr/lib/x/libc.so.6"),
        ("./usr/lib/x", "/usr/lib/x"),
        ("lib64/ld.so", "/usr/lib64/ld.so"),
        ("./bin/busybox", "/usr/bin/busybox"),
        ("./library/x", "/library/x"),
        ("./", "/"),
    ],
)
def test_paths_are_as_with_merged_usr(name: str, path: str) -> None:
    assert debs.normal_path(name) == path


def test_a_path_that_climbs_is_refused() -> None:
    with pytest.raises(GuestImageError, match=r"\.\."):
        debs.normal_path("./usr/../../etc/passwd")


@pytest.mark.parametrize("compression", ["none", "gzip", "xz", "zstd"])
def test_wanted_files_and_links_are_read(tmp_path: Path, compression: str) -> None:
    files: dict[str, bytes | str] = {"/lib/a": b"content", "/lib/b": "a", "/etc/c": b"unwanted"}
    deb = make_deb(tmp_path, files, compression=compression)
    found = dict(debs.members(deb, lambda path: path.startswith("/usr/lib/")))
    assert found == {"/usr/lib/a": b"content", "/usr/lib/b": "a"}


def test_a_reader_may_stop_early(tmp_path: Path) -> None:
    deb = make_deb(tmp_path, {f"/etc/{number:03}": bytes(100_000) for number in range(100)})
    members = debs.members(deb, lambda path: True)
    assert next(members)[0] == "/etc/000"
    members.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", [b"", b"no package at all", b"!<arch>\ndebian-binary   "])
def test_what_is_no_package_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(GuestImageError, match=r"x\.deb"):
        list(debs.members(tmp_path / "x.deb", lambda path: True))


def test_a_package_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    deb = make_deb(tmp_path, {"/etc/a": bytes(range(256)) * 4000}, compression="none")
    whole = deb.read_bytes()
    deb.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GuestImageError, match="damaged"):
        list(debs.members(deb, lambda path: True))


def test_a_host_without_dpkg_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestImageError, match="Debian or Ubuntu"):
        list(debs.members(tmp_path / "x.deb", lambda path: True))
