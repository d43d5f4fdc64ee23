"""Take what QEMU boots quickest out of a packaged kernel. Pure but for the decompression.

On aarch64 that is the ``Image``, which packages hold as it is, in gzip, or in an EFI program that unpacks it.
On x86_64 it is the ELF kernel in the bzImage.

QEMU boots the ELF directly through its PVH entry: the guest then neither copies nor decompresses itself,
which under TCG is more than half of the time to init.

Source: Linux, Documentation/arch/x86/boot.rst (setup header); include/xen/interface/elfnote.h;
Documentation/arch/arm64/booting.rst; drivers/firmware/efi/libstub/zboot-header.S.
"""

from __future__ import annotations

import struct

from vcnode.guest.image import elf
from vcnode.guest.image.compression import decompress
from vcnode.guest.image.errors import GuestImageError

_BOOT_FLAG_AT, _BOOT_FLAG = 0x1FE, 0xAA55
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_SETUP_SECTORS_AT = 0x1F1
_PAYLOAD_AT = 0x248
_SECTOR_BYTES = 512
_XEN_ELFNOTE_PHYS32_ENTRY = 18


_GZIP = b"\x1f\x8b"
_ARM64_AT, _ARM64 = 56, b"ARM\x64"
_ZBOOT_AT, _ZBOOT = 4, b"zimg"


def bootable(image: bytes, machine: str) -> bytes:
    """What QEMU boots on *machine*, as uname(2) says it, of a packaged kernel.

    Raises:
        GuestImageError: *image* is no kernel for that machine, or is damaged.
    """
    return arm64_image(image) if machine == "aarch64" else vmlinux(image)


def arm64_image(image: bytes) -> bytes:
    """The ``Image`` in a packaged kernel of aarch64. Raises GuestImageError."""
    if image[_ZBOOT_AT : _ZBOOT_AT + 4] == _ZBOOT:
        offset, length = struct.unpack_from("<II", image, 8)
        if not length or offset + length > len(image):
            raise GuestImageError("The kernel image is cut short.")
        image = decompress(image[offset : offset + length])
    elif image.startswith(_GZIP):
        image = decompress(image)
    if image[_ARM64_AT : _ARM64_AT + 4] != _ARM64:
        raise GuestImageError("The kernel package holds no Image for aarch64.")
    return image


def vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside the bzImage *image* (an ELF kernel is returned as it is).

    Raises:
        GuestImageError: *image* is no kernel, is damaged, or its ELF has no PVH entry.
    """
    kernel = image if elf.is_elf(image) else _unpacked(image)
    if not any(owner == b"Xen" and kind == _XEN_ELFNOTE_PHYS32_ENTRY for owner, kind, _ in elf.notes(kernel)):
        raise GuestImageError("The kernel has no PVH entry (CONFIG_PVH): QEMU cannot boot it directly.")
    return kernel


def _unpacked(image: bytes) -> bytes:
    kernel = decompress(payload(image))
    if not elf.is_elf(kernel):
        raise GuestImageError("The kernel image holds no 64-bit ELF kernel.")
    return kernel


def payload(image: bytes) -> bytes:
    """The compressed kernel of a bzImage, with the 4 bytes of plain size that most formats have behind it.

    Raises:
        GuestImageError: *image* is no bzImage of boot protocol 2.08 or later, or is cut short.
    """
    if len(image) < _PAYLOAD_AT + 8 or image[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise GuestImageError("The kernel package holds no bzImage.")
    boot_flag, version = (
        struct.unpack_from("<H", image, _BOOT_FLAG_AT)[0],
        struct.unpack_from("<H", image, 0x206)[0],
    )
    if boot_flag != _BOOT_FLAG or version < 0x208:
        raise GuestImageError(f"The kernel's boot protocol {version >> 8}.{version & 0xFF:02} is too old.")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = ((image[_SETUP_SECTORS_AT] or 4) + 1) * _SECTOR_BYTES + offset
    if not length or start + length > len(image):
        raise GuestImageError("The kernel image is cut short.")
    return image[start : start + length]
