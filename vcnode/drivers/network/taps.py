"""Taps: made to stay, and opened for QEMU.

A tap that stays (TUNSETPERSIST) belongs to its namespace and not to a process, so it can be wired before
QEMU has it, and found again. Source: Documentation/networking/tuntap.rst, linux/if_tun.h.
"""

from __future__ import annotations

import errno
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
        raise exhausted(exc) or _refused(name, "made", exc) from exc


def open_for_qemu(name: str) -> int:
    """Open a tap of the calling thread's namespace; the caller closes the descriptor.

    With IFF_VNET_HDR: checksums and segmentation are left to whoever needs them done.

    Raises:
        NetworkError: It is gone, or another process has it.
    """
    try:
        return _attach(name)
    except OSError as exc:
        raise exhausted(exc) or _refused(name, "opened", exc) from exc


def _refused(name: str, what: str, exc: OSError) -> NetworkError:
    """What TUNSETIFF refuses, in words. Source: linux drivers/net/tun.c, tun_set_iff()."""
    words = {
        errno.EBUSY: "another process has it; end that, or delete its pod",
        errno.EINVAL: "an interface of another kind has that name",
        errno.ENOENT: f"there is no {TUN_DEVICE}; load the module tun",
    }
    why = words.get(exc.errno or 0, exc.strerror)
    return NetworkError(f"Tap {name} cannot be {what}: {why}.", errno=exc.errno)


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
