"""Protocol Network on a bridge of the host.

::

    guest eth0 ── tap0 ═══ eth0 ──────────── v0-… ── bridge vb-… ── host ── nftables ── outside
                  namespace of the pod             (one for each network)

Each pod has a namespace in which its QEMU runs. Addresses come with the plan, so that nothing has to be
waited for; isolation, pinning and limits are made with the interface itself and need no firewall. nftables is
used for what only it can do: masquerading and published ports.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from vcnode.aio import deadline_as
from vcnode.drivers import namespaces
from vcnode.drivers.audit import Held
from vcnode.drivers.network import interworking, ipam, links, listeners, resolver
from vcnode.drivers.network.bridge import firewall, host, names
from vcnode.drivers.network.bridge.firewall import Nft
from vcnode.drivers.network.ipam import Slice, Subnets
from vcnode.errors import InvalidArgumentError, NetworkError, ResourceExhaustedError, UnsupportedError
from vcnode.models.network import (
    Endpoint,
    Interworking,
    NetworkConfig,
    NetworkInterface,
    NetworkInterfacePair,
    NetworkModel,
    Route,
)
from vcnode.models.node import DriverInfo
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import MIN_MTU, MIN_MTU_IPV6, BridgeSettings

log = logging.getLogger(__name__)

DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}
DEFAULT_MTU = 1500


class BridgeNetwork:
    """Connects pods to bridges of the host.

    Args:
        settings: Subnets and the like.
        mark: How the ids of the node's VMs begin; all that is made carries it.
        nft: The firewall; None: without published ports and masquerading.
    """

    def __init__(self, settings: BridgeSettings, mark: str, nft: Nft | None) -> None:
        self._settings = settings
        self._mark = mark
        self._nft = nft
        self._table = names.table(mark)
        self._plan = host.Plan(mark, Subnets(settings.subnet4, settings.subnet6), settings.mtu or DEFAULT_MTU)
        self._unusable: str | None = "The bridge driver was used before it was opened."
        self._former: str | None = None
        """Why what running pods have must not be touched: it is not of these settings."""
        self._notes: tuple[str, ...] = ()
        self._bridges = asyncio.Lock()
        """Held while a bridge is made or removed, and while a port joins one."""
        self._table_lock = asyncio.Lock()
        self._table_ready = False

    @property
    def info(self) -> DriverInfo:
        """See Protocol Network. ``ports`` and ``masquerade`` where nftables is there."""
        capabilities = ["rate_mbit", "spares"] if self._unusable is None else []
        if self._nft is not None and self._unusable is None:
            capabilities += ["masquerade", "ports"] if self._settings.masquerade else ["ports"]
        return DriverInfo(
            type=NetworkModel.BRIDGE, capabilities=tuple(sorted(capabilities)), notes=self._notes
        )

    async def open(self) -> None:
        """See Protocol Network. Makes nothing on the host: what pods need is made with the first."""
        self._unusable = await self.find_obstacle()
        notes = [] if self._unusable is None else [f"No pod can be connected by a bridge: {self._unusable}"]
        if self._unusable is None and (refused := await self.find_nft_obstacle()) is not None:
            self._nft = None
            notes.append(refused)
        if self._unusable is None:
            await self._tidy_up()
        if self._nft is None:
            notes.append(
                "Without nftables (package nftables) pods do not reach the outside and publish no ports."
            )
        self._notes = tuple(notes)

    async def find_nft_obstacle(self) -> str | None:
        """Why the kernel would not take the node's table; None when it would, or there is no nft."""
        if self._nft is None:
            return None
        try:
            await self._nft.check(self._rules(), timeout_s=self._settings.nft_timeout_s)
        except NetworkError as exc:
            return f"{exc.message} Load the kernel's modules for nftables (nf_tables, nft_nat, nft_fib_inet)."
        return None

    async def find_obstacle(self) -> str | None:
        """Why no pod can be connected here, with what would help; None when all is well. Changes nothing."""
        if os.geteuid() != 0:
            return "the node agent does not run as root; run it as root, or set network = 'noop'."
        if not host.has_tun():
            return "the host has no /dev/net/tun; load the module tun, or set network = 'noop'."
        if not host.ipv6_usable():
            self._plan = host.Plan(self._mark, Subnets(self._settings.subnet4, None), self._plan.mtu)
        if not self._plan.subnets.all:
            return "no subnet is left; give it one ([bridge] in the settings), or set network = 'noop'."

        async def look() -> tuple[str | None, str | None, int | None]:
            async with links.here() as netlink:
                return (
                    await host.overlapping(netlink, self._plan),
                    await host.of_former_subnets(netlink, self._plan),
                    await host.default_mtu(netlink),
                )

        try:
            await namespaces.run_in_new(lambda: host.try_out(self._plan))
            overlap, former, mtu = await namespaces.run(None, look)
        except ResourceExhaustedError as exc:
            return exc.message
        except NetworkError as exc:
            return f"{exc.message} Load the kernel's modules for it, or set network = 'noop'."
        if self._settings.mtu is None and mtu is not None:
            # What is too large for the way out is told so, or sent in pieces.
            least = MIN_MTU if self._plan.subnets.v6 is None else MIN_MTU_IPV6
            self._plan = host.Plan(self._mark, self._plan.subnets, max(mtu, least))
        if overlap is not None:
            return f"its subnet lies across {overlap} of the host; {host.SET_SUBNETS}."
        if former is not None:
            self._former = (
                f"pods still run in {former}, which the subnets under [bridge] in the settings lack; "
                "set the former ones, or delete those pods and start the node agent again."
            )
        return self._former

    async def close(self) -> None:
        """See Protocol Network: bridges without a pod and, with the last of them, the table are removed."""
        if self._unusable is None:
            await self._tidy_up()

    async def _tidy_up(self) -> None:
        """Remove bridges without a port and, if none is left, the table."""

        async def work() -> bool:
            async with links.here() as netlink:
                ours = [link.name for link in await links.every(netlink) if self._is_bridge(link)]
                return all([await host.remove_bridge(netlink, name) for name in ours])

        limit_s = self._settings.nft_timeout_s
        async with self._bridges, self._table_lock:
            if not await namespaces.run(None, work) or self._nft is None:
                return
            if self._table in await self._nft.tables(self._table, timeout_s=limit_s):
                await self._nft.drop(self._table, timeout_s=limit_s)
            self._table_ready = False

    @property
    def _prefix(self) -> str:
        return names.bridges(self._mark)

    def _is_bridge(self, link: links.Link) -> bool:
        """Whether it is one of the node's bridges."""
        return link.kind == host.BRIDGE_KIND and link.name.startswith(self._prefix)

    def _rules(self) -> str:
        """The node's table."""
        subnets = self._plan.subnets
        return firewall.base(self._table, self._prefix, subnets, masquerade=self._settings.masquerade)

    # -- plan ----------------------------------------------------------------------------------------------

    def check(self, config: NetworkConfig) -> None:
        """See Protocol Network."""
        if self._unusable is not None:
            raise UnsupportedError(
                f"pod.network_model: no pod can be connected by a bridge: {self._unusable}"
            )
        if config.netns_path is not None:
            raise InvalidArgumentError.field("pod.network.netns_path", "goes with network_model cnm only")
        if config.ports and self._nft is None:
            raise UnsupportedError(
                "pod.network.ports: publishing needs nftables, which this host lacks (package nftables).",
                field="pod.network.ports",
            )

    def netdev_count(self, config: NetworkConfig) -> int:
        """See Protocol Network: one for each network."""
        return max(1, len(config.networks))

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """See Protocol Network."""
        config = request.config
        self.check(config)
        ipam.check_ports(config, held)
        names.check_networks(self._mark, config.networks, held)
        return NetworkAttachment(
            model=NetworkModel.BRIDGE,
            vm_id=request.vm_id,
            pod_id=request.pod_id,
            config=config,
            netns_path=namespaces.path_of(request.vm_id),
            endpoints=ipam.place_endpoints(
                self._plan.subnets, request, held, partial(self._endpoint, request)
            ),
            dns=resolver.complete(config.dns, self._settings.dns_servers),
        )

    def _endpoint(
        self, request: NetworkRequest, index: int, network: str | None, part: Slice, place: int
    ) -> Endpoint:
        subnets = self._plan.subnets
        gateways = () if index else zip(subnets.all, subnets.gateways(part), strict=True)
        mac = ipam.mac_of(request.vm_id, index)
        return Endpoint(
            id=f"{request.vm_id}-{index}",
            name=f"eth{index}",
            network=network,
            net_pair=_pair(request.vm_id, index, mac, request.config.interworking),
            host_interface=names.host_interface(request.vm_id, names.HOST_INTERFACES[index]),
            mac=mac,
            addresses=subnets.addresses(place, part),
            routes=tuple(
                Route(destination=DEFAULT_ROUTES[subnet.version], gateway=gateway)
                for subnet, gateway in gateways
            ),
            mtu=self._plan.mtu,
        )

    # -- make ----------------------------------------------------------------------------------------------

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """See Protocol Network."""
        if self._unusable is not None:
            raise UnsupportedError(f"No VM can be connected by a bridge: {self._unusable}")
        macs = [ipam.mac_of(vm_id, index) for index in range(netdev_count)]

        async def make_taps() -> None:
            async with links.here() as netlink:
                for index, mac in enumerate(macs):
                    await interworking.make_tap(netlink, index, self._plan.mtu, mac)

        def set_up() -> None:
            host.quieten_namespace()
            namespaces.here(make_taps)

        async with _limit(timeout_s, f"taps of VM {vm_id}"):
            await namespaces.run_blocking(None, lambda: namespaces.create(vm_id, set_up))
        return NetworkAttachment(
            model=NetworkModel.BRIDGE,
            vm_id=vm_id,
            netns_path=namespaces.path_of(vm_id),
            endpoints=tuple(
                Endpoint(
                    id=f"{vm_id}-{index}",
                    name=f"eth{index}",
                    net_pair=_pair(vm_id, index, mac, Interworking.TC),
                    mac=mac,
                    mtu=self._plan.mtu,
                )
                for index, mac in enumerate(macs)
            ),
        )

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """See Protocol Network."""
        async with _limit(timeout_s, f"network of VM {planned.vm_id}"):
            await self._ensure_table()
            async with self._bridges:
                endpoints = await namespaces.run_blocking(None, lambda: self._make(planned))
            if planned.config.ports and self._nft is not None:
                await self._check_ports(planned.config, self._nft)
                commands = firewall.publish(self._table, planned)
                await self._nft.load(commands, timeout_s=self._settings.nft_timeout_s)
        return (
            planned if endpoints == planned.endpoints else planned.model_copy(update={"endpoints": endpoints})
        )

    async def _check_ports(self, config: NetworkConfig, nft: Nft) -> None:
        """See that no program of the host has one of the ports, and no other node agent has published it.

        Raises:
            FailedPreconditionError: One has.
        """
        await namespaces.run_blocking(None, lambda: listeners.check(config.ports))
        limit_s = self._settings.nft_timeout_s
        for table in await nft.tables(names.TABLE_PREFIX, timeout_s=limit_s):
            if table != self._table:
                firewall.check_published(config, await nft.published(table, timeout_s=limit_s), table)

    def _make(self, planned: NetworkAttachment) -> tuple[Endpoint, ...]:
        """Everything that netlink does for one pod, in one thread: it is at home in both namespaces."""
        outside = links.open_socket()

        async def work() -> tuple[Endpoint, ...]:
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                async with links.over(outside) as netlink, links.here() as inside:
                    return tuple(
                        [
                            await host.attach(
                                netlink,
                                inside,
                                fd,
                                self._plan,
                                endpoint,
                                index,
                                planned.config.interworking,
                                planned.config.rate_mbit,
                            )
                            for index, endpoint in enumerate(planned.endpoints)
                        ]
                    )
            finally:
                os.close(fd)

        def inside() -> tuple[Endpoint, ...]:
            return namespaces.here(work)

        def in_new() -> tuple[Endpoint, ...]:
            host.quieten_namespace()
            return inside()

        try:
            path = namespaces.path_of(planned.vm_id)
            if not namespaces.exists(path):
                return namespaces.create(planned.vm_id, in_new)
            namespaces.enter(path)
            return inside()
        finally:
            outside.close()

    async def _ensure_table(self) -> None:
        """Load the node's table and let the host forward, once in the life of this driver."""
        async with self._table_lock:
            if self._table_ready or self._nft is None:
                return
            settings = self._settings
            if settings.masquerade:
                await asyncio.to_thread(host.enable_forwarding, self._plan.subnets)
            await self._nft.load(self._rules(), timeout_s=settings.nft_timeout_s)
            self._table_ready = True

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """See Protocol Network."""
        if attachment.netns_path is None:
            return ()
        pairs = [e.net_pair for e in attachment.endpoints if e.net_pair is not None]
        return await interworking.open_taps(attachment.netns_path, pairs)

    # -- unmake --------------------------------------------------------------------------------------------

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network."""
        async with _limit(timeout_s, f"removal of the network of VM {attachment.vm_id}"):
            if self._nft is not None and (attachment.config.ports or attachment.pod_id is None):
                await self._withdraw(attachment.vm_id)
            bridges = await namespaces.run_blocking(None, lambda: self._unmake(attachment))
            if bridges:
                await self._remove_bridges(bridges)

    def _unmake(self, attachment: NetworkAttachment) -> list[str]:
        async def work() -> list[str]:
            async with links.here() as netlink:
                return await host.detach(netlink, self._plan, attachment.vm_id, attachment.endpoints)

        bridges = namespaces.here(work)
        namespaces.remove(attachment.vm_id)
        return bridges

    async def _withdraw(self, vm_id: str) -> None:
        if self._nft is None:
            return
        limit_s = self._settings.nft_timeout_s
        async with self._table_lock:
            published = await self._nft.published(self._table, timeout_s=limit_s)
            commands = firewall.withdraw(self._table, (p for p in published if p.vm_id == vm_id))
            await self._nft.load(commands, timeout_s=limit_s)

    async def _remove_bridges(self, bridges: Sequence[str]) -> None:
        """Remove bridges of networks with a name that nobody uses any more."""

        async def work() -> None:
            async with links.here() as netlink:
                for name in dict.fromkeys(bridges):
                    await host.remove_bridge(netlink, name)

        async with self._bridges:
            await namespaces.run(None, work)

    # -- recover and audit ---------------------------------------------------------------------------------

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See Protocol Network: bridges and ports are made again where they are gone."""
        if attachment.netns_path is None or not namespaces.exists(attachment.netns_path):
            raise NetworkError(f"The network namespace of VM {attachment.vm_id} is gone.")

        async def work() -> list[str]:
            async with links.here() as netlink:
                return [
                    str(endpoint.host_interface)
                    for endpoint in attachment.endpoints
                    if not await host.rejoin(netlink, self._plan, endpoint)
                ]

        if self._former is not None:
            raise NetworkError(f"The network of VM {attachment.vm_id} is left as it is: {self._former}")
        async with _limit(timeout_s, f"network of VM {attachment.vm_id}"):
            await self._ensure_table()
            async with self._bridges:
                missing = await namespaces.run(None, work)
            if attachment.config.ports and self._nft is not None:
                commands = firewall.publish(self._table, attachment)
                await self._nft.load(commands, timeout_s=self._settings.nft_timeout_s)
        if missing:
            raise NetworkError(
                f"VM {attachment.vm_id} has lost {', '.join(missing)}; stop and start its pod."
            )

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable: namespaces, interfaces at the host's end, bridges, published ports.

        What is inside a namespace (taps, qdiscs, filters) goes with it.
        """

        async def look() -> list[links.Link]:
            async with links.here() as netlink:
                return await links.every(netlink)

        found: list[Held] = []
        for link in await namespaces.run(None, look):
            if (vm_id := names.vm_of(link.name, mark)) is not None:
                found.append(Held("link", link.name, vm_id))
            elif self._is_bridge(link):
                found.append(Held("link", link.name, None))
        found += [Held("namespace", namespaces.path_of(name), name) for name in namespaces.names(mark)]
        if self._nft is not None and os.geteuid() == 0:
            published = await self._nft.published(self._table, timeout_s=self._settings.nft_timeout_s)
            ports = {f"{p.map[:3]} port {p.port}": p.vm_id for p in published}
            found += [Held("rule", name, vm_id) for name, vm_id in ports.items()]
        return found

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable: with one thing of a VM, all that it has is removed."""
        if held.vm_id is not None:
            known = NetworkAttachment(model=NetworkModel.BRIDGE, vm_id=held.vm_id)
            await self.detach(known, timeout_s=timeout_s)


def _pair(vm_id: str, index: int, mac: str, mode: Interworking) -> NetworkInterfacePair:
    """The pair as `interworking.wire` makes it."""
    return NetworkInterfacePair(
        id=f"{vm_id}-{index}",
        interworking=mode,
        name=interworking.bridge_name(index) if mode is Interworking.BRIDGED else None,
        virt_iface=NetworkInterface(name=f"eth{index}", hard_addr=mac),
        tap_iface=NetworkInterface(
            name=interworking.tap_name(index),
            hard_addr=mac if mode is Interworking.MACVTAP else interworking.tap_mac(mac),
        ),
    )


def _limit(timeout_s: float, what: str) -> AbstractAsyncContextManager[None]:
    late = NetworkError(f"The {what} took longer than {timeout_s:g} s.")
    return deadline_as(timeout_s, lambda: late)
