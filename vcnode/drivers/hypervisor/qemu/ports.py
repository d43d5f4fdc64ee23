"""Plugging serial ports into a running VM, over QMP, each with a UNIX socket of the host behind it.

A port is a character device (``sock-<id>``) and a device on the virtio-serial bus (``port-<id>``): the
prefixes keep what callers name apart from what is QEMU's or ours.

Source: QEMU qapi/char.json, qapi/qdev.json.
"""

from __future__ import annotations

import logging

from vcnode.aio import finish
from vcnode.drivers.hypervisor.qemu.argv import SERIAL_BUS
from vcnode.drivers.hypervisor.qemu.qmp import CommandRefusedError, QmpSession
from vcnode.errors import HypervisorError
from vcnode.models.vm import Port

COMMAND_LIMIT_S = 10.0
"""Most that one QMP command may take, whatever the caller's limit."""

log = logging.getLogger(__name__)


def chardev_arguments(port: Port) -> dict[str, object]:
    """Arguments of ``chardev-add``, for the descriptor that QEMU knows by the chardev's name."""
    name = f"sock-{port.chardev_id}"
    socket: dict[str, object] = {"addr": {"type": "fd", "data": {"str": name}}, "server": port.listens}
    if port.listens:
        socket["wait"] = False
    return {"id": name, "backend": {"type": "socket", "data": socket}}


def device_arguments(port: Port) -> dict[str, object]:
    """Arguments of ``device_add``."""
    return {
        "driver": "virtserialport",
        "id": f"port-{port.port_id}",
        "bus": SERIAL_BUS,
        "chardev": f"sock-{port.chardev_id}",
        "name": port.name,
    }


async def attach(vm_id: str, qmp: QmpSession, port: Port) -> None:
    """Plug *port* in; the caller bounds it. Raises as `vcnode.drivers.base.Vm.attach_port`."""
    name = f"sock-{port.chardev_id}"
    await qmp.give_fd(port.fd, name, timeout_s=COMMAND_LIMIT_S)
    try:
        await qmp.execute("chardev-add", chardev_arguments(port), timeout_s=COMMAND_LIMIT_S)
    except CommandRefusedError:
        await _undo(vm_id, qmp, "closefd", {"fdname": name})
        raise
    try:
        await qmp.execute("device_add", device_arguments(port), timeout_s=COMMAND_LIMIT_S)
    except CommandRefusedError:
        await _undo(vm_id, qmp, "chardev-remove", {"id": name})
        raise


async def _undo(vm_id: str, qmp: QmpSession, command: str, arguments: dict[str, object]) -> None:
    work = qmp.execute(command, arguments, timeout_s=COMMAND_LIMIT_S)
    try:
        await finish(work, timeout_s=COMMAND_LIMIT_S)
    except HypervisorError as exc:  # a descriptor that chardev-add has used up, for one
        log.debug("%s of VM %s: %s", command, vm_id, exc)
