"""System calls that Python lacks, or lacks before 3.12. All raise OSError like those of ``os``."""

from __future__ import annotations

import ctypes
import os
import struct

# mount(2), umount2(2); include/uapi/linux/mount.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

# open_tree(2), move_mount(2); include/uapi/linux/mount.h, fcntl.h
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 0x1
_AT_RECURSIVE = 0x8000
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_SYMLINKS = 0x10

# unshare(2), setns(2); include/uapi/linux/sched.h
CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000

# prctl(2); include/uapi/linux/prctl.h
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

# capset(2); include/uapi/linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522

# openat2(2); include/uapi/linux/openat2.h
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10

# Numbers of the calls that the C library does not wrap; arch/*/include/generated/uapi/asm/unistd_64.h
_NUMBERS = {
    "x86_64": {
        "pivot_root": 155,
        "clone": 56,
        "finit_module": 313,
        "bpf": 321,
        "openat2": 437,
        "open_tree": 428,
        "move_mount": 429,
    },
    "aarch64": {
        "pivot_root": 41,
        "clone": 220,
        "finit_module": 273,
        "bpf": 280,
        "openat2": 437,
        "open_tree": 428,
        "move_mount": 429,
    },
}

_OWN_NUMBERS = _NUMBERS.get(os.uname().machine, {})

# reboot(2); include/uapi/linux/reboot.h
RB_POWER_OFF = 0x4321_FEDC
RB_AUTOBOOT = 0x0123_4567

# bpf(2); include/uapi/linux/bpf.h
_BPF_PROG_LOAD = 5
_BPF_PROG_ATTACH = 8
_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6

_CLONE_PARENT = 0x8000
_SIGCHLD = 17

_libc = ctypes.CDLL(None, use_errno=True)
# Keeps the interpreter's lock during a call: for the one call that returns twice.
_libc_locked = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, path: str | bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def _numbered(name: str, *arguments: object) -> int:
    """Call by number; every integer is widened to a register, as syscall(2) wants it."""
    number = _OWN_NUMBERS[name]
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide))


def _encoded(text: str | bytes | None) -> bytes | None:
    return os.fsencode(text) if text is not None else None


def mount(
    source: str | bytes | None,
    target: str | bytes,
    fstype: str | None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """Mount; see mount(2)."""
    result = _libc.mount(
        _encoded(source), _encoded(target), _encoded(fstype), ctypes.c_ulong(flags), _encoded(data)
    )
    _check(result, target)


def open_tree(path: str, *, recursive: bool = False) -> int:
    """A copy of the mount at *path*, if wanted with those in it, mounted nowhere; open_tree(2)."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _numbered("open_tree", _AT_FDCWD, _encoded(path), flags)


def move_mount(fd: int, target: str) -> None:
    """Mount what `open_tree` gave at *target*, whose links are followed; move_mount(2)."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_SYMLINKS
    _numbered("move_mount", fd, b"", _AT_FDCWD, _encoded(target), flags)


def umount(target: str | bytes, flags: int = 0) -> None:
    """Unmount; see umount2(2)."""
    _check(_libc.umount2(_encoded(target), flags), target)


def syncfs(fd: int) -> None:
    """syncfs(2): write out what the file system of *fd* has in memory."""
    _check(_libc.syncfs(fd))


def unshare(flags: int) -> None:
    """Move the caller (for CLONE_NEWPID: its future children) into new namespaces."""
    _check(_libc.unshare(flags))


def fork_sibling() -> int:
    """Fork a process whose parent is the caller's parent: 0 in the child, its pid in the caller.

    Python is not told, so this is for a process with a single thread whose child calls execve soon.
    """
    number = ctypes.c_long(_OWN_NUMBERS["clone"])
    unused = ctypes.c_long(0)
    flags = ctypes.c_long(_CLONE_PARENT | _SIGCHLD)
    return _check(_libc_locked.syscall(number, flags, unused, unused, unused, unused))


def setns(fd: int, flags: int) -> None:
    """Join the namespace of a /proc/PID/ns file, or several of the process of a pidfd (Linux 5.8)."""
    _check(_libc.setns(fd, flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """Exchange the root mount; see pivot_root(2)."""
    _numbered("pivot_root", os.fsencode(new_root), os.fsencode(put_old))


def finit_module(fd: int) -> None:
    """Load the kernel module that *fd* is open on."""
    _numbered("finit_module", fd, b"", 0)


_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def set_undumpable() -> None:
    """Let nobody look into the calling process, until its next execve."""
    _check(_prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def drop_from_bounding_set(capability: int) -> None:
    """Give up a capability for the next execve and for ever; needs CAP_SETPCAP."""
    _check(_prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))


def drop_capabilities(numbers: tuple[int, ...]) -> None:
    """Give up capabilities of the calling thread at once; see capset(2)."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets))
    # Effective, permitted and inheritable, first the lower half of each.
    words = list(struct.unpack("<6I", sets))
    for number in numbers:
        for at in range(3):
            words[number // 32 * 3 + at] &= ~(1 << number % 32)
    _check(_libc.capset(header, struct.pack("<6I", *words)))


def set_no_new_privileges() -> None:
    """Let no execve of the calling process and its children gain privileges."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open *path* as if *root_fd* were the root directory: no link leads out of it. See openat2(2)."""
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return _numbered("openat2", root_fd, os.fsencode(path), how, len(how))


def sethostname(name: str) -> None:
    """Set the host name of the caller's UTS namespace."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))))


def reboot(command: int) -> None:
    """Stop or restart the machine at once, without a sync."""
    _check(_libc.reboot(ctypes.c_int(command)))


def load_device_program(instructions: bytes) -> int:
    """Load an eBPF program that decides on access to devices; returns its descriptor."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "<IIQQIIQI",
        _BPF_PROG_TYPE_CGROUP_DEVICE,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        *(0, 0, 0),  # no log of the verifier: level, size, buffer
        0,
    )
    return _numbered("bpf", _BPF_PROG_LOAD, attributes, len(attributes))


def attach_device_program(cgroup_fd: int, program_fd: int) -> None:
    """Attach a program of `load_device_program` to a cgroup, and so to all below it."""
    attributes = struct.pack("<IIII", cgroup_fd, program_fd, _BPF_CGROUP_DEVICE, 0)
    _numbered("bpf", _BPF_PROG_ATTACH, attributes, len(attributes))
