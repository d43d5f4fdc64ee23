"""Netlink as the network drivers use it: pyroute2's asyncio interface, with this project's errors.

Everything here runs inside `vcnode.drivers.namespaces.run`, in a thread of its own::

    async def work() -> None:
        async with links.here() as netlink:
            ...

    await namespaces.run(netns_path, work)
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vcnode.drivers.exhaustion import exhausted, exhausted_by
from vcnode.errors import NetworkError

GONE = frozenset({errno.ENODEV, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ESRCH})
"""What the kernel says of what is not there (any more)."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    kind: str | None
    """Such as ``veth`` or ``bridge``; None for hardware and the loopback."""
    loopback: bool = False
    master: int | None = None
    """Index of the bridge that holds it."""
    alias: str | None = None
    """What somebody has noted on it."""
    lower: int | None = None
    """Index of the interface of the same namespace that it is on top of, as a VLAN's is."""


def open_socket() -> socket.socket:
    """A netlink socket of the namespace that the calling thread is in, where it stays."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)


@contextlib.asynccontextmanager
async def over(sock: socket.socket) -> AsyncIterator[AsyncIPRoute]:
    """Speak over an open socket, which is closed at the end."""
    # pyroute2's own way into a namespace forks a process for each socket.
    async with AsyncIPRoute(fileno=sock.detach()) as netlink:
        await netlink.setup_endpoint()  # or it would not close what it has not used
        yield netlink


@contextlib.asynccontextmanager
async def here() -> AsyncIterator[AsyncIPRoute]:
    """Speak with the kernel about the namespace that this thread is in."""
    async with over(open_socket()) as netlink:
        yield netlink


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn an error of the kernel into ours: *what* is what could not be done, as in "make interface x"."""
    try:
        yield
    except NetlinkError as exc:
        refused = NetworkError(f"The kernel would not {what}: {os.strerror(exc.code)}.", errno=exc.code)
        raise exhausted_by(exc.code) or refused from exc
    except OSError as exc:
        failed = NetworkError(f"The kernel would not {what}: {exc.strerror}.", errno=exc.errno)
        raise exhausted(exc) or failed from exc


def index_here(name: str) -> int | None:
    """Index of an interface of the calling thread's namespace; None: there is none. Costs no message."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


async def find(netlink: AsyncIPRoute, name: str) -> Link | None:
    """The interface of that name, if there is one."""
    try:
        found = await netlink.link("get", ifname=name)
    except NetlinkError as exc:
        if exc.code in GONE:
            return None
        refused = NetworkError(f"Interface {name} cannot be looked at: {os.strerror(exc.code)}.")
        raise exhausted_by(exc.code) or refused from exc
    return _link(found[0]) if found else None


async def get(netlink: AsyncIPRoute, name: str) -> Link:
    """The interface of that name. Raises NetworkError when there is none."""
    if (link := await find(netlink, name)) is None:
        raise NetworkError(f"There is no interface {name}.")
    return link


async def every(netlink: AsyncIPRoute) -> list[Link]:
    """All interfaces of the namespace, in the order of their indexes."""
    with doing("list interfaces"):
        return sorted([_link(m) async for m in await netlink.link("dump")], key=lambda link: link.index)


async def delete(netlink: AsyncIPRoute, name: str) -> bool:
    """Remove an interface; False when there is none. Idempotent."""
    link = await find(netlink, name)
    return link is not None and await remove(netlink, link)


async def remove(netlink: AsyncIPRoute, link: Link) -> bool:
    """Remove an interface; False when it has gone meanwhile."""
    try:
        with doing(f"remove interface {link.name}"):
            await netlink.link("del", index=link.index)
    except NetworkError as exc:
        if exc.details.get("errno") in GONE:
            return False
        raise
    return True


def _link(message: Any) -> Link:
    # In one pass: pyroute2's own look-up goes through all attributes for each.
    attributes = {attribute[0]: attribute for attribute in message["attrs"]}

    def value(name: str) -> Any:
        return attributes[name][1] if name in attributes else None

    info = value("IFLA_LINKINFO")
    kind = None if info is None else info.get_attr("IFLA_INFO_KIND")
    # A veth names its other end there, which it is not on top of.
    on_top = kind != "veth" and "IFLA_LINK_NETNSID" not in attributes
    return Link(
        index=message["index"],
        name=value("IFLA_IFNAME"),
        mac=value("IFLA_ADDRESS") or "",
        mtu=value("IFLA_MTU") or 0,
        up=bool(message["flags"] & 0x1),
        kind=kind,
        loopback=bool(message["flags"] & 0x8),
        master=value("IFLA_MASTER"),
        alias=value("IFLA_IFALIAS"),
        lower=value("IFLA_LINK") if on_top else None,
    )
