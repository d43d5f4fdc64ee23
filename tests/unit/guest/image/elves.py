"""Smallest possible ELF files to read."""

from __future__ import annotations

import struct

_HEADER_BYTES = 64


def elf(
    sections: dict[str, tuple[int, bytes]] | None = None, notes: list[tuple[bytes, int, bytes]] | None = None
) -> bytes:
    """A 64-bit ELF file with *sections* (name to type and content) and one note segment with *notes*."""
    names = b"\0"
    body = b""
    headers = [struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    described = dict(sections or {})
    described[".shstrtab"] = (3, b"")
    order = list(described)
    for name in order:
        names += name.encode() + b"\0"
    described[".shstrtab"] = (3, names)
    note = b"".join(_note(*entry) for entry in notes or [])
    note_at = _HEADER_BYTES + 56
    body += note
    position = note_at + len(note)
    for name in order:
        kind, content = described[name]
        link = order.index(".dynstr") + 1 if name == ".dynamic" else 0
        offset = names.index(name.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", offset, kind, 0, 0, position, len(content), link, 0, 1, 0))
        body += content
        position += len(content)
    segment = struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    header = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    header += struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, _HEADER_BYTES, position, 0, 64, 56, 1, 64, len(headers), len(order)
    )
    return header + segment + body + b"".join(headers)


def _note(owner: bytes, kind: int, content: bytes) -> bytes:
    name = owner + b"\0"
    packed = struct.pack("<III", len(name), len(content), kind) + name
    packed += b"\0" * (-len(packed) % 4) + content
    return packed + b"\0" * (-len(packed) % 4)


def module(*, depends: str = "", **others: str) -> bytes:
    """A kernel module that says so of itself."""
    info = {"license": "GPL", "depends": depends, **others}
    text = b"".join(f"{key}={value}\0".encode() for key, value in info.items())
    return elf({".modinfo": (1, text)})


def program(*needed: str) -> bytes:
    """A program that needs the shared libraries *needed*."""
    strings, dynamic = b"\0", b""
    for name in needed:
        dynamic += struct.pack("<qQ", 1, len(strings))
        strings += name.encode() + b"\0"
    dynamic += struct.pack("<qQ", 0, 0)
    return elf({".dynstr": (3, strings), ".dynamic": (6, dynamic)})


def pvh_kernel(text: bytes = b"") -> bytes:
    """An ELF kernel with a PVH entry, and with *text* in it."""
    return elf({".text": (1, text)}, [(b"GNU", 3, b"id"), (b"Xen", 18, struct.pack("<Q", 0x1000000))])


def bzimage(payload: bytes, *, setup_sectors: int = 3, version: int = 0x20F) -> bytes:
    """A bzImage around a compressed kernel."""
    image = bytearray((setup_sectors + 1) * 512 if setup_sectors else 5 * 512)
    image[0x1F1] = setup_sectors
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + b"\x90" * 16 + payload + b"tail"
