"""The slot: a disk that a template's guest has met before it is saved, and its clones find again.

To find a plugged disk, a guest's kernel searches the SCSI bus, asks the disk for what it can, and makes its
files: some 80 ms of a clone's start without KVM. In a template all that is done. What a clone's QEMU has
behind the disk is another file, of which the guest has read nothing yet: the one of the pod's image. The
guest goes on to believe in the size that the template's had, so that is larger than any image; nobody reads
beyond the end of a file system.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from vcnode.drivers.exhaustion import exhausted
from vcnode.errors import HypervisorError
from vcnode.models.vm import SLOT_BYTES, SlotImage, VmSpec


def open_for(spec: VmSpec, ours: ExitStack) -> int | None:
    """A descriptor of what the VM's slot holds, if anything, for QEMU to inherit; *ours* closes it.

    Raises:
        HypervisorError: The image cannot be opened.
        ResourceExhaustedError: The host is short of something, which is no fault of a template's.
    """
    if spec.slot is None or not spec.has_slot:
        return None
    try:
        fd = os.open(spec.slot.path, os.O_RDONLY | os.O_CLOEXEC)
        ours.callback(os.close, fd)
        return fd if spec.template_key is None else _grown(fd, spec.slot, ours)
    except OSError as exc:
        late = HypervisorError(f"The image of VM {spec.vm_id} cannot be opened: {exc.strerror}.")
        raise exhausted(exc) or late from exc


def _grown(fd: int, image: SlotImage, ours: ExitStack) -> int:
    """A copy of an image, which is small, of the size that a slot has."""
    copy = os.memfd_create(f"slot {image.digest}", os.MFD_CLOEXEC)
    ours.callback(os.close, copy)
    length = os.fstat(fd).st_size
    while (done := os.lseek(copy, 0, os.SEEK_CUR)) < length:
        os.sendfile(copy, fd, done, length - done)
    os.truncate(copy, SLOT_BYTES)
    # QEMU takes only what was opened as it wants to have it: to be read.
    readable = os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
    ours.callback(os.close, readable)
    return readable
