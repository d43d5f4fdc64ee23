"""Macvtaps: interfaces on top of another one that QEMU opens as a character device.

The device's number is only in the sysfs of the interface's own namespace, and its name in /dev is of no use:
devtmpfs has one for all namespaces, where two of them may have the same index. So the thread that opens it
sees a sysfs and a /dev of its own. Source: linux drivers/net/macvtap.c, macvtap_device_event().
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from pyroute2 import AsyncIPRoute

from vcnode.drivers.exhaustion import exhausted
from vcnode.drivers.network import links
from vcnode.drivers.network.links import Link, doing
from vcnode.errors import NetworkError

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


async def make(netlink: AsyncIPRoute, lower: Link, name: str) -> Link:
    """Make a macvtap on top of *lower*, which it takes over as a whole (``passthru``). Raises NetworkError.

    A tap that is there under that name (a spare's) makes room.
    """
    if (old := await links.find(netlink, name)) is not None and old.kind == "tun":
        await links.delete(netlink, name)
    with doing(f"make macvtap {name} on {lower.name}"):
        await netlink.link(
            "add", ifname=name, kind="macvtap", link=lower.index, macvtap_mode="passthru", mtu=lower.mtu
        )
        link = await links.get(netlink, name)
        await netlink.link("set", index=link.index, state="up")
    return link


def open_for_qemu(name: str) -> int:
    """Open a macvtap of the calling thread's namespace; the caller closes the descriptor.

    The thread gets a mount namespace of its own, so it must be one that ends soon.

    Raises:
        NetworkError: It is gone, or another process has it.
    """
    try:
        return _open(name)
    except OSError as exc:
        refused = NetworkError(f"Macvtap {name} cannot be opened: {exc.strerror}.", errno=exc.errno)
        raise exhausted(exc) or refused from exc


def _open(name: str) -> int:
    if _libc.unshare(_CLONE_NEWNS):
        raise _failed("unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("sysfs", "/sys", "sysfs", 0)
    numbers = list(Path("/sys/class/net", name, "macvtap").glob("tap*/dev"))
    if len(numbers) != 1:
        raise FileNotFoundError(2, "it has no device", name)
    major, minor = numbers[0].read_text().split(":")
    _mount("tmpfs", "/sys", "tmpfs", 0)
    os.mknod("/sys/tap", 0o600 | stat.S_IFCHR, os.makedev(int(major), int(minor)))
    return os.open("/sys/tap", os.O_RDWR | os.O_CLOEXEC)


def _mount(source: str | None, target: str, fstype: str | None, flags: int) -> None:
    arguments = [value and value.encode() for value in (source, target, fstype)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), None):
        raise _failed(f"mount {target}")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
