"""Kernel modules of the guest image: a list says which, in which order."""

from __future__ import annotations

import os

from vcnode.guest.agent import syscalls

DIRECTORY = "/lib/modules"
AT_BOOT = "/etc/vcnode/modules"
EXT4 = "/etc/vcnode/modules-ext4"
"""For writable disks; not at boot, for most guests have none."""


def load(list_file: str, directory: str = DIRECTORY) -> None:
    """Load the modules of a list, in its order. One that is built in or loaded already is fine."""
    if not os.path.exists(list_file):
        return
    with open(list_file, encoding="ascii") as file:
        names = file.read().split()
    for name in names:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.finit_module(fd)
        except FileExistsError:
            continue
        finally:
            os.close(fd)
