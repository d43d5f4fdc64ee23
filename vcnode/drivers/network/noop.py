"""No network: the guest has its loopback and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from vcnode.drivers.faults import FaultPlan
from vcnode.errors import InvalidArgumentError
from vcnode.models.network import NetworkConfig, NetworkModel
from vcnode.models.node import DriverInfo
from vcnode.models.vm import NetworkAttachment, NetworkRequest


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
        """``spares``: there is nothing to make for one."""
        return DriverInfo(type=NetworkModel.NOOP, capabilities=("spares",))

    async def open(self) -> None:
        """Nothing to look for."""

    async def close(self) -> None:
        """Nothing to free."""

    def check(self, config: NetworkConfig) -> None:
        """Nothing but name resolution (for names in /etc/hosts) can be asked for."""
        for field in ("networks", "netns_path", "ports", "rate_mbit"):
            if getattr(config, field) != getattr(NetworkConfig(), field):
                raise InvalidArgumentError.field(
                    f"pod.network.{field}", "does not go with network_model noop, which has no interface"
                )

    def netdev_count(self, config: NetworkConfig) -> int:
        """None at all."""
        return 0

    def plan(self, request: NetworkRequest, held: Sequence[NetworkAttachment]) -> NetworkAttachment:
        """An attachment without namespace and endpoints."""
        self.check(request.config)
        return NetworkAttachment(
            model=NetworkModel.NOOP,
            vm_id=request.vm_id,
            pod_id=request.pod_id,
            config=request.config,
            dns=request.config.dns,
        )

    async def prepare(self, vm_id: str, netdev_count: int, *, timeout_s: float) -> NetworkAttachment:
        """An attachment without namespace and endpoints."""
        await self._hit("prepare", vm_id)
        return NetworkAttachment(model=NetworkModel.NOOP, vm_id=vm_id)

    async def attach(self, planned: NetworkAttachment, *, timeout_s: float) -> NetworkAttachment:
        """Nothing to make."""
        await self._hit("attach", planned.vm_id)
        return planned

    async def open_taps(self, attachment: NetworkAttachment) -> Sequence[int]:
        """No descriptors."""
        await self._hit("open_taps")
        return ()

    async def detach(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Nothing to remove."""
        await self._hit("detach")

    async def recover(self, attachment: NetworkAttachment, *, timeout_s: float) -> None:
        """Nothing to mend."""
        await self._hit("recover")
