"""Addresses and ports of pods: chosen from what the records of the others say. Pure.

There is no table of leases: an address is taken as long as the record of a pod has it, and both are written
in one transaction. All subnets of the node are numbered alike, by *places*: a pod has the same place in each.

::

    places   0 ──────────── half ──────────────────────── all
             the node's own │ a slice for each network that has a name
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vcnode.errors import FailedPreconditionError, ResourceExhaustedError
from vcnode.models.network import Endpoint, NetworkConfig, NetworkModel
from vcnode.models.vm import NetworkAttachment, NetworkRequest

MAX_BITS = 20
SLICE_BITS = 8
"""Places of a network with a name: 2 to the power of this."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The places of one network. The first is none, the second the gateway's, the last the broadcast's."""

    base: int
    bits: int

    @property
    def gateway(self) -> int:
        """The host's place."""
        return self.base + 1

    @property
    def pods(self) -> range:
        """Places for pods."""
        return range(self.base + 2, self.base + (1 << self.bits) - 1)


@dataclass(frozen=True, slots=True)
class Subnets:
    """The subnets from which pods get their addresses; at least one."""

    v4: ipaddress.IPv4Network | None
    v6: ipaddress.IPv6Network | None

    @property
    def all(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """Those that there are."""
        return tuple(subnet for subnet in (self.v4, self.v6) if subnet is not None)

    @property
    def bits(self) -> int:
        """Binary digits of a place."""
        return min(MAX_BITS, *(subnet.max_prefixlen - subnet.prefixlen for subnet in self.all))

    def addresses(self, place: int, of: Slice) -> tuple[str, ...]:
        """Addresses of the pod at that place of a network, with prefix length."""
        return tuple(f"{subnet[place]}/{subnet.max_prefixlen - of.bits}" for subnet in self.all)

    def knows(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
        """Whether it is one that pods get now: the node's own, or that of a slice."""
        for subnet in (s for s in self.all if network.network_address in s):
            own = network.network_address == subnet.network_address
            return subnet.max_prefixlen - network.prefixlen == (self.bits - 1 if own else self._slice_bits)
        return False

    @property
    def _slice_bits(self) -> int:
        """Binary digits of a place in a network with a name."""
        return min(SLICE_BITS, self.bits - 1)

    def gateways(self, of: Slice) -> tuple[str, ...]:
        """The host's addresses in a network."""
        return tuple(str(subnet[of.gateway]) for subnet in self.all)

    def slice_of(self, network: str | None, held: Sequence[NetworkAttachment]) -> Slice:
        """The places of a network: those that its pods have, or some that no network has.

        Raises:
            ResourceExhaustedError: There are too many networks.
        """
        half = 1 << (self.bits - 1)
        if network is None:
            return Slice(0, self.bits - 1)
        size = self._slice_bits
        count = half >> size
        used: set[int] = set()
        for name, place in self._taken(held):
            number = (place - half) >> size
            if name == network:
                return Slice(half + (number << size), size)
            used.add(number)
        start = _hash(network) % count
        for step in range(count):
            number = (start + step) % count
            if number not in used:
                return Slice(half + (number << size), size)
        raise ResourceExhaustedError(
            f"The node has {count} networks, which is all that its subnets hold;"
            " give it larger ones ([bridge] in its settings).",
            limit=count,
        )

    def choose(self, vm_id: str, of: Slice, held: Sequence[NetworkAttachment]) -> int:
        """A free place in a network, likely not one that was freed just now.

        Raises:
            ResourceExhaustedError: There is none.
        """
        taken = {place for _, place in self._taken(held)}
        count = len(of.pods)
        start = _hash(vm_id)
        for step in range(count):
            place = of.pods[(start + step) % count]
            if place not in taken:
                return place
        raise ResourceExhaustedError(
            f"The network has {count} pods, which is all that its subnet holds;"
            " give the node larger ones ([bridge] in its settings).",
            limit=count,
        )

    def _taken(self, held: Sequence[NetworkAttachment]) -> Iterator[tuple[str | None, int]]:
        """Network and place of each interface in these subnets."""
        for endpoint in (e for attachment in held for e in attachment.endpoints):
            for text in endpoint.addresses:
                address = ipaddress.ip_interface(text).ip
                for subnet in self.all:
                    if address in subnet:
                        yield endpoint.network, int(address) - int(subnet.network_address)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def place_endpoints(
    subnets: Subnets,
    request: NetworkRequest,
    held: Sequence[NetworkAttachment],
    make: Callable[[int, str | None, Slice, int], Endpoint],
) -> tuple[Endpoint, ...]:
    """An endpoint for each network of the request, at places that nobody has.

    Args:
        subnets: Where the places are.
        request: The pod.
        held: What the other pods have.
        make: Makes the endpoint, of its number, network, the network's places, and its own.

    Raises:
        ResourceExhaustedError: There are not enough places, or networks.
    """
    endpoints: list[Endpoint] = []
    for index, network in enumerate(request.config.networks or (None,)):
        so_far = NetworkAttachment(model=NetworkModel.BRIDGE, vm_id=request.vm_id, endpoints=tuple(endpoints))
        others = [*held, so_far]
        part = subnets.slice_of(network, others)
        endpoints.append(make(index, network, part, subnets.choose(request.vm_id, part, others)))
    return tuple(endpoints)


def check_ports(config: NetworkConfig, held: Sequence[NetworkAttachment]) -> None:
    """See that no other pod has published one of the ports.

    Raises:
        FailedPreconditionError: One has; names it.
    """
    taken = {
        (port.host, port.protocol): attachment.pod_id
        for attachment in held
        for port in attachment.config.ports
    }
    for index, port in enumerate(config.ports):
        if (owner := taken.get((port.host, port.protocol))) is not None:
            raise FailedPreconditionError(
                f"pod.network.ports[{index}].host: {port.protocol} port {port.host} is pod {owner}'s.",
                field=f"pod.network.ports[{index}].host",
                pod_id=owner,
            )


def mac_of(vm_id: str, index: int) -> str:
    """The MAC of a VM's interface: locally administered, the same each time, unlike any other's."""
    digest = hashlib.sha256(f"{vm_id}/{index}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))
