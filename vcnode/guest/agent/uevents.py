"""The kernel's announcements of devices: what makes waiting for one possible without polling."""

from __future__ import annotations

import errno
import os
import socket

_NETLINK_KOBJECT_UEVENT = 15  # include/uapi/linux/netlink.h
_KERNEL_GROUP = 1


def listen() -> int:
    """A non-blocking descriptor that is readable when something was announced; the caller closes it.

    Look at sysfs after this call and before waiting: then nothing is missed.
    """
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT) as sock:
        sock.bind((0, _KERNEL_GROUP))
        return sock.detach()


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
