"""Linux calls for paths and mounts that Python does not offer. Standard library only; no policy.

All of them work on descriptors: what was checked is what is used, whatever is renamed meanwhile. They need
Linux 5.14 (Debian 12 has 6.1); the system call numbers are the same on every architecture.

Every function raises ``OSError`` with the kernel's errno.
Source: openat2(2), open_tree(2), move_mount(2), mount_setattr(2), fsopen(2), umount2(2).
"""

from __future__ import annotations

import ctypes
import os

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

ATTR_RDONLY = 0x00000001
ATTR_NOSUID = 0x00000002
ATTR_NODEV = 0x00000004
ATTR_NOEXEC = 0x00000008
ATTR_NOSYMFOLLOW = 0x00200000

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MS_PRIVATE = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


def _syscall(what: str, number: int, *args: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise _failed(what)
    return result


def openat2(dir_fd: int, path: str | bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open *path* relative to *dir_fd* under the restrictions *resolve* (``RESOLVE_*``); close-on-exec."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(32):
        try:
            return _syscall(
                os.fsdecode(path),
                _SYS_OPENAT2,
                ctypes.c_int(dir_fd),
                ctypes.c_char_p(os.fsencode(path)),
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            )
        except BlockingIOError:
            # EAGAIN: something was renamed while the kernel looked; openat2(2) says to try again.
            continue
    raise _failed(os.fsdecode(path))


def clone_mount(fd: int) -> int:
    """Make a detached, non-recursive bind mount of what *fd* stands for; it is gone when it is closed."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    return _syscall("open_tree", _SYS_OPEN_TREE, ctypes.c_int(fd), ctypes.c_char_p(b""), ctypes.c_uint(flags))


def set_mount_attributes(fd: int, *, add: int = 0, remove: int = 0) -> None:
    """Change ``ATTR_*`` of the mount *fd* and make it private: no mount spreads into or out of it."""
    attr = _MountAttr(add, remove, _MS_PRIVATE, 0)
    _syscall(
        "mount_setattr",
        _SYS_MOUNT_SETATTR,
        ctypes.c_int(fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )


def new_tmpfs(options: dict[str, str], *, attributes: int) -> int:
    """Make a detached tmpfs mount with *options*, such as ``{"size": "1m"}``, and ``ATTR_*`` *attributes*."""
    context = _syscall("fsopen", _SYS_FSOPEN, ctypes.c_char_p(b"tmpfs"), ctypes.c_uint(_FSOPEN_CLOEXEC))
    try:
        for key, value in options.items():
            _syscall(
                f"fsconfig {key}",
                _SYS_FSCONFIG,
                ctypes.c_int(context),
                ctypes.c_uint(_FSCONFIG_SET_STRING),
                ctypes.c_char_p(key.encode()),
                ctypes.c_char_p(value.encode()),
                ctypes.c_int(0),
            )
        _syscall(
            "fsconfig create",
            _SYS_FSCONFIG,
            ctypes.c_int(context),
            ctypes.c_uint(_FSCONFIG_CMD_CREATE),
            None,
            None,
            ctypes.c_int(0),
        )
        return _syscall(
            "fsmount",
            _SYS_FSMOUNT,
            ctypes.c_int(context),
            ctypes.c_uint(_FSMOUNT_CLOEXEC),
            ctypes.c_uint(attributes),
        )
    finally:
        os.close(context)


def attach_mount(mount_fd: int, target_fd: int) -> None:
    """Put the detached mount *mount_fd* over the directory *target_fd*."""
    _syscall(
        "move_mount",
        _SYS_MOVE_MOUNT,
        ctypes.c_int(mount_fd),
        ctypes.c_char_p(b""),
        ctypes.c_int(target_fd),
        ctypes.c_char_p(b""),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH),
    )


def umount(path: str, flags: int = 0) -> None:
    """Unmount *path*; never follows a link in its last component."""
    if _libc.umount2(ctypes.c_char_p(os.fsencode(path)), ctypes.c_int(flags | UMOUNT_NOFOLLOW)) < 0:
        raise _failed(path)
