"""Unpacks a tar of a root filesystem into an empty directory; runs as a process of its own.

Tars come from anywhere, so this is done where it can be killed, where its memory and file sizes have
limits, and without ever using a path of the archive as a path of the host: each name is opened by the
kernel *inside the directory as if that were the root* (openat2 with RESOLVE_IN_ROOT). A link to ``/etc``
in the archive is the image's ``/etc``, as it will be for the container, whichever entry made it and
whenever. Kept as they are: owners, modes, times, hard links, symbolic links, device nodes (the directory
is for root alone, and a container could make the same nodes itself), extended attributes ``user.*``,
POSIX ACLs and file capabilities. Other extended attributes (``trusted.overlay.*`` above all, which would
steer the overlay above the image) are dropped. RefusedError: names with ``..``, broken archives.

The layers of a container image are unpacked over each other, whiteouts first: those speak of the layers below
only, wherever in the tar they stand. Source: OCI image-spec, layer.md.

Standard library, ``trees`` and ``syscalls`` only, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import lzma
import os
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Self

from vcnode.drivers.storage import syscalls
from vcnode.drivers.storage.trees import remove_tree

_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
_CHUNK_BYTES = 1024 * 1024
_XATTR_PREFIX = "SCHILY.xattr."
_WHITEOUT = ".wh."
_META = ".wh..wh."
"""What AUFS keeps for itself; one name of these, `_OPAQUE`, has a meaning in images."""
_OPAQUE = ".wh..wh..opq"
_ZSTD = b"\x28\xb5\x2f\xfd"
_KEPT_XATTRS = ("user.", "system.posix_acl_", "security.capability")
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, UnicodeError, ValueError, OverflowError)


_DAMAGED_HEADER = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


class RefusedError(Exception):
    """The archive is hostile, damaged, or of an unknown kind; the text says which and where."""


class _Info(tarfile.TarInfo):
    """Header reader that does not take damage in the middle for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _DAMAGED_HEADER as exc:
            raise RefusedError("is not a tar file, or is damaged") from exc


