"""Deleting directories without ever leaving them: the most dangerous code of the product.

A directory of a VM may have users' directories mounted inside. Whatever is still mounted when it is
deleted must come out of it untouched, so two lines of defence stand behind each other: mounts are taken
away first (`unmount_below`), and the deletion itself (`remove_tree`) opens every directory in a way that
the kernel refuses when a mount or a symbolic link is in between, bind mounts of the same filesystem
included (openat2 with RESOLVE_NO_XDEV; comparing ``st_dev`` would miss those).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator
from itertools import count

from vcnode.drivers.storage import syscalls

log = logging.getLogger(__name__)

_STAY = (
    syscalls.RESOLVE_NO_XDEV
    | syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
)
_ESCAPED = re.compile(r"\\([0-7]{3})")


def mount_points(mountinfo: str, below: str) -> list[str]:
    """Mount points at or under the real path *below*, in the order in which they were mounted.

    Args:
        mountinfo: Content of ``/proc/self/mountinfo``; blanks and backslashes in it are octal escapes.
        below: Absolute path without symbolic links.
    """
    found = []
    for line in mountinfo.splitlines():
        point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if point == below or point.startswith(below.rstrip("/") + "/"):
            found.append(point)
    return found


def mounted(below: str) -> list[str]:
    """Mount points at or under the real path *below*, now."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return mount_points(file.read(), below)


def outermost(points: list[str], through: str) -> list[str]:
    """Those of *points* that lie under no other one but *through*; what lies deeper goes with them.

    Only such paths lead through directories of our own all the way. Below a user's directory a guest may
    rename things, and a path through there could lead anywhere by the time it is used.
    """
    others = [point for point in points if point != through]
    return [point for point in others if not any(point.startswith(other + "/") for other in others)] + [
        point for point in points if point == through
    ]


def unmount(path: str) -> bool:
    """Unmount the topmost mount at *path*, by force if it is busy; False when nothing is mounted there.

    Raises:
        OSError: The kernel refused.
    """
    try:
        syscalls.umount(path)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOENT):
            return False
        if exc.errno != errno.EBUSY:
            raise
        # Somebody has a file open there, or something is mounted further down. Out of sight it is safe
        # from us, and it ends when the last user lets go.
        log.warning("Unmounting %s lazily: it is in use", path)
        syscalls.umount(path, syscalls.MNT_DETACH)
    return True


def unmount_below(directory: str, *, through: str = "") -> None:
    """Unmount everything mounted below the real path *directory*. Idempotent.

    Args:
        directory: Itself not unmounted.
        through: A mount of our own that holds others, unmounted last.

    Raises:
        OSError: Something stays mounted.
    """
    left: list[str] = []
    # Mounts may be stacked on one point, and lazy unmounting takes whole subtrees: look again each time.
    for _ in range(64):
        left = [point for point in mounted(directory) if point != directory]
        if not left:
            return
        for point in outermost(left, through):
            unmount(point)
    raise OSError(errno.EBUSY, f"{len(left)} mounts stay", directory)


def remove_tree(parent_fd: int, name: str) -> None:
    """Delete the directory *name* in *parent_fd* with all that is in it. Idempotent.

    Uses three descriptors and no recursion however deep the tree is: subdirectories are moved up to the
    top one by one before they are emptied. Interrupted, it leaves a smaller tree behind.

    Raises:
        OSError: EXDEV or EBUSY when something is mounted inside; that is left as it is. ENOTDIR when
            *name* is not a directory (a symbolic link included).
    """
    try:
        top = syscalls.openat2(parent_fd, name, os.O_RDONLY | os.O_DIRECTORY, resolve=_STAY)
    except FileNotFoundError:
        return
    try:
        # The token is ours alone: no entry, hostile or left by an earlier run, can have such a name.
        names = (f".removing-{token}-{number}" for token in [secrets.token_hex(8)] for number in count())
        waiting = _empty(top, top, names)
        while waiting:
            child = waiting.pop()
            fd = syscalls.openat2(top, child, os.O_RDONLY | os.O_DIRECTORY, resolve=_STAY)
            try:
                waiting += _empty(fd, top, names)
            finally:
                os.close(fd)
            os.rmdir(child, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent_fd)


def _empty(fd: int, top: int, names: Iterator[str]) -> list[str]:
    """Unlink the files in *fd*; return the names that its subdirectories have in *top* afterwards."""
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    directories = []
    for name, is_dir in found:
        if not is_dir:
            os.unlink(name, dir_fd=fd)
        elif fd == top:
            directories.append(name)
        else:
            moved = next(names)
            os.rename(name, moved, src_dir_fd=fd, dst_dir_fd=top)  # a mount point refuses with EBUSY
            directories.append(moved)
    return directories
