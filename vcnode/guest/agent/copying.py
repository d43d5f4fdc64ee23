"""Copies files into and out of a container, as tar streams.

Runs in a child of the forker that has entered the container's mount namespace and root, and never calls
execve: no path and no link can lead out of there, and of the guest nothing is within reach but this code,
which is in memory. So whatever is needed must have been imported before: not even a name is looked up, for
the C library would load its modules from the container (CVE-2019-14271).
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tarfile

from vcnode.guest.agent.failures import NOT_FOUND, Failure, printable
from vcnode.guest.agent.params import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

COPY_IN, COPY_OUT = "in", "out"
BLOCK_BYTES = 256 * 1024
_XATTR = "SCHILY.xattr."
_SKIPPED_XATTRS = ("trusted.", "security.selinux", "security.ima", "security.evm")


def run(direction: str, path: str, max_bytes: int) -> int:
    """Copy; what went wrong is written to stderr as a JSON array of code and message. The exit code."""
    try:
        if direction == COPY_IN:
            with open(0, "rb", 0) as file:
                _Extractor(path, max_bytes).extract(file)
        else:
            with open(1, "wb") as file:
                _pack(path, max_bytes, file)
    except Failure as failure:
        return _failed(failure)
    except FileNotFoundError as exc:
        return _failed(Failure(NOT_FOUND, f"There is no {printable(exc.filename or path)} in the container."))
    except OSError as exc:
        return _failed(Failure.of(exc, f"copy {printable(exc.filename or path)}"))
    except (tarfile.TarError, EOFError, ValueError) as exc:
        return _failed(invalid("", f"The stream is no tar archive: {printable(str(exc))}"))
    return 0


def _failed(failure: Failure) -> int:
    sys.stderr.write(json.dumps([failure.code, failure.message]))
    sys.stderr.flush()
    return 1


# -- out ---------------------------------------------------------------------------------------------------


def _pack(path: str, max_bytes: int, file: BinaryIO) -> None:
    """Write *path*, and all below it on its file system, under its last name."""
    name = os.path.basename(os.path.normpath(path)) or "."
    links: dict[tuple[int, int], str] = {}
    total = 0
    device = os.lstat(path).st_dev
    with tarfile.open(  # its blocks of 16 KiB are joined to ours
        fileobj=file, mode="w|", bufsize=BLOCK_BYTES, format=tarfile.PAX_FORMAT
    ) as archive:
        for where, shown in _walk(path, name, device):
            found = os.lstat(where)
            entry = _entry(where, shown, found, links)
            if entry is None:
                continue
            total += entry.size
            if total > max_bytes:
                raise Failure("failed_precondition", f"There are more than the {max_bytes} bytes allowed.")
            if entry.size:
                with open(os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", 0) as content:
                    archive.addfile(entry, content)
            else:
                archive.addfile(entry)


def _walk(path: str, name: str, device: int) -> Iterator[tuple[str, str]]:
    yield path, name
    pending = [(path, name)] if stat.S_ISDIR(os.lstat(path).st_mode) else []
    while pending:
        directory, shown = pending.pop()
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                where, under = f"{directory}/{entry.name}", f"{shown}/{entry.name}"
                yield where, under
                if entry.is_dir(follow_symlinks=False) and os.lstat(where).st_dev == device:
                    pending.append((where, under))


def _entry(
    where: str, shown: str, found: os.stat_result, links: dict[tuple[int, int], str]
) -> tarfile.TarInfo | None:
    """The header of a file; None for what cannot be packed (sockets)."""
    entry = tarfile.TarInfo(shown)
    entry.mode = stat.S_IMODE(found.st_mode)
    entry.uid, entry.gid, entry.mtime = found.st_uid, found.st_gid, found.st_mtime
    kind = stat.S_IFMT(found.st_mode)
    key = (found.st_dev, found.st_ino)
    if kind != stat.S_IFDIR and found.st_nlink > 1 and key in links:
        entry.type, entry.linkname = tarfile.LNKTYPE, links[key]
        return entry
    if kind == stat.S_IFREG:
        entry.size = found.st_size
    elif kind == stat.S_IFDIR:
        entry.type = tarfile.DIRTYPE
    elif kind == stat.S_IFLNK:
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(where)
    elif kind == stat.S_IFIFO:
        entry.type = tarfile.FIFOTYPE
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        entry.devmajor, entry.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    else:
        return None
    links[key] = shown
    attributes: dict[str, str] = {}
    for attribute in _xattrs(where):
        value = os.getxattr(where, attribute, follow_symlinks=False)
        attributes[_XATTR + attribute] = value.decode("utf-8", "surrogateescape")
    entry.pax_headers = attributes
    return entry


def _xattrs(where: str) -> list[str]:
    try:
        names = os.listxattr(where, follow_symlinks=False)
    except OSError:
        return []  # the file system has none
    return [name for name in names if not name.startswith(_SKIPPED_XATTRS)]


# -- in ----------------------------------------------------------------------------------------------------


class _Extractor:
    """Unpacks below *path*; where that is no directory, the first name in the archive becomes its name."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self._left = max_bytes
        self._limit = max_bytes
        self._renamed: str | None = None
        self._directories: list[tuple[str, tarfile.TarInfo]] = []
        if os.path.isdir(path):
            self._root = path
            return
        self._root, self._renamed = os.path.split(os.path.normpath(path))
        if not os.path.isdir(self._root):
            raise Failure(NOT_FOUND, f"{printable(self._root)} is no directory of the container.")

    def extract(self, file: BinaryIO) -> None:
        """Unpack all; directories get their modes and times at the end."""
        with tarfile.open(fileobj=file, mode="r|", bufsize=BLOCK_BYTES, errorlevel=2) as archive:
            for entry in archive:
                self._one(archive, entry)
        for where, entry in reversed(self._directories):
            _set_facts(where, entry)
        while os.read(file.fileno(), BLOCK_BYTES):
            pass  # padding behind the end

    def _one(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        vars(archive)["members"].clear()  # it would keep every header
        parts = self._parts(entry.name)
        self._left -= max(0, entry.size)
        if self._left < 0:
            raise Failure("failed_precondition", f"There are more than the {self._limit} bytes allowed.")
        where = "/".join([self._root.rstrip("/"), *parts])
        if entry.isdir():
            if parts and not os.path.isdir(where):
                self._clear(where)
                os.mkdir(where, 0o700)
            if parts:
                self._directories.append((where, entry))
            return
        if not parts:
            raise invalid("", "an entry has no name")
        self._clear(where)
        self._make(archive, entry, where)

    def _make(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, where: str) -> None:
        if entry.issym():
            os.symlink(entry.linkname, where)
        elif entry.islnk():
            target = "/".join([self._root.rstrip("/"), *self._parts(entry.linkname)])
            os.link(target, where, follow_symlinks=False)
            return  # it has the facts of what it links to
        elif entry.isfifo():
            os.mkfifo(where, 0o600)
        elif entry.ischr() or entry.isblk():
            kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK
            os.mknod(where, kind | 0o600, os.makedev(entry.devmajor, entry.devminor))
        elif entry.isreg():
            self._write(archive, entry, where)
        else:
            raise invalid("", f"{printable(entry.name)} is of a kind that cannot be copied")
        _set_facts(where, entry)

    @staticmethod
    def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, where: str) -> None:
        source = archive.extractfile(entry)
        fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            while source is not None and (block := source.read(BLOCK_BYTES)):
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)

    def _parts(self, name: str) -> list[str]:
        """The components of a name in the archive, none of which leads up."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise invalid("", f"{printable(name)} leads out of the archive")
        if self._renamed is not None and parts:
            parts[0] = self._renamed
        return parts

    @staticmethod
    def _clear(where: str) -> None:
        """Remove what is in the way; a directory only if it is empty. Missing parents are made."""
        try:
            mode = os.lstat(where).st_mode
        except FileNotFoundError:
            os.makedirs(os.path.dirname(where), 0o755, exist_ok=True)
            return
        if stat.S_ISDIR(mode):
            os.rmdir(where)
        else:
            os.unlink(where)


def _set_facts(where: str, entry: tarfile.TarInfo) -> None:
    """Owner, mode, attributes and time; in this order: a new owner clears setuid and capabilities."""
    os.lchown(where, entry.uid, entry.gid)
    if not entry.issym():
        os.chmod(where, stat.S_IMODE(entry.mode))
    for name, value in entry.pax_headers.items():
        if name.startswith(_XATTR) and not name.startswith(_SKIPPED_XATTRS, len(_XATTR)):
            raw = value.encode("utf-8", "surrogateescape")
            os.setxattr(where, name.removeprefix(_XATTR), raw, follow_symlinks=False)
    time_ns = int(entry.mtime * 1_000_000_000)
    os.utime(where, ns=(time_ns, time_ns), follow_symlinks=False)
