"""Saving and restoring a VM's state without its memory, which stays in a file of its own.

Descriptors are used throughout: QEMU's sandbox lets it start no process, as ``exec:`` would.
Source: QEMU qapi/migration.json (``x-ignore-shared``, ``events``, event MIGRATION); migration/fd.c, where
an outgoing ``fd:`` takes names only, an incoming one numbers of inherited descriptors as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from vcnode.drivers.hypervisor.qemu.qmp import QmpSession
from vcnode.errors import HypervisorError

_ENDED = frozenset({"completed", "failed", "cancelled"})


class Migration:
    """QEMU's migration of one VM.

    Args:
        vm_id: For messages.
        qmp: Session with the VM.
    """

    def __init__(self, vm_id: str, qmp: QmpSession) -> None:
        self._vm_id = vm_id
        self._qmp = qmp
        self._status = ""
        self._ended = asyncio.Event()

    def on_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Take notice of a QMP event."""
        if name == "MIGRATION":
            self._status = str(data.get("status"))
            if self._status in _ENDED:
                self._ended.set()

    async def save(self, fd: int, *, timeout_s: float) -> None:
        """Stop the vCPUs and write the state to *fd*, a descriptor of ours. Raises HypervisorError."""
        await self._qmp.execute("stop", timeout_s=timeout_s)
        await self._qmp.give_fd(fd, "state", timeout_s=timeout_s)
        await self._run("migrate", "fd:state", timeout_s)

    async def restore(self, fd: int, *, timeout_s: float) -> None:
        """Read the state from *fd*, which QEMU inherited, and let the vCPUs run. Raises HypervisorError."""
        await self._run("migrate-incoming", f"fd:{fd}", timeout_s)
        await self._qmp.execute("cont", timeout_s=timeout_s)

    async def _run(self, command: str, uri: str, timeout_s: float) -> None:
        self._ended.clear()
        capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        await self._qmp.execute(
            "migrate-set-capabilities", {"capabilities": capabilities}, timeout_s=timeout_s
        )
        await self._qmp.execute(command, {"uri": uri}, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError as exc:
            raise HypervisorError(
                f"The state of VM {self._vm_id} was not moved within {timeout_s:g} s.", status=self._status
            ) from exc
        if self._status != "completed":
            raise HypervisorError(
                f"QEMU could not move the state of VM {self._vm_id}: {self._status}.", status=self._status
            )
