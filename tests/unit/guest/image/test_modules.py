from __future__ import annotations

import lzma

import pytest

from tests.unit.guest.image import elves
from vcnode.guest.image import modules
from vcnode.guest.image.errors import GuestImageError

BASE = "/usr/lib/modules/6.1/kernel/"


def _names(found: list[modules.Module]) -> list[str]:
    return [module.name for module in found]


def test_each_module_comes_after_what_it_depends_on() -> None:
    files = {
        BASE + "fs/9p.ko": elves.module(depends="9pnet,netfs"),
        BASE + "net/9pnet.ko": elves.module(),
        BASE + "fs/netfs.ko": elves.module(depends="base"),
        BASE + "lib/base.ko": elves.module(),
        BASE + "lib/unrelated.ko": elves.module(),
    }
    assert _names(modules.select(files, frozenset(), ["9p"])) == ["9pnet", "base", "netfs", "9p"]


def test_order_follows_the_wish_and_not_the_files() -> None:
    files = {BASE + f"{name}.ko": elves.module() for name in "abc"}
    backwards = dict(reversed(files.items()))
    assert _names(modules.select(files, frozenset(), ["c", "a"])) == ["c", "a"]
    assert _names(modules.select(backwards, frozenset(), ["c", "a"])) == ["c", "a"]


def test_a_shared_dependency_comes_once() -> None:
    files = {
        BASE + "a.ko": elves.module(depends="base"),
        BASE + "b.ko": elves.module(depends="base"),
        BASE + "base.ko": elves.module(),
    }
    assert _names(modules.select(files, frozenset(), ["a", "b"])) == ["base", "a", "b"]


def test_what_is_built_in_is_not_loaded() -> None:
    files = {BASE + "a.ko": elves.module(depends="virtio_ring")}
    builtin = modules.builtin_modules("kernel/drivers/virtio/virtio-ring.ko\nkernel/b.ko\n")
    assert _names(modules.select(files, builtin, ["a", "b"])) == ["a"]


def test_a_dash_in_a_file_name_is_an_underscore() -> None:
    files = {BASE + "virtio-rng.ko": elves.module(depends="rng-core"), BASE + "rng-core.ko": elves.module()}
    assert _names(modules.select(files, frozenset(), ["virtio_rng"])) == ["rng_core", "virtio_rng"]


def test_a_compressed_module_is_unpacked() -> None:
    plain = elves.module()
    (module,) = modules.select({BASE + "a.ko.xz": lzma.compress(plain)}, frozenset(), ["a"])
    assert module.content == plain


def test_a_missing_dependency_says_who_needs_it() -> None:
    with pytest.raises(GuestImageError, match="no module gone, which a needs"):
        modules.select({BASE + "a.ko": elves.module(depends="gone")}, frozenset(), ["a"])


def test_a_missing_module_is_named() -> None:
    with pytest.raises(GuestImageError, match=r"no module erofs\."):
        modules.select({}, frozenset(), ["erofs"])


def test_a_circle_is_shown() -> None:
    files = {BASE + "a.ko": elves.module(depends="b"), BASE + "b.ko": elves.module(depends="a")}
    with pytest.raises(GuestImageError, match="a -> b -> a"):
        modules.select(files, frozenset(), ["a"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/virtio-rng.ko", "virtio_rng"),
        ("a.ko.zst", "a"),
        ("a.ko.gz", "a"),
        ("a.txt", None),
        ("a.ko.d/readme", None),
    ],
)
def test_module_names(path: str, name: str | None) -> None:
    assert modules.module_name(path) == name
