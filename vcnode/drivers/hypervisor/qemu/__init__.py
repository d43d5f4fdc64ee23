"""The QEMU driver: one small ``microvm`` per pod."""

from vcnode.drivers.hypervisor.qemu.driver import Guest, QemuHypervisor
from vcnode.drivers.hypervisor.qemu.vm import QemuVm

__all__ = ["Guest", "QemuHypervisor", "QemuVm"]
