from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.unit.guest.image.archives import Archive, debian, package
from vcnode.guest.image import packages
from vcnode.guest.image.errors import GuestImageError, IndexOutdatedError

STANZAS = """\
Package: libc6
Source: glibc
Version: 2:2.36-9+deb12u14
Architecture: amd64
Depends: libgcc-s1, libcrypt1 (>= 1:4.4.10-10~) | libcrypt2:any
Pre-Depends: first (>= 1)
Size: 2759320
SHA256: ba4f88
Description: GNU C Library
 SHA256: not a field, it is indented

Package: local
Version: 1
Architecture: amd64
Status: install ok installed

"""


def _nothing(done: int, total: int) -> None:
    """Reports to nobody."""


def _names(found: tuple[packages.Package, ...]) -> set[str]:
    return {package.name for package in found}


def test_stanza_becomes_a_package() -> None:
    found = packages.parse_stanzas(STANZAS)["libc6"]
    assert (found.version, found.architecture, found.sha256) == ("2:2.36-9+deb12u14", "amd64", "ba4f88")
    assert found.size_bytes == 2759320
    assert found.depends == (("first",), ("libgcc-s1",), ("libcrypt1", "libcrypt2"))
    assert found.file_name == "libc6_2%3a2.36-9+deb12u14_amd64.deb"


def test_a_package_that_no_archive_offers_is_left_out() -> None:
    assert "local" not in packages.parse_stanzas(STANZAS)


def test_no_output_is_no_packages() -> None:
    assert packages.parse_stanzas("") == {}


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("", ()),
        ("a", (("a",),)),
        ("a(>=1),b", (("a",), ("b",))),
        ("a [amd64] | b <!nocheck>", (("a", "b"),)),
    ],
)
def test_dependency_fields(field: str, names: tuple[tuple[str, ...], ...]) -> None:
    assert packages.parse_depends(field) == names


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("dlstatus:2:47.3395:Retrieving file 2 of 2\n", 0.473395),
        ("dlstatus:1:100.0000:x:y", 1.0),
        ("dlstatus:1:107.2:x", 1.0),
        ("dlstatus:1:nonsense:x", None),
        ("pmstatus:1:50:x", None),
        ("", None),
    ],
)
def test_apt_status_lines(line: str, share: float | None) -> None:
    assert packages.parse_status(line) == pytest.approx(share)


def test_debian_selection_has_what_is_needed_and_no_more() -> None:
    selection = packages.select(Archive(debian()))
    assert _names(selection.kernel) == {"linux-image-6.1.0-1-amd64"}
    assert _names(selection.python) == {
        "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib",
        "libc6", "libexpat1", "libffi8", "zlib1g",
    }  # fmt: skip
    assert selection.busybox.name == "busybox-static"


