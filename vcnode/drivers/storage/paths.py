"""Which host paths callers may name, and how they are opened without a race.

A path is resolved, judged, and then opened beneath its allowed root with links forbidden: if somebody
swaps a component for a link in between, the open fails instead of leading elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import PurePosixPath

from vcnode.drivers.exhaustion import exhausted
from vcnode.drivers.storage import syscalls
from vcnode.errors import InvalidArgumentError, NotFoundError, StorageError

_INSIDE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


def lies_in(path: str, directory: str) -> bool:
    """Whether *path* is *directory* or below it, by name alone."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


class AllowedRoots:
    """The directories under which host paths in commands must lie.

    Args:
        roots: As the operator configured them; links in them are the operator's and are followed.
        private: vcnode's own directories. Neither they nor what holds them may be given to a VM; a root
            that was put inside one of them (such as ``/var/lib/vcnode/roots``) is meant and stays usable.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]], private: Sequence[str | os.PathLike[str]]):
        self._configured = tuple(os.path.abspath(root) for root in roots)
        self._private = tuple(os.path.realpath(path) for path in private)

    def judge(self, path: str) -> None:
        """Refuse what needs no look at the disk, so that a refusal tells nothing about other directories.

        Raises:
            InvalidArgumentError: Relative, with ``..``, or outside all roots by name.
        """
        if not path.startswith("/") or "\0" in path:
            raise self._refuse(path, "is not an absolute path")
        if ".." in PurePosixPath(path).parts:
            raise self._refuse(path, "must not contain '..'")
        tidy = os.path.normpath(path)
        tidy = "/" + tidy.lstrip("/")
        roots = {*self._configured, *(os.path.realpath(root) for root in self._configured)}
        if not any(lies_in(tidy, root) for root in roots):
            raise self._outside(path)

    def open(self, path: str) -> int:
        """Open *path*, links resolved, as an O_PATH descriptor that the caller closes.

        Raises:
            InvalidArgumentError: Outside the allowed roots, vcnode's own, or no path that can be followed.
            NotFoundError: It does not exist.
            StorageError: The host refused.
        """
        self.judge(path)
        try:
            real = os.path.realpath(path, strict=True)
            root = self._root_of(path, real)
            root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                relative = os.path.relpath(real, root)
                return syscalls.openat2(root_fd, relative, os.O_PATH, resolve=_INSIDE)
            finally:
                os.close(root_fd)
        except OSError as exc:
            raise self._translate(path, exc) from exc

    def open_directory(self, path: str) -> int:
        """As `open`, and it must be a directory."""
        fd = self.open(path)
        try:
            # O_PATH descriptors can be opened again with other flags; a plain file refuses O_DIRECTORY.
            again = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError as exc:
            raise self._refuse(path, "is not a directory") from exc
        finally:
            os.close(fd)
        return again

    def open_file(self, path: str, *, writable: bool = False) -> int:
        """As `open`, but for reading, or for writing as well, and it must be a plain file."""
        fd = self.open(path)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._refuse(path, "is no plain file")
            return os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as exc:
            raise self._translate(path, exc) from exc
        finally:
            os.close(fd)

    def check_directory(self, path: str) -> None:
        """As `open_directory`, for the errors only."""
        os.close(self.open_directory(path))

    def _root_of(self, path: str, real: str) -> str:
        """The allowed root, itself resolved, under which *real* lies."""
        roots = [root for root in map(os.path.realpath, self._configured) if lies_in(real, root)]
        if not roots:
            raise self._outside(path)
        root = max(roots, key=len)
        for private in self._private:
            if lies_in(private, real) or (lies_in(real, private) and not lies_in(root, private)):
                raise self._refuse(path, "belongs to vcnode itself; name a directory of your own")
        return root

    def _outside(self, path: str) -> InvalidArgumentError:
        names = ", ".join(self._configured) or "none is configured"
        return self._refuse(path, f"lies outside the allowed roots of this node ({names})")

    @staticmethod
    def _refuse(path: str, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"Host path {path!r} {why}.", path=path)

    def _translate(self, path: str, exc: OSError) -> Exception:
        if exc.errno == errno.ENOENT:
            return NotFoundError(f"Host path {path!r} does not exist.", path=path)
        if exc.errno in (errno.ELOOP, errno.EXDEV):
            return self._refuse(path, "changed while it was looked at, or its links go in circles")
        if exc.errno == errno.ENOTDIR:
            return self._refuse(path, "leads through something that is not a directory")
        if exc.errno == errno.ENAMETOOLONG:
            return self._refuse(path, "is too long")
        return exhausted(exc) or StorageError(f"Host path {path!r} cannot be opened.", path=path)
