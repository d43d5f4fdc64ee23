from __future__ import annotations

import gzip
import lzma
import struct

import pytest

from tests.unit.guest.image import elves
from vcnode.guest.image import kernel
from vcnode.guest.image.errors import GuestImageError

ELF = elves.pvh_kernel(b"code" * 100)


@pytest.mark.parametrize("setup_sectors", [0, 3, 27])
def test_vmlinux_is_what_was_packed(setup_sectors: int) -> None:
    image = elves.bzimage(lzma.compress(ELF) + b"size", setup_sectors=setup_sectors)
    assert kernel.vmlinux(image) == ELF


def test_an_elf_kernel_stays_as_it_is() -> None:
    assert kernel.vmlinux(ELF) == ELF


def test_payload_ends_where_the_header_says() -> None:
    assert kernel.payload(elves.bzimage(b"payload")) == b"payload"


def test_a_kernel_without_pvh_entry_is_refused() -> None:
    with pytest.raises(GuestImageError, match="PVH"):
        kernel.vmlinux(elves.bzimage(gzip.compress(elves.elf(notes=[(b"Xen", 6, b"linux")]))))


def test_a_payload_that_is_no_elf_is_refused() -> None:
    with pytest.raises(GuestImageError, match="no 64-bit ELF"):
        kernel.vmlinux(elves.bzimage(gzip.compress(b"something else")))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "no bzImage"),
        (b"\0" * 4096, "no bzImage"),
        (elves.bzimage(b"x", version=0x207), "2.07"),
        (elves.bzimage(b""), "cut short"),
        (elves.bzimage(b"payload")[:-8], "cut short"),
    ],
    ids=["empty", "zeros", "old protocol", "no payload", "cut"],
)
def test_what_is_no_whole_bzimage_is_refused(image: bytes, said: str) -> None:
    with pytest.raises(GuestImageError, match=said):
        kernel.vmlinux(image)


IMAGE = b"MZ".ljust(56, b"\0") + b"ARM\x64" + b"code"


def zboot(payload: bytes) -> bytes:
    """An EFI program that unpacks a kernel. Source: Linux, drivers/firmware/efi/libstub/zboot-header.S."""
    header = b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload)) + b"\0" * 8 + b"gzip"
    return header.ljust(64, b"\0") + payload + b"more"


@pytest.mark.parametrize(
    "packaged", [IMAGE, gzip.compress(IMAGE), zboot(gzip.compress(IMAGE))], ids=["plain", "gzip", "EFI"]
)
def test_the_image_of_aarch64_is_found_however_it_is_packed(packaged: bytes):
    assert kernel.bootable(packaged, "aarch64") == IMAGE


@pytest.mark.parametrize(
    "packaged", [b"", IMAGE.replace(b"ARM", b"RAM"), zboot(b"x" * 10)[:70], zboot(b"")], ids=str
)
def test_what_is_no_image_of_aarch64(packaged: bytes):
    with pytest.raises(GuestImageError):
        kernel.bootable(packaged, "aarch64")
