"""Addresses and ports of pods: chosen from what the records of the others say. Pure.

There is no table of leases: an address is taken as long as the record of a pod has it, and both are
written in one transaction. A pod has the same place in every subnet, so one free place is all to look for.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vcnode.errors import FailedPreconditionError, ResourceExhaustedError
from vcnode.models.network import NetworkConfig
from vcnode.models.vm import NetworkAttachment

MAX_PLACES = 1 << 20
FIRST_PLACE = 2
"""0 is the subnet itself, 1 its gateway."""


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
    def gateways(self) -> tuple[str, ...]:
        """The host's address in each."""
        return tuple(str(subnet[1]) for subnet in self.all)

    def addresses(self, place: int) -> tuple[str, ...]:
        """Addresses of the pod at that place, with prefix length."""
        return tuple(f"{subnet[place]}/{subnet.prefixlen}" for subnet in self.all)

    def places(self) -> int:
        """How many there are, subnet and broadcast address included."""
        return min(MAX_PLACES, *(subnet.num_addresses for subnet in self.all))

    def choose(self, vm_id: str, count: int, held: Sequence[NetworkAttachment]) -> tuple[int, ...]:
        """*count* free places, far from those that were freed last.

        Raises:
            ResourceExhaustedError: There are not as many.
        """
        taken = {place for attachment in held for place in self._taken(attachment)}
        size = self.places() - 1 - FIRST_PLACE  # but the last, which is the broadcast address of IPv4
        start = int.from_bytes(hashlib.sha256(vm_id.encode()).digest()[:8], "big") % max(1, size)
        chosen: list[int] = []
        for step in range(size):
            if len(chosen) == count:
                break
            place = FIRST_PLACE + (start + step) % size
            if place not in taken:
                chosen.append(place)
        if len(chosen) < count:
            raise ResourceExhaustedError(
                f"No address is left for a pod: {', '.join(str(s) for s in self.all)} holds {max(0, size)};"
                " give the node a larger subnet ([bridge] in its settings).",
                limit=max(0, size),
            )
        return tuple(chosen)

    def _taken(self, attachment: NetworkAttachment) -> Iterator[int]:
        for endpoint in attachment.endpoints:
            for text in endpoint.addresses:
                address = ipaddress.ip_interface(text).ip
                for subnet in self.all:
                    if address in subnet:
                        yield int(address) - int(subnet.network_address)


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
