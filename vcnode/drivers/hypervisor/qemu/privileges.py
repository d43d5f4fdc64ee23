"""A user of its own for each QEMU, without any right on the host.

What is started goes through ``setpriv`` (util-linux), which drops everything in the child and then executes
QEMU: the node agent itself stays with vfork, which a change of user within Python would rule out, and whose
cost does not grow with the node agent.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from vcnode.errors import HypervisorError, ResourceExhaustedError

SETPRIV = "setpriv"
KVM = Path("/dev/kvm")


def find_setpriv() -> str:
    """Path of the program. Raises HypervisorError: there is none."""
    found = shutil.which(SETPRIV)
    if found is None:
        raise HypervisorError(f"qemu.uid_base needs {SETPRIV}; install the package util-linux, or unset it.")
    return found


def prefix(setpriv: str, uid: int, groups: Sequence[int]) -> list[str]:
    """What stands before a command line that is to run as *uid*, in *groups* and with no capability."""
    return [
        setpriv,
        f"--reuid={uid}",
        f"--regid={uid}",
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]


def choose(vm_id: str, base: int, count: int, taken: Iterable[int]) -> int:
    """A user id that no process has; which one follows from the VM, so that ids are not used again at once.

    Raises:
        ResourceExhaustedError: All are taken.
    """
    used = set(taken)
    first = hash_of(vm_id)
    for step in range(count):
        uid = base + (first + step) % count
        if uid not in used:
            return uid
    raise ResourceExhaustedError(f"All {count} user ids from {base} on are in use.", uid_base=base)


def hash_of(vm_id: str) -> int:
    """A number of the VM's id, the same in every process."""
    return int.from_bytes(vm_id.encode()[-8:], "big")


def users(proc: Path = Path("/proc")) -> set[int]:
    """The user ids of all processes."""
    found = set()
    with os.scandir(proc) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                try:
                    found.add(entry.stat().st_uid)
                except FileNotFoundError:
                    continue  # it ended meanwhile
    return found


def kvm_groups(device: Path = KVM) -> list[int]:
    """The groups through which an ordinary user may open KVM; none where everybody may."""
    try:
        found = device.stat()
    except OSError:
        return []
    mode = stat.S_IMODE(found.st_mode)
    return [found.st_gid] if mode & 0o060 == 0o060 and mode & 0o006 != 0o006 else []


def open_for_all(path: Path) -> int:
    """Open a file that QEMU is to read through its descriptor; the caller closes it.

    QEMU opens what ``/proc/self/fd/N`` names anew: no directory stands in its way, but the file's own mode
    does.

    Raises:
        HypervisorError: Others may not read it.
        OSError: It cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_readable(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_readable(fd: int) -> None:
    """See that an ordinary user may open the file behind *fd* anew. Raises HypervisorError."""
    if not os.fstat(fd).st_mode & stat.S_IROTH:
        path = os.readlink(f"/proc/self/fd/{fd}")
        raise HypervisorError(f"Others than root must be able to read {path}; run: chmod o+r {path}.")
