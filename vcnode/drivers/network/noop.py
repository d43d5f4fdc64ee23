"""No network: the guest has its loopback and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from vcnode.models.node import DriverInfo
from vcnode.models.pod import NetworkModel
from vcnode.models.vm import NetworkAttachment


class NoopNetwork:
    """`vcnode.drivers.base.Network` that makes nothing, so there is nothing to fail and nothing to undo."""

    @property
    def info(self) -> DriverInfo:
        """No capabilities."""
        return DriverInfo(type=NetworkModel.NOOP)

    async def attach(self, pod_id: str, vm_id: str, *, timeout_s: float) -> NetworkAttachment:
        """An attachment without namespace and endpoints."""
        return NetworkAttachment(model=NetworkModel.NOOP)

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """No descriptors."""
        return ()

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Nothing to remove."""
