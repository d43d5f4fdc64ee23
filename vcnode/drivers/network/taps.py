"""Taps: made to stay, and opened for QEMU.

A tap that stays (TUNSETPERSIST) belongs to its namespace and not to a process, so it can be wired before
QEMU has it, and found again. Source: Documentation/networking/tuntap.rst, linux/if_tun.h.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable

from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import NetworkError

TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def make(name: str) -> None:
    """Make a tap in the calling thread's namespace. Raises NetworkError, also when the name is taken."""
    try:
        fd = _attach(name)
        try:
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        finally:
            os.close(fd)
    except OSError as exc:
        raise exhausted(exc) or NetworkError(
            f"Tap {name} cannot be made: {exc.strerror}.", errno=exc.errno
        ) from exc


def open_for_qemu(name: str) -> int:
    """Open a tap of the calling thread's namespace; the caller closes the descriptor.

    With IFF_VNET_HDR: checksums and segmentation are left to whoever needs them done.

    Raises:
        NetworkError: It is gone, or another process has it.
    """
    try:
        return _attach(name)
    except OSError as exc:
        raise exhausted(exc) or NetworkError(
            f"Tap {name} cannot be opened: {exc.strerror}.", errno=exc.errno
        ) from exc


def close(descriptors: Iterable[int]) -> None:
    """Close what was opened."""
    for fd in descriptors:
        os.close(fd)


def _attach(name: str) -> int:
    fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except BaseException:
        os.close(fd)
        raise
    return fd
