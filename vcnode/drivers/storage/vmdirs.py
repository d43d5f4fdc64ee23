"""A VM's own directory on the host, and the host directories shared with it. Blocking; needs root.

``<run_dir>/vms/<vm_id>/`` holds sockets and logs. ``shared`` in it is what the guest sees over 9p. QEMU
serves that as root and the guest is hostile, so ``shared`` is a tiny tmpfs that is mounted read-only:
nothing can be written to the host through its top level. Shared directories are bind mounts inside; their
mount points are made through a second, writable mount of the same tmpfs that exists for that moment only.

On the host side the bind mounts forbid set-uid programs, devices, execution and following of symbolic
links. QEMU needs none of these, and the guest has its own mount with its own flags: set-uid programs work
in a container. They are not recursive: what is mounted below a shared directory stays invisible.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from pathlib import Path

from vcnode.drivers.audit import Held
from vcnode.drivers.storage import syscalls
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.threads import Undo
from vcnode.drivers.storage.trees import mounted, remove_tree, unmount, unmount_below
from vcnode.errors import AlreadyExistsError, InvalidArgumentError, StorageError

log = logging.getLogger(__name__)

SHARED = "shared"
NOTE = "pod.json"
"""What the VM is for; see `vcnode.pods.notes`."""
HARDENED = syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV | syscalls.ATTR_NOEXEC | syscalls.ATTR_NOSYMFOLLOW
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_name(name: str) -> str:
    """Return *name* if it is a plain file name.

    Raises:
        InvalidArgumentError: It is empty, too long, or has a slash, a leading dot or odd characters.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(f"{name!r} is no name for a VM or a share.", name=name)
    return name


