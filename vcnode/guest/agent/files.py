"""Small files in one system call each.

What ``open`` builds around a descriptor (buffer, decoder, text layer) is code that a clone runs for the first
time, and without KVM that is what a start costs: QEMU translates it anew in each of them.
"""

from __future__ import annotations

import os

MOST_BYTES = 4096
"""How much of a file is read: those of sysfs and procfs that are read here are a line."""


def read(path: str) -> str:
    """The text of a small file, without white space at its ends. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, MOST_BYTES).decode("ascii", "replace").strip()
    finally:
        os.close(fd)


def write(path: str, content: str, flags: int = 0) -> None:
    """Write *content* into a file that is there, or is made if *flags* say so. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
    try:
        left = content.encode("ascii")
        while left:
            left = left[os.write(fd, left) :]
    finally:
        os.close(fd)
