"""No network: the guest has its loopback and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from vcnode.drivers.faults import FaultPlan
from vcnode.models.node import DriverInfo
from vcnode.models.pod import NetworkModel
from vcnode.models.vm import NetworkAttachment


class NoopNetwork:
    """`vcnode.drivers.base.Network` that makes nothing, so there is nothing to undo.

    Args:
        faults: What goes wrong all the same, for those who test.
    """

    def __init__(self, faults: FaultPlan | None = None) -> None:
        self._faults = faults

    async def _hit(self, operation: str, vm_id: str | None = None) -> None:
        if self._faults is not None:
            await self._faults.hit(f"network.{operation}", vm_id=vm_id)

    @property
    def info(self) -> DriverInfo:
        """No capabilities."""
        return DriverInfo(type=NetworkModel.NOOP)

    async def attach(self, pod_id: str, vm_id: str, *, timeout_s: float) -> NetworkAttachment:
        """An attachment without namespace and endpoints."""
        await self._hit("attach", vm_id)
        return NetworkAttachment(model=NetworkModel.NOOP, vm_id=vm_id)

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """No descriptors."""
        await self._hit("open_taps")
        return ()

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Nothing to remove."""
        await self._hit("detach")