class Unpacker:
    """Writes entries into one directory.

    Args:
        root_fd: The empty directory.
        reserve_bytes: Space to leave free on its filesystem; less raises ENOSPC.
        max_bytes: Most that all entries together may hold; None: as much as there is space.
        layers: Whether archives are layers of an image, with whiteouts.
    """

    def __init__(
        self, root_fd: int, reserve_bytes: int, *, max_bytes: int | None = None, layers: bool = False
    ) -> None:
        self._root = root_fd
        self._reserve_bytes = reserve_bytes
        self._left_bytes = max_bytes
        self._layers = layers
        self._unchecked_bytes = _CHUNK_BYTES
        # Filling a directory changes its time, and a mode without "w" says nothing to root: set at the end.
        self._directories: dict[str, tarfile.TarInfo | None] = {"": None}

    def unpack(self, archive: tarfile.TarFile) -> int:
        """Unpack all entries over what is there; returns how many there were. `finish` completes the tree.

        Raises:
            RefusedError: An entry is hostile or damaged; the directory is to be thrown away.
            OSError: The host cannot hold it.
        """
        count = 0
        # Not by iteration, which looks into `members`; that list would grow for ever and is kept empty.
        while (info := archive.next()) is not None:
            count += 1
            self._account(512)
            try:
                with _blamed(info):
                    if not (self._layers and info.name.rpartition("/")[2].startswith(_WHITEOUT)):
                        self._entry(archive, info)
            finally:
                archive.members.clear()  # type: ignore[attr-defined]
        return count

    def finish(self) -> None:
        """Set owners, modes and times of all directories."""
        for path, directory in self._directories.items():
            self._finish_directory(path, directory)

    def remove_hidden(self, archive: tarfile.TarFile) -> None:
        """Remove what the whiteouts of a layer hide. Raises as `unpack`."""
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if not info.name.rpartition("/")[2].startswith(_WHITEOUT):
                continue
            path = clean(info.name)
            parent_path, _, name = path.rpartition("/")
            with _blamed(info):
                self._hide(parent_path, name)

    def _hide(self, parent_path: str, name: str) -> None:
        try:
            parent = self._open_directory(parent_path or ".")
        except (FileNotFoundError, NotADirectoryError):
            return  # nothing to hide
        try:
            if name == _OPAQUE:
                hidden = os.listdir(parent)
            elif name.startswith(_META):
                return
            else:
                hidden = [name.removeprefix(_WHITEOUT)]
                if hidden[0] in ("", ".", ".."):
                    raise RefusedError(f"has a whiteout {name!r} of nothing")
            for each in hidden:
                self._remove(parent, each)
                self._forget(f"{parent_path}/{each}".lstrip("/"))
        finally:
            os.close(parent)

    @staticmethod
    def _remove(parent: int, name: str) -> None:
        """Delete *name* with all that is in it, if it is there."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            remove_tree(parent, name)

    def _forget(self, path: str) -> None:
        """What was said of directories at and below *path* counts no longer: they are gone."""
        below = f"{path}/"
        for known in [p for p in self._directories if p == path or p.startswith(below)]:
            del self._directories[known]

    def _account(self, size: int) -> None:
        if self._left_bytes is not None:
            self._left_bytes -= size
            if self._left_bytes < 0:
                raise RefusedError("is larger than an image may be")
        self._unchecked_bytes += size
        if self._unchecked_bytes >= _CHUNK_BYTES:
            self._unchecked_bytes = 0
            space = os.fstatvfs(self._root)
            if space.f_bavail * space.f_frsize < self._reserve_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _entry(self, archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        path = clean(info.name)
        if not path:
            if not info.isdir():
                raise RefusedError(f"has an entry {info.name!r} that is not a directory")
            self._directories[""] = info
            return
        parent_path, _, name = path.rpartition("/")
        parent = self._open_parent(parent_path)
        try:
            if info.isdir():
                self._make_directory(parent, name)
                self._directories.pop(path, None)
                self._directories[path] = info
                return
            self._make_way(parent, name, path)
            if info.isreg():
                self._file(archive, info, parent, name)
            elif info.issym():
                os.symlink(info.linkname, name, dir_fd=parent)
                self._metadata(info, parent, name)
            elif info.islnk():
                self._hard_link(info, parent, name)
            elif info.isfifo() or info.ischr() or info.isblk():
                kind = stat.S_IFIFO if info.isfifo() else stat.S_IFCHR if info.ischr() else stat.S_IFBLK
                device = 0 if info.isfifo() else os.makedev(info.devmajor, info.devminor)
                os.mknod(name, kind | 0o600, device, dir_fd=parent)
                self._metadata(info, parent, name)
            else:
                raise RefusedError(f"has an entry {info.name!r} of the unknown kind {info.type!r}")
        finally:
            os.close(parent)

    def _open_parent(self, path: str) -> int:
        """Open the directory *path* inside the root, making what is missing of it."""
        try:
            return self._open_directory(path or ".")
        except FileNotFoundError:
            pass
        done = ""
        for part in path.split("/"):
            parent = self._open_directory(done or ".")
            try:
                os.mkdir(part, mode=0o755, dir_fd=parent)
            except FileExistsError:
                pass
            else:
                self._directories[f"{done}/{part}".lstrip("/")] = None
            finally:
                os.close(parent)
            done = f"{done}/{part}".lstrip("/")
        return self._open_directory(path)

    def _open_directory(self, path: str) -> int:
        return syscalls.openat2(self._root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_IN_ROOT)

    @staticmethod
    def _make_directory(parent: int, name: str) -> None:
        try:
            os.mkdir(name, mode=0o755, dir_fd=parent)
        except FileExistsError:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, mode=0o755, dir_fd=parent)

    def _make_way(self, parent: int, name: str, path: str) -> None:
        """Remove an earlier entry of the same name: the later one counts.

        A filled directory goes with all that is in it when it may come from a lower layer, else it refuses.
        """
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            if self._layers:
                remove_tree(parent, name)
            else:
                os.rmdir(name, dir_fd=parent)
            self._forget(path)

    def _file(self, archive: tarfile.TarFile, info: tarfile.TarInfo, parent: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        if info.size < 0:
            raise RefusedError(f"has an entry {info.name!r} of negative size")
        source = archive.extractfile(info)
        with open(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as target:
            left = info.size
            while left and source is not None:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise RefusedError(f"ends in the middle of {info.name!r}")
                self._account(len(chunk))
                _write_all(target, chunk)
                left -= len(chunk)
        self._metadata(info, parent, name)

    def _hard_link(self, info: tarfile.TarInfo, parent: int, name: str) -> None:
        source_path, _, source_name = clean(info.linkname).rpartition("/")
        try:
            source = self._open_directory(source_path or ".")
        except FileNotFoundError as exc:
            raise RefusedError(f"has a hard link {info.name!r} to the missing {info.linkname!r}") from exc
        try:
            os.link(source_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError as exc:
            raise RefusedError(f"has a hard link {info.name!r} to the missing {info.linkname!r}") from exc
        except PermissionError as exc:
            raise RefusedError(f"has a hard link {info.name!r} to the directory {info.linkname!r}") from exc
        finally:
            os.close(source)

    def _metadata(self, info: tarfile.TarInfo, parent: int, name: str) -> None:
        os.chown(name, info.uid, info.gid, dir_fd=parent, follow_symlinks=False)
        if not info.issym():
            # Through the descriptor's name in /proc: it cannot be a link, and takes modes and attributes.
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                _modes(fd, info)
            finally:
                os.close(fd)
        moment = _time_ns(info)
        os.utime(name, ns=(moment, moment), dir_fd=parent, follow_symlinks=False)

    def _finish_directory(self, path: str, info: tarfile.TarInfo | None) -> None:
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            fd = syscalls.openat2(self._root, path or ".", flags, resolve=_IN_ROOT)
        except (FileNotFoundError, NotADirectoryError):
            return  # a later entry took its place
        try:
            if info is None:
                os.fchown(fd, 0, 0)
                os.fchmod(fd, 0o755)
                os.utime(fd, ns=(0, 0))
                return
            os.fchown(fd, info.uid, info.gid)
            _modes(fd, info)
            moment = _time_ns(info)
            os.utime(fd, ns=(moment, moment))
        finally:
            os.close(fd)


_HOSTILE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EXDEV,
        errno.EMLINK,
        errno.E2BIG,
        errno.EOVERFLOW,
        errno.ERANGE,
    }
)
"""What the kernel says to names, links and attributes that make no sense: the archive's fault."""


