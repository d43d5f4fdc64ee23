from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from tests.unit.guest.image import elves
from tests.unit.guest.image.archives import make_deb
from vcnode.guest.image import kernel_packages, modules
from vcnode.guest.image.errors import GuestImageError

RELEASE = "6.1.0-1-amd64"
ELF = elves.pvh_kernel(b"code")


def _files() -> dict[str, bytes | str]:
    base = f"/lib/modules/{RELEASE}"
    files: dict[str, bytes | str] = {
        f"/boot/vmlinuz-{RELEASE}": elves.bzimage(lzma.compress(ELF)),
        f"/boot/config-{RELEASE}": b"unwanted",
        f"{base}/modules.builtin": b"kernel/fs/overlayfs/overlay.ko\n",
        f"{base}/kernel/sound/9p.ko": b"not even read",
        f"{base}/build": "/usr/src/elsewhere",
    }
    for name in {*modules.WANTED, *modules.ON_DEMAND} - {"overlay"}:
        files[f"{base}/kernel/{name}.ko"] = elves.module(depends="9pnet" if name == "9p" else "")
    files[f"{base}/kernel/9pnet.ko.xz"] = lzma.compress(elves.module())
    return files


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    return make_deb(tmp_path, _files())


def test_kernel_and_wanted_modules_are_found(deb: Path) -> None:
    found = kernel_packages.unpack([deb])
    assert found.release == RELEASE
    assert found.vmlinux == ELF
    assert {module.name for module in found.modules} == {*modules.WANTED, *modules.ON_DEMAND, "9pnet"} - {
        "overlay"
    }


def test_packages_without_a_kernel_are_an_error(tmp_path: Path) -> None:
    files = {path: content for path, content in _files().items() if not path.startswith("/boot")}
    with pytest.raises(GuestImageError, match="no bzImage"):
        kernel_packages.unpack([make_deb(tmp_path, files)])
    with pytest.raises(GuestImageError, match="no kernel package"):
        kernel_packages.key([], "builder")


def test_what_was_unpacked_once_is_not_unpacked_again(deb: Path, tmp_path: Path) -> None:
    first = kernel_packages.cached([deb], tmp_path, "key")
    deb.unlink()
    assert kernel_packages.cached([deb], tmp_path, "key") == first


def test_another_key_replaces_the_last_result(deb: Path, tmp_path: Path) -> None:
    kernel_packages.cached([deb], tmp_path, "old")
    kernel_packages.cached([deb], tmp_path, "new")
    assert [path.name for path in tmp_path.glob("kernel-*")] == ["kernel-new"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header", "not an object"])
def test_a_damaged_result_is_made_again(deb: Path, tmp_path: Path, damage: str) -> None:
    first = kernel_packages.cached([deb], tmp_path, "key")
    file = tmp_path / "kernel-key"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-1],
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            "empty": b"",
            "no header": whole[whole.index(b"\n") :],
            "not an object": b"[]\n" + whole,
        }[damage]
    )
    assert kernel_packages.cached([deb], tmp_path, "key") == first
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_leaves_nothing(deb: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel-key").mkdir()
    with pytest.raises(OSError, match="directory"):
        kernel_packages.cached([deb], tmp_path, "key")
    assert [path.name for path in tmp_path.glob("kernel-*")] == ["kernel-key"]


def test_the_key_is_of_packages_and_builder() -> None:
    keys = [
        kernel_packages.key(*given) for given in ((["a"], "b"), (["a"], "c"), (["b"], "b"), (["a", "b"], "b"))
    ]
    assert len(set(keys)) == 4
