"""Network devices of a VM, from the taps of its network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping

from vcnode.drivers.base import Network
from vcnode.models.network import NetworkModel
from vcnode.models.vm import NetDev, NetworkAttachment


@contextlib.asynccontextmanager
async def netdevs(network: Network, attachment: NetworkAttachment) -> AsyncIterator[tuple[NetDev, ...]]:
    """The devices of an attachment, with taps that are open inside the block: for the launch of its VM."""
    taps = await network.open_taps(attachment)
    try:
        yield tuple(NetDev(tap_fd=fd, mac=e.mac) for fd, e in zip(taps, attachment.endpoints, strict=True))
    finally:
        for fd in taps:
            os.close(fd)


def preparer(
    networks: Mapping[NetworkModel, Network], default: NetworkModel, *, with_taps: bool
) -> Network | None:
    """The driver that makes the networks of VMs without a pod, the node's own first; None: there is none."""
    others = (networks[model] for model in NetworkModel if model in networks)
    offered = [networks[default], *others] if default in networks else list(others)
    for network in offered:
        if "spares" in network.info.capabilities and not (
            with_taps and network.info.type == NetworkModel.NOOP
        ):
            return network
    return None
