"""How an interface of a pod's namespace reaches the VM: wired to a tap, and unwired again.

Any driver that has an interface in a namespace, whoever made it, uses `connect`. The guest gets the
interface's own MAC and MTU, so nothing between it and the network has to translate. Whatever addresses the
interface has in the namespace may stay: from now on the kernel there sees nothing that comes in.

::

    tc       eth0 ◀── filters that redirect each frame to the other ──▶ tap0    nothing learns or forwards
    bridged  eth0 ── bridge br0 ── tap0                                         as virtcontainers did
    macvtap  eth0 ── macvtap tap0 on top of it (passthru)                       no other tap is needed

What is needed to put the interface back as it was stands in its alias (``ip -d link``), so that it can be
undone by whoever finds it, also after a crash in the middle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from pyroute2 import AsyncIPRoute

from vcnode.drivers import namespaces
from vcnode.drivers.network import links, macvtaps, taps
from vcnode.drivers.network.links import Link, doing
from vcnode.errors import NetworkError
from vcnode.models.network import Interworking, NetworkInterface, NetworkInterfacePair

CLSACT_INGRESS, CLSACT_EGRESS, INGRESS = 0xFFFFFFF2, 0xFFFFFFF3, 0xFFFF0000
"""Where filters are hung; ``clsact`` is an ``ingress`` qdisc that has an egress as well."""
ETH_P_ALL = 0x0003
TAP_KIND = "tun"
"""What the kernel calls a tap."""
_ROOT_TARGET = 0x10000
"""What pyroute2 0.9 wants as ``target`` of an u32 filter that leads to no class."""
EVERYTHING = ("0x0/0x0+0",)
"""The u32 key that any frame matches; ``matchall`` is not in every kernel."""
_ALIAS = re.compile(r"vcnode mac=((?:[0-9a-f]{2}:){5}[0-9a-f]{2}) up=([01])")


def tap_name(index: int) -> str:
    """The tap of a VM's interface number *index*; a namespace is one VM's alone."""
    return f"tap{index}"


def bridge_name(index: int) -> str:
    """The bridge of a VM's interface number *index*, when that is ``bridged``."""
    return f"br{index}"


async def connect(
    netns_path: str, interface: str, mode: Interworking, *, index: int = 0, pair_id: str
) -> NetworkInterfacePair:
    """Wire an existing interface of a namespace to the VM.

    The interface is up afterwards. A tap of the right name that is there already is used (a spare's).

    Args:
        netns_path: The namespace.
        interface: Its interface, such as ``eth0``.
        mode: How.
        index: Number of the interface among those of the VM; names tap and bridge.
        pair_id: Id of the pair, unique within the node.

    Returns:
        The pair, as an endpoint shows it; ``virt_iface.hard_addr`` is the MAC that the guest is to have.

    Raises:
        NetworkError: No such namespace or interface, one that has ingress filters of somebody else, or the
            kernel refuses. Call `disconnect` then, too, unless the whole namespace goes.
    """

    async def work() -> NetworkInterfacePair:
        async with links.here() as netlink:
            link = await links.get(netlink, interface)
            return await wire(netlink, link, mode, index=index, pair_id=pair_id)

    return await namespaces.run(netns_path, work)


async def disconnect(netns_path: str, interface: str, *, index: int = 0) -> None:
    """Take `connect` back in a namespace that stays: the interface is as it was before. Idempotent.

    Raises:
        NetworkError: The namespace is gone, or the kernel refuses.
    """

    async def work() -> None:
        async with links.here() as netlink:
            await unwire(netlink, interface, index=index)

    await namespaces.run(netns_path, work)


async def open_taps(netns_path: str, pairs: Sequence[NetworkInterfacePair]) -> tuple[int, ...]:
    """Open the VM's side of each pair, in order; the caller closes the descriptors.

    Raises:
        NetworkError: One of them is gone, or in use; none stays open.
    """

    def work() -> tuple[int, ...]:
        opened: list[int] = []
        try:
            for pair in pairs:
                opener = macvtaps if pair.interworking is Interworking.MACVTAP else taps
                opened.append(opener.open_for_qemu(pair.tap_iface.name))
        except BaseException:
            taps.close(opened)
            raise
        return tuple(opened)

    return await namespaces.run_blocking(netns_path, work)


# -- inside the namespace: for `namespaces.run` ------------------------------------------------------------


async def wire(
    netlink: AsyncIPRoute, link: Link, mode: Interworking, *, index: int, pair_id: str, ours: bool = False
) -> NetworkInterfacePair:
    """As `connect`, within its thread. *ours*: the interface is new, so nobody has filters on it."""
    if mode is Interworking.TC and not ours:
        await _refuse_foreign_filters(netlink, link)
    with doing(f"set up interface {link.name}"):
        alias = f"vcnode mac={link.mac} up={int(link.up)}"
        await netlink.link("set", index=link.index, ifalias=alias, state="up")
    if mode is Interworking.MACVTAP:
        tap = await macvtaps.make(netlink, link, tap_name(index))
    else:
        tap = await make_tap(netlink, index, link.mtu, link.mac)
        await (_redirect if mode is Interworking.TC else _bridge)(netlink, link, tap, index)
    return NetworkInterfacePair(
        id=pair_id,
        interworking=mode,
        name=bridge_name(index) if mode is Interworking.BRIDGED else None,
        virt_iface=NetworkInterface(name=link.name, hard_addr=link.mac),
        tap_iface=NetworkInterface(name=tap.name, hard_addr=tap.mac),
    )


