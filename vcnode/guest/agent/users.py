"""Users and groups as the root file system at hand defines them.

The agent itself reads /etc/passwd and /etc/group; the kernel sees to it that no link in the container's
files leads out of them.
"""

from __future__ import annotations

import os
import stat
import time

from vcnode.guest.agent import syscalls
from vcnode.guest.agent.params import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Stamp = tuple[int, int, int, int, int] | None

MAX_ID = (1 << 32) - 2
"""Largest user or group number; the one above means "no change" to setresuid(2)."""
MAX_FILE_BYTES = 1 << 20
"""How much of a passwd or group file is read: these files belong to the container."""
MAX_GROUPS = 1024
_SETTLED_NS = 1_000_000_000
"""After so long a change of a file shows in its times, whatever their granularity."""


class Identity:
    """Who a process is. ``home`` is the user's home directory, ``/`` when nothing is known of them."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...], home: bytes) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def resolve(
    user: str, group: str | None, supplementary: Iterable[str], *, passwd: bytes, groups: bytes
) -> Identity:
    """Find out who *user* is.

    A number needs no entry; one without an entry has group 0 and home ``/``. The groups are *supplementary*
    and those in which the group file lists the user.

    Args:
        user: Name or number, or ``user:group``.
        group: Name or number; None: the group after the colon, else the user's own.
        supplementary: Names or numbers.
        passwd: Content of /etc/passwd, which may be anything at all.
        groups: Content of /etc/group.

    Raises:
        Failure: ``invalid_argument``; there is no such user or group.
    """
    user, colon, after = user.partition(":")
    if colon and group is None:
        group = after
    wanted = user.encode()
    number = _number(wanted)
    entry = None
    for name, fields in _entries(passwd, 6):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None and (name == wanted or uid == number):
            entry = (name, uid, gid, fields[5])
            break
    if entry is None and number is None:
        raise invalid("process.user", f"there is no user {user!r} in /etc/passwd of this root")
    name, uid, gid, home = entry or (b"", number or 0, 0, b"")
    group_entries = list(_entries(groups, 3))
    found = {_resolve_group(word, group_entries, "process.supplementary_groups") for word in supplementary}
    for _, fields in group_entries:
        member_of = _number(fields[2])
        if name and member_of is not None and len(fields) > 3 and name in fields[3].split(b","):
            found.add(member_of)
    if group is not None:
        gid = _resolve_group(group, group_entries, "process.group")
    return Identity(uid, gid, tuple(sorted(found)[:MAX_GROUPS]), home if home.startswith(b"/") else b"/")


def names(passwd: bytes) -> dict[int, str]:
    """The first name of each user number in a passwd file."""
    found: dict[int, str] = {}
    for name, fields in _entries(passwd, 3):
        if (uid := _number(fields[2])) is not None:
            found.setdefault(uid, name[:64].decode("utf-8", "replace"))
    return found


def _resolve_group(word: str, entries: list[tuple[bytes, list[bytes]]], path: str) -> int:
    wanted = word.encode()
    for name, fields in entries:
        if name == wanted and (gid := _number(fields[2])) is not None:
            return gid
    if (number := _number(wanted)) is None:
        raise invalid(path, f"there is no group {word!r} in /etc/group of this root")
    return number


def _entries(content: bytes, least_fields: int) -> Iterator[tuple[bytes, list[bytes]]]:
    """The well-formed lines: (name, fields)."""
    for line in content.split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= least_fields and fields[0]:
            yield fields[0], fields


def _number(word: bytes) -> int | None:
    """A user or group number; None when *word* is none. At most ten digits: int() of more can be slow."""
    if not word.isdigit() or len(word) > 10:
        return None
    number = int(word)
    return number if number <= MAX_ID else None


def stamps(root: str, now_ns: Callable[[], int] = time.time_ns) -> tuple[Stamp, Stamp] | None:
    """What changes whenever the passwd or the group file below *root* does; None when nothing tells that.

    Links could lead to a file that changes unseen, and a file that has just changed can change once more
    before the clock of its file system moves.
    """
    try:
        if not stat.S_ISDIR(os.lstat(f"{root}/etc").st_mode):
            return None
    except FileNotFoundError:
        return None, None
    latest_ns = now_ns() - _SETTLED_NS
    found: list[Stamp] = []
    for name in ("passwd", "group"):
        try:
            file = os.lstat(f"{root}/etc/{name}")
        except FileNotFoundError:
            found.append(None)
            continue
        if not stat.S_ISREG(file.st_mode) or file.st_mtime_ns > latest_ns or file.st_ctime_ns > latest_ns:
            return None
        found.append((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns))
    return found[0], found[1]


def read_database(root_fd: int, path: str) -> bytes:
    """Read a passwd or group file below *root_fd*, at most `MAX_FILE_BYTES`; empty when it cannot be read.

    The file is the container's: a pipe, a device or a directory in its place counts as absent, and a link
    leads nowhere but into the same root.
    """
    try:
        fd = syscalls.open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        parts: list[bytes] = []
        left = MAX_FILE_BYTES
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def resolve_in(root_fd: int, user: str, group: str | None, supplementary: Iterable[str]) -> Identity:
    """`resolve` with the files below *root_fd*."""
    passwd, groups = read_database(root_fd, "etc/passwd"), read_database(root_fd, "etc/group")
    return resolve(user, group, supplementary, passwd=passwd, groups=groups)
