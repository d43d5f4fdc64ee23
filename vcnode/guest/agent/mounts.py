"""The roots of containers as the guest prepares them: a shared directory, or a disk under a writable layer.

Below ``/run/vcnode``: ``shared`` (the 9p share, mounted when first needed), ``disks/<id>`` (see ``disks``),
``containers/<id>/root`` (what becomes the container's root) and ``containers/<id>/rw`` (its writable layer,
which the memory limit of the container counts, because it is its processes that fill it).
"""

from __future__ import annotations

import os
import stat
from functools import partial

from vcnode.guest.agent import syscalls
from vcnode.guest.agent.disks import make_directory, unmount_directory
from vcnode.guest.agent.failures import NOT_FOUND, Failure
from vcnode.guest.agent.syscalls import MS_BIND, MS_NODEV

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vcnode.guest.agent.undo import Undo

RUN = "/run/vcnode"
SHARE_TAG = "vcnode-shared"

# msize: the largest that virtio's 128 descriptors carry. cache=mmap: writable shared mappings work, and yet
# what the host changes is seen at once. access=any: the agent acts for every user of the container.
_SHARE_OPTIONS = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,access=any"


class Mounts:
    """Prepares roots below *run*.

    Args:
        run: Directory of a tmpfs.
        share_mounted: Whether the share lies at ``<run>/shared`` already.
    """

    def __init__(self, run: str = RUN, *, share_mounted: bool = False) -> None:
        self.run = run
        self._share_mounted = share_mounted

    def container(self, container_id: str) -> str:
        """The directory that holds a container's mounts."""
        return f"{self.run}/containers/{container_id}"

    def root(self, container_id: str) -> str:
        """The container's root."""
        return f"{self.container(container_id)}/root"

    def secrets(self, container_id: str) -> str:
        """The directory with its secrets, in memory."""
        return f"{self.container(container_id)}/secrets"

    def keep_secrets(self, container_id: str, files: tuple[tuple[str, int, bytes], ...], undo: Undo) -> None:
        """Write the container's secrets, each a name, a mode and a content; nothing if there are none."""
        if not files:
            return
        directory = self.secrets(container_id)
        undo.push(f"remove {directory}", partial(_remove_files, directory))
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o755)  # noqa: S103 -- its container sees nothing else of the guest's files
        for name, mode, content in files:
            fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), mode)

    def make_container(self, container_id: str, undo: Undo) -> None:
        """Make the directories; their undo also takes off whatever is mounted there by then."""
        directory = self.container(container_id)
        undo.push(f"remove {directory}", lambda: remove_directory(directory))
        make_directory(directory)
        # The root lies over the layer, so it is made later and undone earlier.
        for path in (f"{directory}/rw", self.root(container_id)):
            undo.push(f"unmount {path}", partial(unmount_directory, path))
            make_directory(path)

    def bind_shared(self, container_id: str, name: str) -> None:
        """Make directory *name* of the share the root; the undo of `make_container` covers it.

        Raises:
            Failure: ``not_found``; the share has no such directory.
        """
        syscalls.mount(self.shared(name), self.root(container_id), None, MS_BIND)

    def shared(self, name: str) -> str:
        """Where directory *name* of the share is. Raises as `bind_shared`."""
        self._mount_share()
        path = f"{self.run}/shared/{name}"
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            mode = 0
        if not stat.S_ISDIR(mode):
            raise Failure(NOT_FOUND, f"The share has no directory {name!r}.")
        return path

    def _mount_share(self) -> None:
        if not self._share_mounted:
            path = f"{self.run}/shared"
            os.makedirs(path, exist_ok=True)
            syscalls.mount(SHARE_TAG, path, "9p", MS_NODEV, _SHARE_OPTIONS)
            self._share_mounted = True

    def overlay(self, container_id: str, lower: str, layer: str | None = None) -> None:
        """Make *lower* under a writable layer the root; the undo of `make_container` covers it.

        The layer is a fresh one in memory, or a mounted disk's directory *layer*, with what is in it already.
        """
        # volatile: a layer in memory has nothing to sync to.
        volatile = ",volatile" if layer is None else ""
        if layer is None:
            layer = f"{self.container(container_id)}/rw"
            syscalls.mount("tmpfs", layer, "tmpfs", MS_NODEV, "mode=0755")
            os.mkdir(f"{layer}/upper", 0o755)
            _copy_mode(lower, f"{layer}/upper")
        elif not os.path.exists(f"{layer}/upper"):
            # Under another name until its mode is right: a VM may end at any moment, and a disk remains.
            os.makedirs(f"{layer}/made", exist_ok=True)
            _copy_mode(lower, f"{layer}/made")
            os.rename(f"{layer}/made", f"{layer}/upper")
        make_directory(f"{layer}/work")
        options = f"lowerdir={lower},upperdir={layer}/upper,workdir={layer}/work{volatile}"
        syscalls.mount("overlay", self.root(container_id), "overlay", 0, options)


def _copy_mode(source: str, target: str) -> None:
    """The root directory of an overlay is its upper directory: give it what the image says."""
    found = os.stat(source)
    made = os.stat(target)
    if (found.st_uid, found.st_gid) != (made.st_uid, made.st_gid):
        os.chown(target, found.st_uid, found.st_gid)
    if found.st_mode != made.st_mode:
        os.chmod(target, stat.S_IMODE(found.st_mode))


def _remove_files(path: str) -> None:
    """Remove a directory of plain files; nothing when it is not there."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return
    for name in names:
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


def remove_directory(path: str) -> None:
    """Remove an empty directory; nothing when it is not there."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
