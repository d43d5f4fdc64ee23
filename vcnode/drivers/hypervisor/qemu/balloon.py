"""The balloon of one VM: memory that its guest gives back, and may have again.

Source: QEMU qapi/machine.json, ``balloon``, ``query-balloon``, BALLOON_CHANGE (at most one a second); virtio
1.2, 5.5. The guest's driver takes pages without pressing others out (drivers/virtio/virtio_balloon.c,
``__GFP_NORETRY``): where none are left it stops, and tries again each 200 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from vcnode.drivers.hypervisor.qemu.qmp import QmpSession
from vcnode.errors import FailedPreconditionError


class Balloon:
    """Sets how much memory the guest has.

    Args:
        vm_id: For messages.
        qmp: Session with its QEMU.
    """

    def __init__(self, vm_id: str, qmp: QmpSession) -> None:
        self._vm_id = vm_id
        self._qmp = qmp
        self._changed = asyncio.Event()

    def on_event(self, name: str) -> None:
        """Take notice of a QMP event."""
        if name == "BALLOON_CHANGE":
            self._changed.set()

    async def set(self, mem_size_mib: int, *, timeout_s: float) -> None:
        """See `vcnode.drivers.base.Vm.set_memory`."""
        wanted = mem_size_mib << 20
        actual = 0
        try:
            async with asyncio.timeout(timeout_s):
                await self._qmp.execute("balloon", {"value": wanted}, timeout_s=timeout_s)
                while True:
                    self._changed.clear()
                    actual = await self._actual(timeout_s)
                    if actual == wanted:
                        return
                    await self._changed.wait()
        except TimeoutError as exc:
            raise FailedPreconditionError(
                f"The guest of VM {self._vm_id} has {actual >> 20} MiB after {timeout_s:g} s, not "
                f"{mem_size_mib}: it cannot give back what it uses.",
                actual_mib=actual >> 20,
            ) from exc

    async def _actual(self, timeout_s: float) -> int:
        """Bytes that the guest has."""
        found: Mapping[str, Any] = await self._qmp.execute("query-balloon", timeout_s=timeout_s)
        return int(found["actual"])