def clean(name: str) -> str:
    """The path *name* of an archive without leading and doubled slashes and dots; '' is the root itself.

    Raises:
        RefusedError: It has a ``..``.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise RefusedError(f"has an entry {name!r}, whose name leads out of the archive")
    return "/".join(parts)


def _write_all(target: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def _time_ns(info: tarfile.TarInfo) -> int:
    return max(0, int(info.mtime * 1_000_000_000))


def _modes(fd: int, info: tarfile.TarInfo) -> None:
    """Set mode and attributes (after the owner, whose change clears set-uid bits and capabilities)."""
    link = f"/proc/self/fd/{fd}"
    os.chmod(link, stat.S_IMODE(info.mode))
    for name, value in _xattrs(info):
        os.setxattr(link, name, value)


def _xattrs(info: tarfile.TarInfo) -> Iterator[tuple[str, bytes]]:
    for key, value in sorted(info.pax_headers.items()):
        name = key.removeprefix(_XATTR_PREFIX)
        if name != key and name.startswith(_KEPT_XATTRS):
            yield name, value.encode("utf-8", "surrogateescape")


def unpack(tar_fd: int, root_fd: int, *, reserve_bytes: int, max_bytes: int | None = None) -> None:
    """Unpack the tar *tar_fd* (plain, gzip, bzip2, xz or zstd) into the empty directory *root_fd*.

    Raises:
        RefusedError: It is no tar, damaged, hostile, too large or empty.
        OSError: The host cannot hold it; ENOSPC when less than *reserve_bytes* would stay free.
    """
    unpacker = Unpacker(root_fd, reserve_bytes, max_bytes=max_bytes)
    with _opened(tar_fd) as archive:
        count = unpacker.unpack(archive)
    if not count:
        raise RefusedError("is an empty archive")
    unpacker.finish()


def unpack_layers(
    layers: list[tuple[int, str | None]], root_fd: int, *, reserve_bytes: int, max_bytes: int | None = None
) -> None:
    """Unpack *layers* over each other, lowest first, each an open file with its ``sha256:`` digest, if known.

    Raises:
        RefusedError, OSError: As `unpack`; or a layer's content does not have its digest.
    """
    unpacker = Unpacker(root_fd, reserve_bytes, max_bytes=max_bytes, layers=True)
    for index, (fd, digest) in enumerate(layers):
        if digest is not None:
            _verify(fd, digest)
        if index:
            with _opened(fd) as archive:
                unpacker.remove_hidden(archive)
            os.lseek(fd, 0, os.SEEK_SET)
        with _opened(fd) as archive:
            unpacker.unpack(archive)
    unpacker.finish()


def _verify(fd: int, digest: str) -> None:
    found = hashlib.sha256()
    while chunk := os.read(fd, _CHUNK_BYTES):
        found.update(chunk)
    if f"sha256:{found.hexdigest()}" != digest:
        raise RefusedError(f"has a layer {digest} with other content")
    os.lseek(fd, 0, os.SEEK_SET)


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[tarfile.TarFile]:
    """The tar in *fd*, whatever it is compressed with. Raises RefusedError when it is damaged."""
    try:
        with (
            _decompressed(fd) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Info, errorlevel=2) as archive,
        ):
            yield archive
    except _DAMAGED as exc:
        raise RefusedError("is not a tar file (plain, gzip, bzip2, xz or zstd), or is damaged") from exc
    except OSError as exc:
        if exc.errno is None:  # a decompressor's way to speak of bad data
            raise RefusedError("is damaged") from exc
        raise


@contextlib.contextmanager
def _decompressed(fd: int) -> Iterator[IO[bytes]]:
    """*fd* as tarfile can read it, which knows no zstd."""
    if os.pread(fd, len(_ZSTD), 0) != _ZSTD:
        with open(fd, "rb", closefd=False) as file:
            yield file
        return
    # The window that a frame may ask for is bounded by zstd itself (128 MiB).
    with subprocess.Popen(
        ["zstd", "-dcq", "-T1"], stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            if process.stdout is None:  # cannot be: a pipe was asked for
                raise RefusedError("cannot be decompressed")
            yield process.stdout
            # What follows the end of the archive is padding; zstd must get to its own check at the end.
            while process.stdout.read(_CHUNK_BYTES):
                pass
            if process.wait() != 0:
                raise RefusedError("is damaged")
        finally:
            process.kill()


@contextlib.contextmanager
def _blamed(info: tarfile.TarInfo) -> Iterator[None]:
    """Errors that only a senseless archive causes become RefusedError."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _HOSTILE:
            raise RefusedError(f"has an entry {info.name!r} that cannot be made: {exc.strerror}") from exc
        raise


def main() -> None:
    """Entry point of the process; its argument is a job as JSON, and it prints how it went as JSON.

    ``{"root": FD, "reserve_bytes": N, "max_bytes": N, "tar": FD}``, or instead of ``tar`` the ``layers``:
    ``[[FD, "sha256:…" or null], …]``.
    """
    job: dict[str, Any] = json.loads(sys.argv[1])
    os.umask(0o077)
    result = {"outcome": "done", "text": ""}
    limits = {"reserve_bytes": job["reserve_bytes"], "max_bytes": job["max_bytes"]}
    try:
        if "layers" in job:
            unpack_layers([(fd, digest) for fd, digest in job["layers"]], job["root"], **limits)
        else:
            unpack(job["tar"], job["root"], **limits)
    except RefusedError as exc:
        result = {"outcome": "refused", "text": str(exc)}
    except MemoryError:
        result = {"outcome": "refused", "text": "needs too much memory to read"}
    except OSError as exc:
        short = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        result = {"outcome": "no_space" if short else "failed", "text": str(exc)}
    json.dump(result, sys.stdout)
    sys.stdout.flush()
