"""A network that only pretends: addresses, ports and endpoints as the bridge gives them, and no packet."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from functools import partial

from vcnode.drivers.audit import Held
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.network import ipam
from vcnode.drivers.network.ipam import Slice, Subnets
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NetworkError
from vcnode.models.network import (
    Endpoint,
    NetworkConfig,
    NetworkInterface,
    NetworkInterfacePair,
    NetworkModel,
    Route,
)
from vcnode.models.node import DriverInfo
from vcnode.models.vm import NetworkAttachment, NetworkRequest

_CAPABILITIES = {
    NetworkModel.BRIDGE: ("masquerade", "ports", "rate_mbit", "spares"),
    NetworkModel.CNI: ("ports", "rate_mbit"),
    NetworkModel.CNM: (),
}
_SUBNETS = Subnets(ipaddress.IPv4Network("10.119.0.0/16"), None)


class MockNetwork:
    """`vcnode.drivers.base.Network` in memory.

    Args:
        faults: What goes wrong.
        made: By VM, what exists; given, it outlives the driver as a host outlives a node agent.
        model: The driver that it stands for.
        subnets: From which pods get their addresses.
    """

    def __init__(
        self,
        faults: FaultPlan,
        *,
        made: dict[str, NetworkAttachment] | None = None,
        model: NetworkModel = NetworkModel.BRIDGE,
        subnets: Subnets = _SUBNETS,
    ) -> None:
        self._faults = faults
        self._model = model
        self._subnets = subnets
        self.made = {} if made is None else made

    @property
    def info(self) -> DriverInfo:
        """As that of the driver it stands for, where everything works."""
        return DriverInfo(type=self._model, capabilities=_CAPABILITIES[self._model], mock=True)

    async def open(self) -> None:
        """Nothing to look for."""

    async def close(self) -> None:
        """Nothing to free."""

    def check(self, config: NetworkConfig) -> None:
        """A namespace is given for ``cnm``, and for nothing else."""
        if self._model is not NetworkModel.CNM:
            if config.netns_path is not None:
                raise InvalidArgumentError.field("pod.network.netns_path", "goes with network_model cnm only")
            return
        if config.netns_path is None:
            raise InvalidArgumentError.field("pod.network.netns_path", "must be given with network_model cnm")
        for field in ("networks", "ports", "rate_mbit"):
            if getattr(config, field) != getattr(NetworkConfig(), field):
                raise InvalidArgumentError.field(f"pod.network.{field}", "does not go with network_model cnm")

    def netdev_count(self, config: NetworkConfig) -> int:
        """One for each network."""
        return max(1, len(config.networks))

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """Addresses of the subnet, one place per network."""
        config = request.config
        self.check(config)
        ipam.check_ports(config, held)
        for other in held:
            if config.netns_path is not None and other.netns_path == config.netns_path:
                raise FailedPreconditionError(
                    f"pod.network.netns_path: namespace {config.netns_path} is pod {other.pod_id}'s."
                )
        endpoints = ipam.place_endpoints(self._subnets, request, held, partial(self._endpoint, request))
        return NetworkAttachment(
            model=self._model,
            vm_id=request.vm_id,
            pod_id=request.pod_id,
            config=config,
            netns_path=config.netns_path or f"/netns/{request.vm_id}",
            netns_created=config.netns_path is None,
            endpoints=endpoints,
            dns=config.dns,
        )

    def _endpoint(
        self, request: NetworkRequest, index: int, network: str | None, part: Slice, place: int
    ) -> Endpoint:
        mac = ipam.mac_of(request.vm_id, index)
        pair = NetworkInterfacePair(
            id=f"{request.vm_id}-{index}",
            interworking=request.config.interworking,
            virt_iface=NetworkInterface(name=f"eth{index}", hard_addr=mac),
            tap_iface=NetworkInterface(name=f"tap{index}", hard_addr=mac),
        )
        return Endpoint(
            id=pair.id,
            name=f"eth{index}",
            network=network,
            net_pair=pair,
            host_interface=f"v{index}-{request.vm_id[3:]}",
            mac=mac,
            addresses=self._subnets.addresses(place, part),
            routes=tuple(Route(destination="0.0.0.0/0", gateway=g) for g in self._subnets.gateways(part))
            if index == 0
            else (),
        )

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """Namespace and taps of a VM that is nobody's yet."""
        await self._faults.hit("network.prepare", vm_id=vm_id)
        endpoints = tuple(
            Endpoint(id=f"{vm_id}-{index}", name=f"eth{index}", mac=ipam.mac_of(vm_id, index))
            for index in range(netdev_count)
        )
        attachment = NetworkAttachment(
            model=self._model, vm_id=vm_id, netns_path=f"/netns/{vm_id}", endpoints=endpoints
        )
        self.made[vm_id] = attachment
        return attachment

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """Remember that it is there."""
        await self._faults.hit("network.attach", vm_id=planned.vm_id)
        self.made[planned.vm_id] = planned
        return planned

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """Descriptors of /dev/null."""
        await self._faults.hit("network.open_taps")
        if attachment.vm_id not in self.made:
            raise NetworkError(f"VM {attachment.vm_id} has no taps.")
        return [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) for _ in attachment.endpoints]

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Forget it."""
        await self._faults.hit("network.detach")
        self.made.pop(attachment.vm_id, None)

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """See that it is there."""
        await self._faults.hit("network.recover")
        if attachment.vm_id not in self.made:
            raise NetworkError(f"The network of VM {attachment.vm_id} is gone.")

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable."""
        await self._faults.hit("network.held")
        return [
            Held("link", f"tap-{vm_id}", vm_id)
            for vm_id, attachment in self.made.items()
            if vm_id.startswith(mark) and attachment.model is self._model
        ]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable."""
        await self._faults.hit("network.free")
        self.made.pop(held.vm_id or "", None)
