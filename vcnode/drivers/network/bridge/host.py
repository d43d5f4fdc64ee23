"""The bridge driver's netlink work: bridges, veths, what hangs on them. For threads of `namespaces`."""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import AsyncIPRoute

from vcnode.drivers.network import interworking, links, taps
from vcnode.drivers.network.bridge import guard, names
from vcnode.drivers.network.ipam import Subnets
from vcnode.drivers.network.links import Link, doing
from vcnode.errors import NetworkError
from vcnode.models.network import Endpoint, Interworking, RateMbit

SET_SUBNETS = "set subnet4 and subnet6 under [bridge] in the settings"
BRIDGE_KIND = "bridge"
_EGRESS_PRIO = 1
_IFA_F_NODAD = 2
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
"""An entry of a bridge that does not age. Source: linux/neighbour.h."""
_BURST_S = 0.01
_BURST_BYTES = 64 * 1024
"""At least one frame as large as the guest may hand over at once."""
_LATENCY_MS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """What all pods of the node have in common."""

    mark: str
    subnets: Subnets
    mtu: int


def quieten_namespace() -> None:
    """Keep the kernel of the thread's namespace from taking part in the pod's network itself."""
    for name in ("all", "default"):
        path = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
        if path.exists():
            path.write_text("1")


async def ensure_bridge(netlink: AsyncIPRoute, plan: Plan, endpoint: Endpoint) -> Link:
    """The bridge of an endpoint's network, made if it is missing; it is the gateway of its pods.

    Raises:
        NetworkError: It could not be made; nothing of it is left.
    """
    name = names.bridge(plan.mark, endpoint.network)
    link = await links.find(netlink, name)
    if link is not None and link.kind != BRIDGE_KIND:
        raise NetworkError(
            f"Interface {name} is no bridge, and the node needs that name; rename or remove it."
        )
    if link is not None and link.up:
        return link
    if link is None and (route := await overlapping(netlink, plan)) is not None:
        # It was not there when the driver was opened: another node agent's, say.
        raise NetworkError(f"The node's subnet lies across {route} of the host; {SET_SUBNETS}.")
    mac = names.bridge_mac(name)
    try:
        with doing(f"make bridge {name}"):
            if link is None:
                await netlink.link(
                    "add", ifname=name, kind=BRIDGE_KIND, address=mac, br_mcast_snooping=0, mtu=plan.mtu
                )
            link = await links.get(netlink, name)
            _configure_bridge(name)
            for subnet in _subnets_of(endpoint):
                # Nobody else has it, so nobody has to be asked (IFA_F_NODAD).
                await netlink.addr(
                    "replace",
                    index=link.index,
                    address=str(subnet[1]),
                    prefixlen=subnet.prefixlen,
                    flags=_IFA_F_NODAD,
                )
            await netlink.link("set", index=link.index, state="up")
    except BaseException:
        await links.delete(netlink, name)
        raise
    return await links.get(netlink, name)


def _subnets_of(endpoint: Endpoint) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The subnets of the endpoint's network; the host has the first address in each."""
    return [ipaddress.ip_interface(address).network for address in endpoint.addresses]


def _configure_bridge(name: str) -> None:
    """The host takes nothing from the pods' side to configure itself with."""
    for family, key, value in (
        ("ipv6", "accept_ra", "0"),
        ("ipv6", "disable_ipv6", "0"),
        ("ipv4", "rp_filter", "1"),
    ):
        path = Path("/proc/sys/net", family, "conf", name, key)
        if path.exists():
            path.write_text(value)


async def remove_bridge(netlink: AsyncIPRoute, name: str) -> bool:
    """Remove a bridge that has no port any more; whether it was."""
    link = await links.find(netlink, name)
    if (
        link is None
        or link.kind != BRIDGE_KIND
        or any(other.master == link.index for other in await links.every(netlink))
    ):
        return False
    return await links.remove(netlink, link)


async def attach(
    host: AsyncIPRoute,
    pod: AsyncIPRoute,
    netns_fd: int,
    plan: Plan,
    endpoint: Endpoint,
    index: int,
    mode: Interworking,
    rate: RateMbit,
) -> Endpoint:
    """Make one interface of a pod, from the bridge to the tap. The thread is in the namespace of *pod*.

    Returns:
        The endpoint as it is: the planned one, but for its name at the host's end if that was taken, and for
        what is known now.

    Raises:
        NetworkError: It could not be made; what is there of it carries the VM's id.
    """
    bridge = await ensure_bridge(host, plan, endpoint)
    name = await _make_veth(host, netns_fd, plan, endpoint, index, bridge)
    veth = await links.get(host, name)
    await _set_up_port(host, veth, endpoint, bridge)
    link = Link(
        links.index_here(inner := f"eth{index}") or 0, inner, endpoint.mac, plan.mtu, up=False, kind="veth"
    )
    pair = await interworking.wire(pod, link, mode, index=index, pair_id=endpoint.id, ours=True)
    await _guard(pod, link, plan, endpoint, bridge, clsact=mode is Interworking.TC)
    await _limit(host, veth, rate.ingress)
    await _limit(pod, link, rate.egress)
    return endpoint.model_copy(update={"host_interface": name, "net_pair": pair})


