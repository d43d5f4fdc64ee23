"""Plugging disks into a running VM, over QMP.

A disk is a block node (``n-<disk_id>``) and a SCSI device (``<disk_id>``) on it.
Source: QEMU qapi/block-core.json, qapi/qdev.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Coroutine, Mapping
from typing import Any

from vcnode.aio import finish
from vcnode.drivers.hypervisor.qemu import words
from vcnode.drivers.hypervisor.qemu.argv import SCSI_BUS
from vcnode.drivers.hypervisor.qemu.qmp import CommandRefusedError, QmpSession
from vcnode.errors import FailedPreconditionError, HypervisorError, InvalidArgumentError
from vcnode.models.vm import VOLUME_DISK, Disk

DISK_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
"""At most 20 characters: that much of a serial fits into the SCSI page in which the guest looks for it."""
COMMAND_LIMIT_S = 30.0
"""Most that one QMP command may take, whatever the caller's limit."""
UNDO_LIMIT_S = 5.0

log = logging.getLogger(__name__)


def node_name(disk_id: str) -> str:
    """The block node of a disk."""
    return f"n-{disk_id}"


def blockdev_arguments(disk: Disk, filename: str | None = None) -> dict[str, object]:
    """Arguments of ``blockdev-add``. What a guest discards on a writable disk becomes a hole in its file.

    *filename* is what QEMU opens, if not the disk's path.
    """
    common = {"read-only": disk.read_only, "discard": "ignore" if disk.read_only else "unmap"}
    return {
        "driver": "raw",
        "node-name": node_name(disk.disk_id),
        **common,
        "file": {"driver": "file", "filename": filename or disk.path, **common},
    }


def device_arguments(disk: Disk) -> dict[str, object]:
    """Arguments of ``device_add``; QEMU chooses the SCSI address, the guest goes by the serial."""
    return {
        "driver": "scsi-hd",
        "id": disk.disk_id,
        "bus": SCSI_BUS,
        "drive": node_name(disk.disk_id),
        "serial": disk.disk_id,
    }


def _opaque(disk_id: str) -> str:
    """What QEMU keeps beside a disk's descriptor: by it a later node agent finds it again."""
    return f"disk {disk_id}"