def test_the_kernel_is_for_the_hosts_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [*debian(), package("linux-image-arm64", "linux-image-6.1.0-1-arm64")]
    both.append(package("linux-image-6.1.0-1-arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert _names(packages.select(Archive(both)).kernel) == {"linux-image-6.1.0-1-arm64"}
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(GuestImageError, match="riscv64"):
        packages.select(Archive(both))


def test_ubuntu_selection_has_the_modules_package() -> None:
    ubuntu = [found for found in debian() if not found.name.startswith("linux-image")]
    ubuntu += [
        package("linux-image-virtual", "linux-image-6.8.0-1-generic"),
        package("linux-image-6.8.0-1-generic", "kmod", "linux-modules-6.8.0-1-generic"),
        package("linux-modules-6.8.0-1-generic"),
    ]
    selection = packages.select(Archive(ubuntu))
    assert [found.name for found in selection.kernel] == [
        "linux-image-6.8.0-1-generic",
        "linux-modules-6.8.0-1-generic",
    ]


def test_packages_are_listed_by_name() -> None:
    names = [found.name for found in packages.select(Archive(debian())).all()]
    assert names == sorted(names)


@pytest.mark.parametrize(
    "gone",
    [
        "linux-image-amd64",
        "linux-image-6.1.0-1-amd64",
        "python3-minimal",
        "libpython3.11-stdlib",
        "libffi8",
        "busybox-static",
    ],
)
def test_a_package_that_apt_does_not_know_says_to_update(gone: str) -> None:
    with pytest.raises(IndexOutdatedError, match="apt-get update"):
        packages.select(Archive([found for found in debian() if found.name != gone]))


def test_a_kernel_package_without_a_kernel_is_an_error() -> None:
    odd = [
        package("linux-image-amd64", "something-else") if p.name == "linux-image-amd64" else p
        for p in debian()
    ]
    with pytest.raises(GuestImageError, match="linux-image-amd64"):
        packages.select(Archive(odd))


def test_fetch_downloads_only_what_the_cache_lacks(tmp_path: Path) -> None:
    contents = {"a": b"aaa", "b": b"bb"}
    wanted = [package(name, content=content) for name, content in contents.items()]
    (tmp_path / wanted[0].file_name).write_bytes(b"aaa")
    archive, told = Archive(wanted, contents), list[tuple[int, int]]()
    files = packages.fetch(archive, wanted, tmp_path, offline=False, report=lambda *now: told.append(now))
    assert archive.downloaded == ["b"]
    assert {name: path.read_bytes() for name, path in files.items()} == contents
    assert told[0] == (3, 5)
    assert told[-1] == (5, 5)
    assert told == sorted(told)


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    wanted = package("a", content=b"aaa")
    (tmp_path / wanted.file_name).write_bytes(b"aab")
    files = packages.fetch(
        Archive([wanted], {"a": b"aaa"}), [wanted], tmp_path, offline=False, report=_nothing
    )
    assert files["a"].read_bytes() == b"aaa"


def test_a_download_that_is_not_what_the_index_says_is_refused(tmp_path: Path) -> None:
    wanted = package("a", content=b"aaa")
    with pytest.raises(GuestImageError, match="differs"):
        packages.fetch(Archive([wanted], {"a": b"evil"}), [wanted], tmp_path, offline=False, report=_nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    archive = Archive([wanted := package("a", content=b"aaa")])
    archive.fail_download = True
    with pytest.raises(GuestImageError):
        packages.fetch(archive, [wanted], tmp_path, offline=False, report=_nothing)
    assert list(tmp_path.iterdir()) == []


def test_offline_uses_the_cache_and_names_what_it_lacks(tmp_path: Path) -> None:
    there, absent = package("there", content=b"1"), package("absent", content=b"2")
    (tmp_path / there.file_name).write_bytes(b"1")
    archive = Archive([there, absent], {"there": b"1", "absent": b"2"})
    assert packages.fetch(archive, [there], tmp_path, offline=True, report=_nothing).keys() == {"there"}
    with pytest.raises(GuestImageError, match=r": absent\."):
        packages.fetch(archive, [there, absent], tmp_path, offline=True, report=_nothing)
    assert archive.downloaded == []


def test_prune_keeps_what_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "partial-abc").mkdir()
    (tmp_path / "partial-abc/half.deb").touch()
    kept, old = package("a", version="2"), package("a", version="1")
    for name in (kept.file_name, old.file_name, ".lock"):
        (tmp_path / name).touch()
    packages.prune(tmp_path, [kept])
    assert {path.name for path in tmp_path.iterdir()} == {kept.file_name, ".lock"}


def test_a_host_without_apt_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestImageError, match="Debian or Ubuntu"):
        packages.Apt(tmp_path).lookup(["libc6"])
    with pytest.raises(GuestImageError, match="Debian or Ubuntu"):
        packages.Apt(tmp_path).download([package("a")], tmp_path, lambda share: None)


def _fake_program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_apt_failure_is_told_by_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_program(tmp_path, "apt-get", 'echo "W: noise" >&2; echo "E: 404  Not Found" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(IndexOutdatedError, match=r"404  Not Found.*apt-get update"):
        packages.Apt(tmp_path).download([package("a")], tmp_path, lambda share: None)


def test_apt_download_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "for word; do case $word in APT::Status-Fd=*) fd=${word#*=};; esac; done\n"
    script += "printf 'dlstatus:1:25.0:x\\ndlstatus:1:100.0:x\\n' >/proc/self/fd/$fd"
    _fake_program(tmp_path, "apt-get", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    shares: list[float] = []
    packages.Apt(tmp_path).download([package("a")], tmp_path, shares.append)
    assert shares == [0.25, 1.0]


def test_refresh_needs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_program(tmp_path, "apt-get", "exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert packages.Apt(tmp_path).refresh() is False
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(GuestImageError, match="apt-get update"):
        packages.Apt(tmp_path).refresh()