async def unwire(netlink: AsyncIPRoute, interface: str, *, index: int) -> None:
    """As `disconnect`, within its thread."""
    for name in (tap_name(index), bridge_name(index)):
        await links.delete(netlink, name)
    if (link := await links.find(netlink, interface)) is None or not (
        found := _ALIAS.fullmatch(link.alias or "")
    ):
        return
    if await has_filters(netlink, link):
        with doing(f"take the filters off {link.name}"):
            await netlink.tc("del", "clsact", link.index)
    with doing(f"put interface {link.name} back"):
        if link.mac != found[1]:
            await netlink.link("set", index=link.index, address=found[1])
        await netlink.link("set", index=link.index, ifalias="", state="up" if found[2] == "1" else "down")


async def make_tap(netlink: AsyncIPRoute, index: int, mtu: int, mac: str) -> Link:
    """The tap of a VM's interface, made if it is missing; *mac* is the guest's. Raises NetworkError."""
    name = tap_name(index)
    if links.index_here(name) is None:
        taps.make(name)
        tap = Link(links.index_here(name) or 0, name, "", 0, up=False, kind=TAP_KIND)
    elif (tap := await links.get(netlink, name)).kind != TAP_KIND:
        raise NetworkError(f"Interface {name} is there already and no tap; the VM needs that name.")
    wanted = tap_mac(mac)
    if not tap.up or tap.mtu != mtu or tap.mac != wanted:
        with doing(f"set up tap {name}"):
            await netlink.link("set", index=tap.index, mtu=mtu, address=wanted, state="up")
    return replace(tap, mac=wanted, mtu=mtu, up=True)


def tap_mac(mac: str) -> str:
    """The MAC of the tap itself, which nobody sees: the guest's, but for its first byte."""
    return f"06{mac[2:]}" if not mac.startswith("06") else f"02{mac[2:]}"


async def redirect(netlink: AsyncIPRoute, source: Link, parent: int, target: Link, *, prio: int = 1) -> None:
    """Let whatever passes *parent* of *source* leave through *target* instead. Raises NetworkError."""
    with doing(f"redirect {source.name} to {target.name}"):
        await netlink.tc(
            "add-filter",
            "u32",
            source.index,
            parent=parent,
            protocol=ETH_P_ALL,
            prio=prio,
            target=_ROOT_TARGET,
            keys=list(EVERYTHING),
            action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target.index},
        )


async def _redirect(netlink: AsyncIPRoute, link: Link, tap: Link, _index: int) -> None:
    with doing(f"hang filters on {link.name} and {tap.name}"):
        await netlink.tc("add", "clsact", link.index)
        await netlink.tc("add", "ingress", tap.index)
    await redirect(netlink, link, CLSACT_INGRESS, tap)
    await redirect(netlink, tap, INGRESS, link)


async def _bridge(netlink: AsyncIPRoute, link: Link, tap: Link, index: int) -> None:
    name = bridge_name(index)
    with doing(f"make bridge {name}"):
        # It learns nothing: with two ports, whatever comes in by one is for the other.
        await netlink.link("add", ifname=name, kind="bridge", br_ageing_time=0, br_mcast_snooping=0)
    bridge = await links.get(netlink, name)
    with doing(f"put {link.name} and {tap.name} into bridge {name}"):
        # The guest has this MAC; a port that has it as well would keep the guest's frames to itself.
        other = f"02:00:ca:fe:{index:02x}:{link.index & 0xFF:02x}"
        await netlink.link("set", index=link.index, address=other)
        for port in (link, tap):
            await netlink.link("set", index=port.index, master=bridge.index)
        await netlink.link("set", index=bridge.index, mtu=link.mtu, state="up")


async def has_filters(netlink: AsyncIPRoute, link: Link) -> bool:
    """Whether the interface has an ``ingress`` or ``clsact`` qdisc. Raises NetworkError."""
    with doing(f"list the filters of {link.name}"):
        qdiscs = [q async for q in await netlink.tc("dump", index=link.index)]
    return any(q.get("kind") in ("ingress", "clsact") for q in qdiscs if q["index"] == link.index)


async def _refuse_foreign_filters(netlink: AsyncIPRoute, link: Link) -> None:
    if await has_filters(netlink, link):
        raise NetworkError(
            f"Interface {link.name} has ingress filters of somebody else; "
            "use interworking 'bridged' or 'macvtap', or take them off."
        )
