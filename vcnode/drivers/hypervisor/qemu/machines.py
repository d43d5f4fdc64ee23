"""What the machine types of QEMU have of their own, and which of them an architecture has. Pure."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from vcnode.errors import InvalidArgumentError, UnsupportedError
from vcnode.models.hypervisor import MachineType

Transport = Literal["device", "pci"]


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine type."""

    type: MachineType
    """As ``-machine`` has it."""
    transport: Transport
    """How its virtio devices are wired, as the end of their names says it: ``virtio-net-pci``."""
    console: str
    """Its first serial port, as the kernel calls it."""
    reboot: str | None
    """The kernel's ``reboot=`` for a reset that it can do; None: its own way works."""
    boots_disks: bool
    """Whether its firmware can start from a disk."""
    has_firmware: bool
    """Whether QEMU comes with that."""
    graphics: bool | None
    """Off: the firmware speaks on the serial port. None: there is no such property."""
    gic_version: str | None
    """Interrupt controller; the default one has room for 8 CPUs. None: there is no such property."""


MACHINES = {
    machine.type: machine
    for machine in (
        Machine(MachineType.MICROVM, "device", "ttyS0", "t", False, False, graphics=None, gic_version=None),
        Machine(MachineType.Q35, "pci", "ttyS0", "t", True, True, graphics=False, gic_version=None),
        Machine(MachineType.VIRT, "pci", "ttyAMA0", None, True, False, graphics=None, gic_version="max"),
    )
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What runs guests of one architecture."""

    name: str
    """As uname(2) says it."""
    machines: tuple[MachineType, ...]
    """Machine types that it has; the first is for guests whose kernel is given to QEMU."""
    for_disks: MachineType
    """The machine type for guests that start from a disk."""
    tcg_cpu: str
    """CPU of a guest without KVM."""
    package: str
    """Debian's and Ubuntu's package of QEMU for it."""

    @property
    def qemu(self) -> str:
        """QEMU for it, by name."""
        return f"qemu-system-{self.name}"


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "x86_64", (MachineType.MICROVM, MachineType.Q35), MachineType.Q35, "max,-erms", "qemu-system-x86"
        ),
        Architecture(
            "aarch64", (MachineType.VIRT,), MachineType.VIRT, "max,pauth-impdef=on", "qemu-system-arm"
        ),
    )
}
"""``max`` lets an idle guest stop its tick, and boots faster than the default model.

On x86_64, with ``erms`` the guest's kernel copies and clears memory by one ``rep movsb`` or ``rep stosb``,
which TCG carries out byte by byte: three times as slow as the loops that it takes otherwise (measured with
QEMU 7.2). On aarch64, ``pauth-impdef`` signs pointers by a hash that TCG computes quickly, unlike the
architected one (QEMU, docs/system/arm/cpu-features.rst, "TCG VCPU Features").
"""


def host_architecture() -> Architecture:
    """That of this host.

    Raises:
        UnsupportedError: There is none for it.
    """
    return architecture(platform.machine())


def architecture(name: str) -> Architecture:
    """The architecture of that name, as uname(2) says it. Raises UnsupportedError."""
    found = ARCHITECTURES.get(name)
    if found is None:
        names = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(f"There are no guests for the architecture {name}; there are for {names}.")
    return found


def choose(
    arch: Architecture, wanted: MachineType | None, *, from_disk: bool, firmware: bool = False
) -> Machine:
    """The machine of a VM.

    Args:
        arch: The host's architecture.
        wanted: As the pod names it; None: what suits.
        from_disk: Whether the guest starts from its disk: no kernel is given to QEMU.
        firmware: Whether the pod brings firmware.

    Raises:
        UnsupportedError: The architecture has no such machine, or the machine cannot start from a disk.
        InvalidArgumentError: It can, with firmware that the pod has to bring.
    """
    chosen = wanted or (arch.for_disks if from_disk else arch.machines[0])
    if chosen not in arch.machines:
        names = ", ".join(arch.machines)
        raise UnsupportedError(
            f"Machine type {chosen} does not go with {arch.name}; this node has {names}.",
            machine_types=list(arch.machines),
        )
    machine = MACHINES[chosen]
    if from_disk and not machine.boots_disks:
        raise UnsupportedError(
            f"Machine type {chosen} has no firmware that starts from a disk; give a kernel, or use"
            f" {arch.for_disks}."
        )
    if from_disk and not machine.has_firmware and not firmware:
        raise InvalidArgumentError.field(
            "pod.hypervisor_config.firmware_path",
            f"is required: machine type {chosen} has no firmware of its own to start from a disk",
        )
    return machine
