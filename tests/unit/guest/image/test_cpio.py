from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from vcnode.guest.image.cpio import CharDevice, Directory, File, Hardlink, Symlink, Tree, pack
from vcnode.guest.image.errors import GuestImageError


def _tree() -> Tree:
    tree = Tree()
    tree.add("/init", File(b"#!/bin/sh\n", 0o755))
    tree.add("/usr/bin/busybox", File(b"busybox", 0o755))
    tree.add("/sbin/reboot", Hardlink("/usr/bin/busybox"))
    tree.add("/usr/bin/ls", Hardlink("/usr/bin/busybox"))
    tree.add("/bin", Symlink("usr/bin"))
    tree.add("/tmp", Directory(0o1777))
    tree.add("/dev/console", CharDevice(5, 1))
    return tree


def _fields(archive: bytes) -> list[tuple[str, list[int]]]:
    """Name and header fields of each member, read independently of the writer."""
    found, position = [], 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        name = archive[position + 110 : position + 110 + fields[11] - 1].decode()
        found.append((name, fields))
        position += (110 + fields[11] + 3) // 4 * 4 + (fields[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert position == len(archive)
            return found


@pytest.mark.root
def test_busybox_unpacks_the_archive_as_it_was_described(tmp_path: Path) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("busybox is not installed")
    subprocess.run(
        ["busybox", "cpio", "-idm"], input=pack(_tree()), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "init").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((tmp_path / "init").stat().st_mode) == 0o755
    assert os.readlink(tmp_path / "bin") == "usr/bin"
    assert (tmp_path / "usr/bin/ls").read_bytes() == b"busybox"
    assert (tmp_path / "sbin/reboot").samefile(tmp_path / "usr/bin/busybox")
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777
    console = (tmp_path / "dev/console").stat()
    assert stat.S_ISCHR(console.st_mode)
    assert console.st_rdev == os.makedev(5, 1)


def test_same_tree_in_another_order_gives_the_same_bytes() -> None:
    backwards = Tree()
    for path, entry in reversed(list(_tree().entries().items())):
        backwards.add(path, entry)
    assert pack(backwards) == pack(_tree())


def test_owner_is_root_and_times_are_zero() -> None:
    for _, (_, _, uid, gid, _, mtime, *_rest) in _fields(pack(_tree())):
        assert (uid, gid, mtime) == (0, 0, 0)


def test_links_share_an_inode_and_only_the_first_has_the_content() -> None:
    members = dict(_fields(pack(_tree())))
    group = [members["usr/bin/busybox"], members["sbin/reboot"], members["usr/bin/ls"]]
    assert len({fields[0] for fields in group}) == 1
    assert [fields[4] for fields in group] == [3, 3, 3]
    assert [fields[6] for fields in group] == [len(b"busybox"), 0, 0]


def test_parents_come_before_what_is_in_them() -> None:
    seen = {""}
    for name, _ in _fields(pack(_tree())):
        assert name.rpartition("/")[0] in seen
        seen.add(name)


def test_an_empty_tree_is_an_archive() -> None:
    assert [name for name, _ in _fields(pack(Tree()))] == ["TRAILER!!!"]


@pytest.mark.parametrize("path", ["", "/", "relative", "/a//b", "/a/../b", "/a/./b", "/a/", "/a\0b"])
def test_a_path_that_is_not_in_normal_form_is_refused(path: str) -> None:
    with pytest.raises(GuestImageError):
        Tree().add(path, Directory())


def test_a_path_through_a_file_is_refused() -> None:
    tree = Tree()
    tree.add("/bin", Symlink("usr/bin"))
    with pytest.raises(GuestImageError, match="no directory"):
        tree.add("/bin/sh", File(b""))


def test_two_things_at_one_path_are_refused_and_the_same_twice_is_fine() -> None:
    tree = Tree()
    tree.add("/a", File(b"1"))
    tree.add("/a", File(b"1"))
    with pytest.raises(GuestImageError, match="/a"):
        tree.add("/a", File(b"2"))


@pytest.mark.parametrize("target", ["/nowhere", "/tmp"])
def test_a_hard_link_to_what_is_no_file_is_refused(target: str) -> None:
    tree = _tree()
    tree.add("/link", Hardlink(target))
    with pytest.raises(GuestImageError, match="/link"):
        pack(tree)