class Disks:
    """The disks of one VM.

    Args:
        vm_id: For messages.
        qmp: The session.
        by_descriptor: Whether QEMU may open no file itself, and gets each disk as a descriptor.
    """

    def __init__(self, vm_id: str, qmp: QmpSession, *, by_descriptor: bool = False) -> None:
        self._by_descriptor = by_descriptor
        self._vm_id = vm_id
        self._qmp = qmp
        self._lock = asyncio.Lock()  # one change at a time: an undo must not meet its own repetition
        self._deleted: dict[str, asyncio.Event] = {}

    def on_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Take notice of a QMP event."""
        if name == "DEVICE_DELETED" and (waiting := self._deleted.get(str(data.get("device")))):
            waiting.set()

    async def attach(self, disk: Disk) -> None:
        """Plug *disk* in; the caller bounds it.

        Raises:
            InvalidArgumentError: Not an id that fits a serial.
            FailedPreconditionError: Another VM has the file.
            HypervisorError: QEMU refused (an attached id among the reasons), or is gone; nothing stays,
                unless QEMU does not answer the undo either, which is logged.
        """
        if not DISK_ID.fullmatch(disk.disk_id):
            raise InvalidArgumentError.field(
                "disk_id", f"{disk.disk_id!r} is not 1 to 20 letters, digits, '-' and '_', a letter first"
            )
        async with self._lock:
            try:
                filename = await self._hand_over(disk) if self._has_descriptor(disk.disk_id) else None
                await self._execute("blockdev-add", blockdev_arguments(disk, filename))
                await self._execute("device_add", device_arguments(disk))
            except CommandRefusedError as exc:
                if exc.command == "device_add":
                    await self._undo(self._remove_node(disk.disk_id), disk)
                elif exc.command == "blockdev-add" and self._has_descriptor(disk.disk_id):
                    await self._undo(self._take_back(disk.disk_id), disk)
                if words.is_locked(exc.words):
                    raise FailedPreconditionError(
                        f"Disk {disk.disk_id} of VM {self._vm_id} is in use by another VM or program; stop "
                        "that first, or use a copy.",
                        disk_id=disk.disk_id,
                    ) from exc
                raise
            except BaseException:
                # Not refused, but unanswered: either step may have been carried out.
                await self._undo(self._remove(disk.disk_id), disk)
                raise

    async def detach(self, disk_id: str) -> None:
        """Unplug a disk; the caller bounds it. Succeeds if it is not there, and finishes a half-done one."""
        async with self._lock:
            await self._remove(disk_id)

    async def _undo(self, work: Coroutine[Any, Any, None], disk: Disk) -> None:
        try:
            await finish(work, timeout_s=UNDO_LIMIT_S)
        except (HypervisorError, TimeoutError) as exc:
            log.warning("Disk %s may be left in VM %s: %r", disk.disk_id, self._vm_id, exc)

    async def _remove(self, disk_id: str) -> None:
        gone = self._deleted[disk_id] = asyncio.Event()
        try:
            try:
                await self._execute("device_del", {"id": disk_id})
            except CommandRefusedError as exc:
                # A device that is on its way out refuses a second device_del; its event still comes.
                if exc.error_class == "DeviceNotFound" or not await self._has_device(disk_id):
                    gone.set()
            await gone.wait()
        finally:
            del self._deleted[disk_id]
        await self._remove_node(disk_id)

    async def _remove_node(self, disk_id: str) -> None:
        try:
            await self._execute("blockdev-del", {"node-name": node_name(disk_id)})
        except CommandRefusedError:
            # QEMU has one error class for "no such node" and "in use": ask which it was.
            nodes = await self._execute("query-named-block-nodes", {"flat": True})
            if any(node.get("node-name") == node_name(disk_id) for node in nodes):
                raise
        if self._has_descriptor(disk_id):
            await self._take_back(disk_id)

    def _has_descriptor(self, disk_id: str) -> bool:
        """Whether QEMU got the disk as a descriptor; what is a pod's volume it always did."""
        return self._by_descriptor or disk_id.startswith(VOLUME_DISK)

    async def _hand_over(self, disk: Disk) -> str:
        """Give QEMU the disk's file as a descriptor; what it opens to have it."""
        flags = os.O_CLOEXEC | (os.O_RDONLY if disk.read_only else os.O_RDWR)
        try:
            fd = os.open(disk.path, flags) if disk.fd is None else os.dup(disk.fd)
        except OSError as exc:
            raise HypervisorError(f"Disk {disk.disk_id} of VM {self._vm_id} cannot be opened.") from exc
        try:
            number = await self._qmp.add_fd(fd, _opaque(disk.disk_id), timeout_s=COMMAND_LIMIT_S)
        finally:
            os.close(fd)
        return f"/dev/fdset/{number}"

    async def _take_back(self, disk_id: str) -> None:
        """Let QEMU forget the descriptor of a disk, if it has one."""
        sets = await self._execute("query-fdsets", {})
        for each in sets:
            if any(fd.get("opaque") == _opaque(disk_id) for fd in each.get("fds", ())):
                with contextlib.suppress(
                    CommandRefusedError
                ):  # its last user closed it, and it was gone then
                    await self._execute("remove-fd", {"fdset-id": each["fdset-id"]})

    async def _has_device(self, disk_id: str) -> bool:
        devices = await self._execute("qom-list", {"path": "/machine/peripheral"})
        return any(device.get("name") == disk_id for device in devices)

    async def _execute(self, command: str, arguments: Mapping[str, object]) -> Any:
        return await self._qmp.execute(command, arguments, timeout_s=COMMAND_LIMIT_S)
