"""The program that decides on devices, executed by a few lines that know its instructions."""

from __future__ import annotations

import struct

import pytest

from vcnode.guest.agent import devices

BLOCK, CHAR = 1, 2
MKNOD, READ, WRITE = 1, 2, 4


def allowed(kind: int, major: int, minor: int, access: int) -> bool:
    """Interpret `devices.program`."""
    context = {0: access << 16 | kind, 4: major, 8: minor}
    registers = [0] * 5
    code = devices.program()
    position = 0
    while True:
        operation, numbers, offset, value = struct.unpack_from("<BBhi", code, position * 8)
        target, source = numbers & 15, numbers >> 4
        position += 1
        if operation == 0x61:
            assert source == 1
            registers[target] = context[offset]
        elif operation == 0xB7:
            registers[target] = value
        elif operation == 0x57:
            registers[target] &= value
        elif operation == 0x55:
            position += offset if registers[target] != value else 0
        elif operation == 0x15:
            position += offset if registers[target] == value else 0
        else:
            assert operation == 0x95
            return registers[0] == 1


@pytest.mark.parametrize("access", [MKNOD, READ, WRITE, READ | WRITE])
@pytest.mark.parametrize(
    ("major", "minor"),
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 0), (136, 4000)],
)
def test_the_ordinary_devices_are_allowed(major: int, minor: int, access: int) -> None:
    assert allowed(CHAR, major, minor, access)
    assert not allowed(BLOCK, major, minor, access)


@pytest.mark.parametrize("access", [MKNOD, READ, WRITE])
@pytest.mark.parametrize(
    ("kind", "major", "minor"),
    [
        (CHAR, 1, 1),  # mem
        (CHAR, 1, 2),  # kmem
        (CHAR, 1, 11),  # kmsg
        (CHAR, 5, 1),  # console
        (CHAR, 4, 64),  # ttyS0
        (CHAR, 10, 200),  # net/tun
        (CHAR, 247, 1),  # a virtio port
        (CHAR, 3, 1),
        (BLOCK, 8, 0),  # sda
        (BLOCK, 1, 3),
    ],
)
def test_all_others_are_not(kind: int, major: int, minor: int, access: int) -> None:
    assert not allowed(kind, major, minor, access)
