"""Which devices containers may use: an eBPF program on the group that holds all of them.

A container may make device nodes (CAP_MKNOD is in the default set), so what a node gives access to has to be
limited, or any container could read the disks of all others. cgroup v2 has no file for that; the kernel asks
a program instead. This one is attached once, when the agent starts, and costs a container nothing.

Source: Documentation/bpf/prog_cgroup_*.rst, include/uapi/linux/bpf.h (struct bpf_cgroup_dev_ctx); the list is
that of the OCI runtime specification, config-linux.md, Default Devices.
"""

from __future__ import annotations

import os
import struct

from vcnode.guest.agent import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# (major, minors); None: all of them. Character devices only.
ALLOWED = (
    (1, (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
    (5, (0, 2)),  # tty, ptmx
    (136, None),  # the terminals of /dev/pts
)

_CHAR = 2
_ACCESS_TYPE, _MAJOR, _MINOR = 0, 4, 8  # offsets in the context
_R0, _R1, _R2, _R3, _R4 = range(5)

# Instruction codes; Documentation/bpf/instruction-set.rst
_LOAD_WORD, _MOV, _AND, _JUMP_NOT_EQUAL, _JUMP_EQUAL, _EXIT = 0x61, 0xB7, 0x57, 0x55, 0x15, 0x95


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, source << 4 | target, offset, value)


def program(allowed: Iterable[tuple[int, tuple[int, ...] | None]] = ALLOWED) -> bytes:
    """The instructions: return 1 (allow) for character devices in *allowed*, 0 for all else.

    Making a node counts as access, too: a node made on a shared directory exists on the host.
    """
    allow = _instruction(_MOV, _R0, value=1) + _instruction(_EXIT)
    deny = _instruction(_MOV, _R0, value=0) + _instruction(_EXIT)
    code = [
        _instruction(_LOAD_WORD, _R2, _R1, _ACCESS_TYPE),
        _instruction(_AND, _R2, value=0xFFFF),
        _instruction(_LOAD_WORD, _R3, _R1, _MAJOR),
        _instruction(_LOAD_WORD, _R4, _R1, _MINOR),
        _instruction(_JUMP_EQUAL, _R2, offset=2, value=_CHAR),
        deny,
    ]
    for major, minors in allowed:
        if minors is None:
            code += [_instruction(_JUMP_NOT_EQUAL, _R3, offset=2, value=major), allow]
            continue
        for minor in minors:
            code += [
                _instruction(_JUMP_NOT_EQUAL, _R3, offset=3, value=major),
                _instruction(_JUMP_NOT_EQUAL, _R4, offset=2, value=minor),
                allow,
            ]
    return b"".join([*code, deny])


def restrict(cgroup: str, allowed: Iterable[tuple[int, tuple[int, ...] | None]] = ALLOWED) -> None:
    """Let processes in *cgroup*, and in all groups below it, use the allowed devices only.

    It takes the place of what was attached there before.

    Raises:
        OSError: The kernel cannot do it (CONFIG_CGROUP_BPF).
    """
    group = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        loaded = syscalls.load_device_program(program(allowed))
        try:
            # The group holds the program from then on.
            syscalls.attach_device_program(group, loaded)
        finally:
            os.close(loaded)
    finally:
        os.close(group)