async def _make_veth(
    host: AsyncIPRoute, netns_fd: int, plan: Plan, endpoint: Endpoint, index: int, bridge: Link
) -> str:
    """Make the pair of interfaces, the host's end in the bridge; the name of that end."""
    vm_id = endpoint.id.rpartition("-")[0]
    spares = names.HOST_INTERFACES[10:]  # the digits are the interfaces' numbers
    for character in (names.HOST_INTERFACES[index], *spares):
        name = names.host_interface(vm_id, character)
        own = {"ifname": name, "address": bridge.mac, "mtu": plan.mtu}
        peer = {"ifname": f"eth{index}", "net_ns_fd": netns_fd, "address": endpoint.mac, "mtu": plan.mtu}
        try:
            with doing(f"make interface {name}"):
                await host.link("add", **own, kind="veth", master=bridge.index, state="up", peer=peer)
            return name
        except NetworkError as exc:
            if exc.details.get("errno") != errno.EEXIST or await links.find(host, name) is None:
                raise
    raise NetworkError(f"All names for an interface of VM {vm_id} are taken.")


async def rejoin(host: AsyncIPRoute, plan: Plan, endpoint: Endpoint) -> bool:
    """See that the interface at the host's end is in its bridge, which is made if it is missing.

    Returns:
        False when that interface is gone.

    Raises:
        NetworkError: The kernel refuses.
    """
    bridge = await ensure_bridge(host, plan, endpoint)
    veth = await links.find(host, endpoint.host_interface or "")
    if veth is not None and veth.master != bridge.index:
        with doing(f"put {veth.name} into {bridge.name}"):
            await host.link("set", index=veth.index, master=bridge.index)
        if await interworking.has_filters(host, veth):  # they lead to the bridge that was
            with doing(f"take the filters off {veth.name}"):
                await host.tc("del", "ingress", veth.index)
        await _set_up_port(host, veth, endpoint, bridge)
    return veth is not None


async def _set_up_port(host: AsyncIPRoute, veth: Link, endpoint: Endpoint, bridge: Link) -> None:
    """Keep a port of the node's own network apart, and lead what is for the host to it."""
    if endpoint.network is None:
        with doing(f"set up port {veth.name}"):
            await host.brport("set", index=veth.index, isolated=1)
    await _deliver(host, veth, endpoint.mac, bridge)


