"""The kernel's announcements of devices: what makes waiting for one possible without polling."""

from __future__ import annotations

import errno
import os

from vcnode.guest.agent import syscalls

_AF_NETLINK, _SOCK_RAW, _SOCK_NONBLOCK, _SOCK_CLOEXEC = 16, 3, 0o4000, 0o2000000
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1


def listen() -> int:
    """A non-blocking descriptor that is readable when something was announced; the caller closes it.

    Look at sysfs after this call and before waiting: then nothing is missed.
    """
    fd = syscalls.socket(_AF_NETLINK, _SOCK_RAW | _SOCK_NONBLOCK | _SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
    try:
        syscalls.bind(fd, _address(_KERNEL_GROUP))
    except OSError:
        os.close(fd)
        raise
    return fd


def _address(groups: int) -> bytes:
    """struct sockaddr_nl: family, padding, port (0: the kernel chooses), groups; netlink(7)."""
    return _AF_NETLINK.to_bytes(2, "little") + bytes(6) + groups.to_bytes(4, "little")


def drain(fd: int) -> None:
    """Take all announcements. Their content is not used: some can be lost, and sysfs tells the truth."""
    while True:
        try:
            os.read(fd, 8192)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
