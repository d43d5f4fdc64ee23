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
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

# unshare(2), setns(2); include/uapi/linux/sched.h
CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000

# prctl(2); include/uapi/linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x2008_0522

# Numbers of the calls that the C library does not wrap; arch/*/include/generated/uapi/asm/unistd_64.h
_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "finit_module": 313, "bpf": 321},
    "aarch64": {"pivot_root": 41, "capset": 91, "finit_module": 273, "bpf": 280},
}

# reboot(2); include/uapi/linux/reboot.h
RB_POWER_OFF = 0x4321_FEDC
RB_AUTOBOOT = 0x0123_4567

# bpf(2); include/uapi/linux/bpf.h
_BPF_PROG_LOAD = 5
_BPF_PROG_ATTACH = 8
_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str | bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def _numbered(name: str, *arguments: object) -> int:
    """Call by number; every integer is widened to a register, as syscall(2) wants it."""
    number = _NUMBERS[os.uname().machine][name]
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


def umount(target: str | bytes, flags: int = 0) -> None:
    """Unmount; see umount2(2)."""
    _check(_libc.umount2(_encoded(target), flags), target)


def unshare(flags: int) -> None:
    """Move the caller (for CLONE_NEWPID: its future children) into new namespaces."""
    _check(_libc.unshare(flags))


def setns(fd: int, flags: int) -> None:
    """Join the namespace of a /proc/PID/ns file, or several of the process of a pidfd (Linux 5.8)."""
    _check(_libc.setns(fd, flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """Exchange the root mount; see pivot_root(2)."""
    _numbered("pivot_root", os.fsencode(new_root), os.fsencode(put_old))


def finit_module(fd: int) -> None:
    """Load the kernel module that *fd* is open on."""
    _numbered("finit_module", fd, b"", 0)


def prctl(option: int, argument: int = 0) -> None:
    """Set an attribute of the calling process; see prctl(2)."""
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(argument), unused, unused, unused))


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the caller's capabilities, given as 64-bit masks."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    masks = (effective, permitted, inheritable)
    low = [mask & 0xFFFF_FFFF for mask in masks]
    high = [mask >> 32 for mask in masks]
    data = (ctypes.c_uint32 * 6)(*low, *high)
    _numbered("capset", ctypes.byref(header), ctypes.byref(data))


def sethostname(name: str) -> None:
    """Set the host name of the caller's UTS namespace."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))))


def reboot(command: int) -> None:
    """Stop or restart the machine at once, without a sync."""
    _check(_libc.reboot(ctypes.c_int(command)))


def socket(family: int, kind: int, protocol: int) -> int:
    """Open a socket as a bare descriptor: for two calls the ``socket`` module is too much to load."""
    return _check(_libc.socket(family, kind, protocol))


def bind(fd: int, address: bytes) -> None:
    """Bind a socket to a packed address."""
    _check(_libc.bind(fd, address, len(address)))


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
