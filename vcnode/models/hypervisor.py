"""How the VM of a pod is built and what it boots, as callers describe it."""

from __future__ import annotations

from enum import StrEnum


class MachineType(StrEnum):
    """Machines that QEMU makes."""

    MICROVM = "microvm"
    """x86_64: virtio-mmio, no PCI, no firmware to speak of."""
    Q35 = "q35"
    """x86_64: PCI, and firmware that starts from disks."""
    VIRT = "virt"
    """aarch64: PCI."""


class DiskFormat(StrEnum):
    """What a disk image holds."""

    RAW = "raw"
    """The disk, byte by byte."""
    QCOW2 = "qcow2"
    """QEMU's own format."""