async def _deliver(host: AsyncIPRoute, veth: Link, mac: str, bridge: Link) -> None:
    """Give what a pod sends to the host to the bridge's own interface, past br_netfilter.

    That module (Docker and Kubernetes load it) has frames translated before they are bridged, and bridges
    those that a published port leads back to the same bridge, where ports are kept apart. The port has the
    bridge's MAC, or what comes in by it would count as another host's. The bridge learns no MAC from frames
    that it does not see, so it is told.
    """
    with doing(f"lead {veth.name} to {bridge.name}"):
        await host.fdb("add", ifindex=veth.index, lladdr=mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        await host.tc("add", "ingress", veth.index)
        await host.tc(
            "add-filter",
            "bpf",
            veth.index,
            parent=interworking.INGRESS,
            protocol=interworking.ETH_P_ALL,
            prio=_EGRESS_PRIO,
            classic=guard.sent_to(bridge.mac),
            action={
                "kind": "mirred",
                "direction": "ingress",
                "action": "redirect",
                "ifindex": bridge.index,
            },
        )


async def _guard(
    pod: AsyncIPRoute, link: Link, plan: Plan, endpoint: Endpoint, bridge: Link, *, clsact: bool
) -> None:
    """Hang the guard at the exit of the namespace; *clsact*: the interworking has made the place for it."""
    gateways = [str(subnet[1]) for subnet in _subnets_of(endpoint)]
    identity = guard.Identity.of(endpoint.mac, endpoint.addresses, bridge.mac, gateways, plan.subnets.all)
    with doing(f"guard {link.name}"):
        if not clsact:
            await pod.tc("add", "clsact", link.index)
        await pod.tc(
            "add-filter",
            "bpf",
            link.index,
            parent=interworking.CLSACT_EGRESS,
            protocol=interworking.ETH_P_ALL,
            prio=_EGRESS_PRIO,
            direct_action=True,
            classic=guard.program(identity),
        )


async def _limit(netlink: AsyncIPRoute, link: Link, mbit: float | None) -> None:
    """Bound what leaves through *link*."""
    if mbit is None:
        return
    rate = int(mbit * 1e6 / 8)
    with doing(f"limit {link.name}"):
        await netlink.tc(
            "add",
            "tbf",
            link.index,
            rate=rate,
            burst=max(_BURST_BYTES, int(rate * _BURST_S)),
            latency=f"{_LATENCY_MS}ms",
        )


async def detach(host: AsyncIPRoute, plan: Plan, vm_id: str, endpoints: Sequence[Endpoint]) -> list[str]:
    """Remove what a VM has at the host's end. Idempotent.

    Returns:
        Bridges of networks with a name that may have lost their last port.

    Raises:
        NetworkError: Something is still there.
    """
    known = [e.host_interface for e in endpoints if e.host_interface is not None]
    removed = [await _delete_veth(host, name) for name in known]
    if not removed or not all(removed):
        # Nothing is known, or a name was taken and nobody has noted the other one: look at all of them.
        for link in await links.every(host):
            if names.vm_of(link.name, plan.mark) == vm_id:
                await _delete_veth(host, link.name)
    return [names.bridge(plan.mark, e.network) for e in endpoints if e.network is not None]


async def try_out(plan: Plan) -> None:
    """Make one pod's network in the thread's namespace, which goes with it: all that the kernel must have.

    Raises:
        NetworkError: The kernel refuses something; says what.
    """
    part = plan.subnets.slice_of(None, ())
    endpoint = Endpoint(
        id=f"{plan.mark}0000000-0",
        name="eth0",
        mac="02:00:00:00:00:01",
        addresses=plan.subnets.addresses(part.pods[0], part),
    )
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        async with links.here() as netlink:
            rate = RateMbit(ingress=1, egress=1)
            await attach(netlink, netlink, fd, plan, endpoint, 0, Interworking.TC, rate)
    finally:
        os.close(fd)


async def _delete_veth(host: AsyncIPRoute, name: str) -> bool:
    """Remove an interface of ours; False when there is none, or one of somebody else has the name."""
    link = await links.find(host, name)
    return link is not None and link.kind == "veth" and await links.remove(host, link)


async def overlapping(netlink: AsyncIPRoute, plan: Plan) -> str | None:
    """A route of the host's that lies across one of the subnets, as text; None when there is none."""
    ours = {
        link.index for link in await links.every(netlink) if link.name.startswith(names.bridges(plan.mark))
    }
    for family in (2, 10):
        with doing("list routes"):
            routes = [r async for r in await netlink.route("dump", family=family, table=254)]
        for route in routes:
            destination, oif = route.get("dst"), route.get("oif")
            if destination is None or oif in ours or not route["dst_len"]:
                continue
            network = ipaddress.ip_network(f"{destination}/{route['dst_len']}", strict=False)
            for subnet in plan.subnets.all:
                if network.version == subnet.version and network.overlaps(subnet):
                    return str(network)
    return None


async def of_former_subnets(netlink: AsyncIPRoute, plan: Plan) -> str | None:
    """A network of pods that run, on one of the node's bridges, which is none of the subnets'; else None."""
    every = await links.every(netlink)
    used = {link.master for link in every}
    ours = {
        link.index for link in every if link.name.startswith(names.bridges(plan.mark)) and link.index in used
    }
    with doing("list addresses"):
        addresses = [a async for a in await netlink.addr("dump") if a["index"] in ours]
    for address in addresses:
        network = ipaddress.ip_interface(f"{address.get('address')}/{address['prefixlen']}").network
        if not network.is_link_local and not plan.subnets.knows(network):
            return str(network)
    return None


async def default_mtu(netlink: AsyncIPRoute) -> int | None:
    """The MTU of the interface that leads to the outside; None when none does."""
    with doing("list routes"):
        routes = [r async for r in await netlink.route("dump", family=2, table=254)]
    for route in routes:
        if not route["dst_len"] and route.get("oif") is not None:
            for link in await links.every(netlink):
                if link.index == route.get("oif"):
                    return link.mtu
    return None


def enable_forwarding(subnets: Subnets) -> None:
    """Let the host forward packets, which masquerading needs. Raises NetworkError."""
    try:
        if subnets.v4 is not None:
            _turn_on(Path("/proc/sys/net/ipv4/ip_forward"))
        if subnets.v6 is not None:
            _keep_router_advertisements()
            _turn_on(Path("/proc/sys/net/ipv6/conf/all/forwarding"))
    except OSError as exc:
        raise NetworkError(f"Forwarding cannot be turned on: {exc.strerror}.") from exc


def _turn_on(path: Path) -> None:
    if path.read_text().strip() == "0":
        path.write_text("1")


def _keep_router_advertisements() -> None:
    """A host that forwards stops to configure itself by router advertisements, unless it is told not to."""
    if Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "0":
        for path in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
            if path.read_text().strip() == "1":
                path.write_text("2")


def ipv6_usable() -> bool:
    """Whether the host has IPv6 at all."""
    path = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    return path.exists() and path.read_text().strip() == "0" and os.access(path, os.R_OK)


def has_tun() -> bool:
    """Whether taps can be made."""
    return Path(taps.TUN_DEVICE).exists()
