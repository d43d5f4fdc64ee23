"""UNIX sockets on the host that lead into VMs. Blocking; needs root.

What is made outside of a VM's directory is noted in it first (``sockets/``), so that whoever removes the
directory, after whatever crash, removes the socket as well. A socket is only ever removed when nobody listens
there: one that another program has put in its place is left alone.

Its directory is opened below the allowed roots without following links, and everything is done from there.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import stat
from pathlib import Path

from vcnode.drivers.audit import Held
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.vmdirs import VmDirs
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, StorageError

log = logging.getLogger(__name__)

NOTES = "sockets"
MAX_PATH_BYTES = 107
"""Source: unix(7), sun_path holds 108 bytes with the final NUL."""
CONNECT_LIMIT_S = 5.0


class HostSockets:
    """Makes sockets, connects to others, and removes those that it made."""

    def __init__(self, dirs: VmDirs, roots: AllowedRoots) -> None:
        self._dirs = dirs
        self._roots = roots

    def listen(self, vm_id: str, path: str) -> int:
        """See `vcnode.drivers.base.Storage.listen`. On failure `remove` takes away what is left."""
        parent, name = self._open_parent(path)
        try:
            note = self._dirs.path(vm_id) / NOTES / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
            try:
                note.parent.mkdir(mode=0o700, exist_ok=True)
            except FileNotFoundError as exc:
                raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id) from exc
            if is_stale(parent, name):
                os.unlink(name, dir_fd=parent)
            note.write_text(path)
            return _listen(parent, name, path)
        finally:
            os.close(parent)

    def connect(self, path: str) -> int:
        """See `vcnode.drivers.base.Storage.connect`."""
        fd = self._roots.open(path)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise InvalidArgumentError(f"Host path {path!r} is no socket.", path=path)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(CONNECT_LIMIT_S)
                sock.connect(f"/proc/self/fd/{fd}")
                sock.settimeout(None)
                return sock.detach()
        except (ConnectionRefusedError, TimeoutError) as exc:
            raise FailedPreconditionError(
                f"Nobody takes connections at {path!r}; start the program that listens there first.",
                path=path,
            ) from exc
        finally:
            os.close(fd)

    def paths(self, vm_id: str) -> list[str]:
        """The sockets that are noted for a VM."""
        try:
            notes = sorted((self._dirs.path(vm_id) / NOTES).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [text for note in notes if (text := _read(note))]

    def held(self, mark: str) -> list[Held]:
        """The sockets of VMs whose id begins with *mark*, as far as they are there."""
        marked = [vm_id for vm_id in self._dirs.ids() if vm_id.startswith(mark)]
        return [
            Held("socket", path, vm_id)
            for vm_id in marked
            for path in self.paths(vm_id)
            if os.path.lexists(path)
        ]

    def remove(self, vm_id: str) -> None:
        """Remove the sockets that were made for a VM, which has ended. Idempotent.

        Raises:
            OSError: Something stays; what could be removed is.
        """
        for path in self.paths(vm_id):
            try:
                parent, name = self._open_parent(path)
            except (InvalidArgumentError, NotFoundError):
                log.warning("Socket %r of VM %s: its directory is gone or no longer allowed", path, vm_id)
                continue
            try:
                if is_stale(parent, name):
                    os.unlink(name, dir_fd=parent)
            finally:
                os.close(parent)

    def _open_parent(self, path: str) -> tuple[int, str]:
        """The directory of *path*, open, and the name in there. Raises as `AllowedRoots.open_directory`."""
        self._roots.judge(path)
        parent, _, name = path.rstrip("/").rpartition("/")
        if not name or len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise InvalidArgumentError(
                f"Host path {path!r} cannot be a socket: at most {MAX_PATH_BYTES} bytes, and a name.",
                path=path,
            )
        return self._roots.open_directory(parent or "/"), name


def _listen(parent: int, name: str, path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # What the socket itself has for a mode is what its file gets: nobody sees it with another one.
        # Source: Linux net/unix/af_unix.c, unix_bind_bsd.
        os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(f"/proc/self/fd/{parent}/{name}")
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            raise FailedPreconditionError(
                f"There is something at {path!r} already, perhaps a socket where somebody listens; remove it,"
                " or choose another path.",
                path=path,
            ) from exc
        sock.listen(1)
        return sock.detach()


def is_stale(parent: int, name: str) -> bool:
    """Whether *name* in the directory *parent* is a socket at which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(f"/proc/self/fd/{parent}/{name}")
    except ConnectionRefusedError:
        return True
    except (FileNotFoundError, BlockingIOError):  # gone; so busy that nobody more may wait
        return False
    return False


def _read(note: Path) -> str:
    try:
        return note.read_text()
    except FileNotFoundError:
        return ""
