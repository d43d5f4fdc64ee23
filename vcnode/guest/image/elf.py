"""The few facts that we need from 64-bit little-endian ELF files. Pure.

Source: System V ABI (gABI 4.1), chapters 4 and 5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vcnode.guest.image.errors import GuestImageError

_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")  # from e_type on
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")

_SHT_DYNAMIC = 6
_PT_NOTE = 4
_DT_NULL, _DT_NEEDED = 0, 1


class _Section(NamedTuple):
    name_offset: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def is_elf(data: bytes) -> bool:
    """Whether *data* begins like a 64-bit little-endian ELF file."""
    return data[:6] == b"\x7fELF\x02\x01"


def modinfo(module: bytes) -> dict[str, list[str]]:
    """The ``key=value`` pairs of a kernel module; a key may come several times (``alias``, ``parm``).

    Raises:
        GuestImageError: *module* is no module.
    """
    pairs: dict[str, list[str]] = {}
    for name, section in _named_sections(module):
        if name == b".modinfo":
            for pair in _content(module, section).split(b"\0"):
                key, separator, value = pair.decode(errors="replace").partition("=")
                if separator:
                    pairs.setdefault(key, []).append(value)
            return pairs
    raise GuestImageError("A kernel module has no .modinfo section.")


def needed_libraries(data: bytes) -> list[str]:
    """The sonames in a program's or library's dynamic section; empty for a static program.

    Raises:
        GuestImageError: *data* is no ELF file, or a broken one.
    """
    sections = list(_sections(data))
    names: list[str] = []
    for section in sections:
        if section.kind != _SHT_DYNAMIC:
            continue
        if section.link >= len(sections):
            raise GuestImageError("An ELF file's dynamic section names no string table.")
        strings = _content(data, sections[section.link])
        content = _content(data, section)
        for tag, value in _DYNAMIC.iter_unpack(content[: len(content) // _DYNAMIC.size * _DYNAMIC.size]):
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                names.append(_string(strings, value).decode(errors="replace"))
    return names


def notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and content of every note in the program headers.

    Raises:
        GuestImageError: *data* is no ELF file, or a broken one.
    """
    header = _header(data)
    offset, entry_size, count = header[4], header[8], header[9]
    for index in range(count):
        kind, _, start, _, _, size, _, alignment = _unpack(_SEGMENT, data, offset + index * entry_size)
        if kind == _PT_NOTE:
            yield from _notes(data[start : start + size], 8 if alignment == 8 else 4)


def _notes(content: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    def aligned(length: int) -> int:
        return (length + alignment - 1) // alignment * alignment

    position = 0
    while position + 12 <= len(content):
        owner_size, size, kind = struct.unpack_from("<III", content, position)
        owner_at = position + 12
        content_at = position + aligned(12 + owner_size)
        yield (
            content[owner_at : owner_at + owner_size].rstrip(b"\0"),
            kind,
            content[content_at : content_at + size],
        )
        position = content_at + aligned(size)


def _named_sections(data: bytes) -> Iterator[tuple[bytes, _Section]]:
    sections = list(_sections(data))
    names_index = _header(data)[12]
    if names_index >= len(sections):
        return
    names = _content(data, sections[names_index])
    for section in sections:
        yield _string(names, section.name_offset), section


def _sections(data: bytes) -> Iterator[_Section]:
    header = _header(data)
    offset, entry_size, count = header[5], header[10], header[11]
    for index in range(count):
        yield _Section(*_unpack(_SECTION, data, offset + index * entry_size))


def _header(data: bytes) -> tuple[int, ...]:
    if not is_elf(data):
        raise GuestImageError("A file that should be 64-bit ELF is not.")
    return _unpack(_HEADER, data, 0)


def _unpack(layout: struct.Struct, data: bytes, offset: int) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data, offset)
    except (struct.error, OverflowError) as exc:
        raise GuestImageError("An ELF file is cut short.") from exc


def _content(data: bytes, section: _Section) -> bytes:
    return data[section.offset : section.offset + section.size]


def _string(table: bytes, offset: int) -> bytes:
    return table[offset : table.find(b"\0", offset)]
