"""What QEMU's words mean for whoever has asked. It ends, and refuses, with the same code for any reason.

Its LC_ALL is C. Source: QEMU hw/core/cpu-common.c (parse_cpu_option) and block/file-posix.c
(raw_check_lock_bytes), and strerror(3) of ENOMEM.
"""

from __future__ import annotations

import re

from vcnode.errors import (
    FailedPreconditionError,
    HypervisorError,
    InvalidArgumentError,
    ResourceExhaustedError,
    VcnodeError,
)

_NO_MEMORY = "Cannot allocate memory"
_NO_CPU_MODEL = re.compile(r"unable to find CPU model '([^'\n]{1,256})'")
_LOCKED = re.compile(r'Failed to get (?:shared )?"[a-z ]+" lock|Failed to lock byte')


def ended(vm_id: str, words: str, exit_code: int) -> VcnodeError:
    """The error for a QEMU that has ended before it answered, by its standard error."""
    if _NO_MEMORY in words:
        return ResourceExhaustedError(f"The host has no memory left for VM {vm_id}.", resource="memory")
    if (found := _NO_CPU_MODEL.search(words)) is not None:
        return InvalidArgumentError.field(
            "pod.hypervisor_config.cpu_model",
            f"this host's QEMU has no CPU model {found[1]!r}; its option '-cpu help' lists those it has",
        )
    if is_locked(words):
        return FailedPreconditionError(
            f"A disk image of VM {vm_id} is in use by another VM or program; stop that first, or use a copy."
        )
    return HypervisorError(
        f"QEMU of VM {vm_id} ended with code {exit_code} before it answered;"
        " the node's log has its last words.",
        exit_code=exit_code,
    )


def is_locked(words: str) -> bool:
    """Whether QEMU says that somebody else uses a file."""
    return _LOCKED.search(words) is not None
