"""How the VM of a pod is built and what it boots, as callers describe it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import HostPath, NoNul, Request

MAX_PARAMS = 64


class MachineType(StrEnum):
    """Machines that QEMU makes."""

    MICROVM = "microvm"
    """x86_64: virtio-mmio, no PCI, no firmware that starts from disks."""
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


class Param(Request):
    """A parameter, and its value if it has one."""

    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}$")]
    """Name."""
    value: Annotated[NoNul, StringConstraints(max_length=2048)] = ""
    """Value; empty: none."""

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.value else self.key


Digest = Annotated[
    str,
    StringConstraints(pattern=r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"),
    Field(description="``sha256:`` or ``sha512:`` and the hex digits of a file's digest."),
]


class HypervisorConfig(Request):
    """How the VM of a pod is built and what it boots. The default is the node's own guest, on its own
    machine; only with that there are templates and spare VMs."""

    machine_type: MachineType | None = None
    """Machine. Default: what suits the host's architecture and what is booted: ``microvm`` or ``virt`` for a
    kernel, ``q35`` or ``virt`` for a disk image without one."""
    kernel_path: HostPath | None = None
    """Kernel: ELF file or bzImage on x86_64, ``Image`` on aarch64. Default: the node's own, unless the guest
    starts from ``image_path``."""
    initrd_path: HostPath | None = None
    """Its initramfs. Default: the node's own with its own kernel, else none."""
    image_path: HostPath | None = None
    """Disk image, the guest's first disk. Without a kernel and an initramfs the guest starts from it."""
    image_format: DiskFormat | None = None
    """What the image holds. Default: ``qcow2`` if its name ends so, else ``raw``; never by its content, which
    a guest may have written."""
    image_writable: bool = False
    """Whether the guest writes to the image itself. Else it is only read, by any number of pods, and what is
    written goes to an overlay of the pod's own, which goes with the pod."""
    firmware_path: HostPath | None = None
    """Firmware that starts the guest from its disk, such as UEFI. Default: QEMU's own BIOS; ``virt`` has
    none."""
    kernel_digest: Digest | None = None
    """What ``kernel_path`` must hold; verified before each start, as the others are."""
    initrd_digest: Digest | None = None
    """What ``initrd_path`` must hold."""
    image_digest: Digest | None = None
    """What ``image_path`` must hold, which then is not writable."""
    firmware_digest: Digest | None = None
    """What ``firmware_path`` must hold."""
    kernel_params: tuple[Param, ...] = Field(default=(), max_length=MAX_PARAMS)
    """Parameters for the kernel, after the node's own; policy permitting."""
    hypervisor_params: tuple[Param, ...] = Field(default=(), max_length=MAX_PARAMS)
    """Further switches of QEMU, without ``-``, and their values; policy permitting."""
    cpu_model: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,=+-]{1,256}$")] | None = None
    """CPU model and features as ``-cpu`` of QEMU has them. Default: the host's with KVM, else all that QEMU
    can do."""
    mem_prealloc: bool = False
    """Whether all memory is taken from the host at the start, and not when it is first used."""
    huge_pages: bool = False
    """Whether the memory consists of the host's huge pages, which an operator has set aside."""
    debug: bool = False
    """Whether the guest's kernel says all it can on the console, and QEMU what it misses in its log."""

    @property
    def files(self) -> dict[str, str]:
        """The files of the host that are named, by field, but for the image."""
        named = {name: getattr(self, name) for name in ("kernel_path", "initrd_path", "firmware_path")}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def own_guest(self) -> bool:
        """Whether the VM boots anything but the node's own guest."""
        return bool(self.files) or self.image_path is not None

    @property
    def is_default(self) -> bool:
        """Whether the VM is as all others: only then it may be made of a template."""
        return self == HypervisorConfig()

    @property
    def from_disk(self) -> bool:
        """Whether the guest starts from its disk, by firmware."""
        return self.image_path is not None and self.kernel_path is None and self.initrd_path is None

    @property
    def format(self) -> DiskFormat:
        """What the image holds."""
        if self.image_format is not None:
            return self.image_format
        is_qcow2 = self.image_path is not None and self.image_path.endswith(".qcow2")
        return DiskFormat.QCOW2 if is_qcow2 else DiskFormat.RAW

    def digest_of(self, name: str) -> str | None:
        """What the file in field *name* must hold, if anything is said."""
        digest: str | None = getattr(self, name.replace("_path", "_digest"))
        return digest

    @model_validator(mode="after")
    def _digests(self) -> Self:
        for name in ("kernel", "initrd", "image", "firmware"):
            if getattr(self, f"{name}_digest") is not None and getattr(self, f"{name}_path") is None:
                raise ValueError(f"'{name}_digest' goes with '{name}_path'")
        if self.image_digest is not None and self.image_writable:
            raise ValueError("'image_digest' does not go with 'image_writable'")
        return self

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.image_path is None and (self.image_format is not None or self.image_writable):
            raise ValueError("'image_format' and 'image_writable' go with 'image_path'")
        if self.firmware_path is not None and not self.from_disk:
            raise ValueError("'firmware_path' is for a guest that starts from 'image_path', without a kernel")
        if self.from_disk and self.kernel_params:
            raise ValueError("'kernel_params' are for a kernel that is given; a disk has its own")
        if any(" " in str(p) or '"' in str(p) or not str(p).isprintable() for p in self.kernel_params):
            raise ValueError("'kernel_params' cannot hold spaces, quotes or control characters")
        return self
