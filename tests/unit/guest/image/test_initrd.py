from __future__ import annotations

import json
import os
import shutil

import pytest

from vcnode.guest.image import initrd
from vcnode.guest.image.cpio import File, Hardlink, Symlink, Tree
from vcnode.guest.image.errors import GuestImageError
from vcnode.guest.image.modules import Module


def _content(tree: Tree, path: str) -> bytes:
    entry = tree.entries()[path]
    assert isinstance(entry, File)
    return entry.content


def test_skeleton_has_what_the_kernel_and_the_agent_expect() -> None:
    entries = initrd.skeleton().entries()
    assert {"/dev/console", "/proc", "/sys", "/run", "/tmp", "/etc/passwd"} <= entries.keys()
    assert entries["/lib64"] == Symlink("usr/lib64")
    assert "/dev/null" not in entries  # by which the agent tells that devtmpfs is not mounted yet


def test_init_is_a_script_that_the_kernel_can_start() -> None:
    tree = initrd.skeleton()
    initrd.add_init(tree, binary="/usr/bin/python3.12", stdlib="/usr/lib/python3.12")
    entry = tree.entries()["/init"]
    assert isinstance(entry, File)
    assert entry.mode & 0o111
    first, *rest = entry.content.decode().splitlines()
    assert first == "#!/usr/bin/python3.12 -ISB"
    compile("\n".join(rest), "/init", "exec")


def test_modules_are_listed_in_load_order() -> None:
    tree = initrd.skeleton()
    initrd.add_modules(tree, [Module("b", b"B", ()), Module("a", b"A", ("b",))])
    assert _content(tree, "/etc/vcnode/modules") == b"b.ko\na.ko\n"
    assert _content(tree, "/usr/lib/modules/a.ko") == b"A"


def test_modules_that_are_wanted_later_have_lists_of_their_own() -> None:
    tree = initrd.skeleton()
    shared, own = Module("crc32c_generic", b"", ()), Module("jbd2", b"", ("crc32c_generic",))
    initrd.add_modules(tree, [shared, own, Module("ext4", b"", ("jbd2", "crc32c_generic"))])
    assert _content(tree, "/etc/vcnode/modules") == b"crc32c_generic.ko\n"
    assert _content(tree, "/etc/vcnode/modules-ext4") == b"jbd2.ko\next4.ko\n"


def test_description_is_json() -> None:
    tree = initrd.skeleton()
    initrd.add_description(tree, agent_version="1.2", kernel="6.1")
    assert json.loads(_content(tree, "/etc/vcnode/image.json")) == {"agent_version": "1.2", "kernel": "6.1"}


def test_applets_are_names_of_busybox_unless_taken() -> None:
    tree = initrd.skeleton()
    tree.add("/usr/bin/python3", File(b"real"))
    initrd.add_busybox(tree, b"binary", ["busybox", "python3", "sh"])
    entries = tree.entries()
    assert entries["/usr/bin/sh"] == Hardlink("/usr/bin/busybox")
    assert entries["/usr/bin/python3"] == File(b"real")
    assert entries["/usr/bin/busybox"] == File(b"binary", 0o755)


def test_busybox_is_asked_for_its_applets() -> None:
    path = shutil.which("busybox")
    if path is None:
        pytest.skip("busybox is not installed")
    with open(os.path.realpath(path), "rb") as file:
        applets = initrd.busybox_applets(file.read())
    assert {"sh", "mount", "true"} <= set(applets)
    assert applets == sorted(applets)


@pytest.mark.parametrize(
    "program", [b"no program", b"#!/bin/sh\nexit 1\n", b"#!/bin/sh\n", b"#!/bin/sh\necho ../evil\n"]
)
def test_a_busybox_that_is_none_is_an_error(program: bytes) -> None:
    with pytest.raises(GuestImageError, match="busybox"):
        initrd.busybox_applets(program)