class VmDirs:
    """Makes and removes the directories below ``<run_dir>/vms``."""

    def __init__(self, run_dir: Path, roots: AllowedRoots) -> None:
        self._base = Path(os.path.realpath(run_dir)) / "vms"
        self._roots = roots

    def path(self, vm_id: str) -> Path:
        """Where the directory of *vm_id* is or would be."""
        return self._base / check_name(vm_id)

    def ids(self) -> list[str]:
        """VMs that have a directory, in order."""
        try:
            return sorted(entry.name for entry in os.scandir(self._base) if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def held(self, mark: str) -> list[Held]:
        """The directories of VMs whose id begins with *mark*, with mounts and sockets in them. Blocking."""
        found = []
        for vm_id in self.ids():
            if vm_id.startswith(mark):
                path = str(self.path(vm_id))
                mounts = [Held("mount", point, vm_id) for point in mounted(path)]
                sockets = [Held("socket", name, vm_id) for name in _sockets(path)]
                found += [*mounts, *sockets, Held("directory", path, vm_id)]
        return found

    def make(self, undo: list[Undo], vm_id: str) -> Path:
        """Make the directory of a VM; appends to *undo* what removes it again.

        Raises:
            AlreadyExistsError: It is there already.
            OSError: The host refused; what was made is in *undo*.
        """
        path = self.path(vm_id)
        os.makedirs(self._base, mode=0o700, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError as exc:
            raise AlreadyExistsError(f"VM {vm_id} has a directory already.", vm_id=vm_id) from exc
        undo.append(lambda: self.remove(vm_id))
        shared = path / SHARED
        shared.mkdir(mode=0o755)
        # Names only, no data: a page for each would be plenty.
        tmpfs = syscalls.new_tmpfs(
            {"size": "64k", "nr_inodes": "1024", "mode": "0755"},
            attributes=syscalls.ATTR_RDONLY
            | syscalls.ATTR_NOSUID
            | syscalls.ATTR_NODEV
            | syscalls.ATTR_NOEXEC,
        )
        try:
            target = os.open(shared, _DIRECTORY)
            try:
                syscalls.attach_mount(tmpfs, target)
            finally:
                os.close(target)
        finally:
            os.close(tmpfs)
        return path

    def remove(self, vm_id: str) -> None:
        """Unmount what is shared and delete the directory. Idempotent; deletes nothing that is shared.

        Raises:
            OSError: Something stays; what could be removed is.
        """
        path = self.path(vm_id)
        try:
            base = os.open(self._base, _DIRECTORY)
        except FileNotFoundError:
            return
        try:
            unmount_below(str(path), through=str(path / SHARED))
            remove_tree(base, vm_id)
        finally:
            os.close(base)

    def write_note(self, vm_id: str, text: str) -> None:
        """Replace the VM's note, as a whole.

        Raises:
            StorageError: The VM has no directory.
            OSError: The host refused; the note before it stays.
        """
        path = self.path(vm_id) / NOTE
        fresh = path.with_suffix(".new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as exc:
            raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id) from exc
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        fresh.rename(path)

    def read_notes(self, mark: str) -> dict[str, str]:
        """The notes of VMs whose id begins with *mark*; what cannot be read is left out."""
        found = {}
        for vm_id in self.ids():
            if vm_id.startswith(mark):
                try:
                    found[vm_id] = (self.path(vm_id) / NOTE).read_text(encoding="utf-8")
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, ValueError):
                    log.warning("The note of VM %s cannot be read", vm_id, exc_info=True)
        return found

    def share(self, undo: list[Undo], vm_id: str, name: str, path: str, *, read_only: bool = False) -> None:
        """Bind the host directory *path* to ``shared/<name>``; appends to *undo* what takes it away again.

        Raises:
            AlreadyExistsError: Something is shared under that name.
            InvalidArgumentError, NotFoundError: As `AllowedRoots.open_directory`.
            StorageError: The VM has no directory.
            OSError: The host refused; what was made is in *undo*.
        """
        check_name(name)
        source = self._roots.open_directory(path)
        try:
            shared = self._open_shared(vm_id)
            try:
                attributes = HARDENED | (syscalls.ATTR_RDONLY if read_only else 0)
                self._bind(vm_id, name, source, shared, attributes, undo)
            finally:
                os.close(shared)
        finally:
            os.close(source)

    def _bind(
        self, vm_id: str, name: str, source: int, shared: int, attributes: int, undo: list[Undo]
    ) -> None:
        if os.path.ismount(self.path(vm_id) / SHARED / name):
            raise AlreadyExistsError(f"VM {vm_id} has a share {name} already.", vm_id=vm_id, name=name)
        undo.append(lambda: self.unshare(vm_id, name))
        _make_directory(shared, name)
        mount = syscalls.clone_mount(source)
        try:
            syscalls.set_mount_attributes(mount, add=attributes)
            target = os.open(name, _DIRECTORY, dir_fd=shared)
            try:
                syscalls.attach_mount(mount, target)
            finally:
                os.close(target)
        finally:
            os.close(mount)

    def unshare(self, vm_id: str, name: str) -> None:
        """Take a share away. Idempotent.

        Raises:
            OSError: It stays mounted.
        """
        target = self.path(vm_id) / SHARED / check_name(name)
        for _ in range(64):
            if not unmount(str(target)):
                break
        try:
            shared = self._open_shared(vm_id)
        except StorageError:
            return
        try:
            _remove_directory(shared, name)
        finally:
            os.close(shared)

    def _open_shared(self, vm_id: str) -> int:
        try:
            return os.open(self.path(vm_id) / SHARED, _DIRECTORY)
        except FileNotFoundError as exc:
            raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id) from exc


def _sockets(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.path for e in entries if stat.S_ISSOCK(e.stat(follow_symlinks=False).st_mode))
    except FileNotFoundError:
        return []  # it went while we looked


def _writable(shared: int) -> int:
    """A detached mount of the same tmpfs as *shared* through which it can be written."""
    mount = syscalls.clone_mount(shared)
    try:
        syscalls.set_mount_attributes(mount, remove=syscalls.ATTR_RDONLY)
    except OSError:
        os.close(mount)
        raise
    return mount


def _make_directory(shared: int, name: str) -> None:
    mount = _writable(shared)
    try:
        os.mkdir(name, mode=0o755, dir_fd=mount)
    except FileExistsError:
        pass  # left by a share that was interrupted; it is not mounted over, or `_bind` had refused
    finally:
        os.close(mount)


def _remove_directory(shared: int, name: str) -> None:
    mount = _writable(shared)
    try:
        os.rmdir(name, dir_fd=mount)
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            raise
    finally:
        os.close(mount)
