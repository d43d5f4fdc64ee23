from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.guest.image import elves
from vcnode.guest.image import elf
from vcnode.guest.image.errors import GuestImageError


def test_modinfo_has_every_value_of_a_repeated_key() -> None:
    text = b"alias=one\0alias=two\0depends=a,b\0novalue\0"
    info = elf.modinfo(elves.elf({".text": (1, b"x"), ".modinfo": (1, text)}))
    assert info == {"alias": ["one", "two"], "depends": ["a,b"]}


def test_a_file_without_modinfo_is_no_module() -> None:
    with pytest.raises(GuestImageError, match="modinfo"):
        elf.modinfo(elves.elf())


def test_needed_libraries_are_found() -> None:
    assert elf.needed_libraries(elves.program("libc.so.6", "libm.so.6")) == ["libc.so.6", "libm.so.6"]


def test_a_static_program_needs_nothing() -> None:
    assert elf.needed_libraries(elves.elf()) == []


def test_notes_are_read_past_padding() -> None:
    given_notes = [(b"GNU", 3, b"12345"), (b"Xen", 18, b"12345678"), (b"", 1, b"")]
    assert list(elf.notes(elves.elf(notes=given_notes))) == given_notes


def test_this_interpreter_needs_a_c_library() -> None:
    with open("/bin/ls", "rb") as file:
        assert "libc.so.6" in elf.needed_libraries(file.read())


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + b"\0" * 100])
def test_what_is_no_64_bit_elf_is_refused(data: bytes) -> None:
    with pytest.raises(GuestImageError):
        elf.needed_libraries(data)


@settings(deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_nothing_but_never_a_crash(data: st.DataObject) -> None:
    damaged = bytearray(elves.module(depends="a"))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for read in (elf.modinfo, elf.needed_libraries, lambda content: list(elf.notes(content))):
        with contextlib.suppress(GuestImageError):
            read(cut)
