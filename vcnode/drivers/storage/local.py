"""Storage on the node's own disk: bind mounts for directories, erofs files for images. Needs root."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from vcnode.drivers.audit import Held
from vcnode.drivers.base import ImageFile, LayerFile, PullSource
from vcnode.drivers.exhaustion import exhausted
from vcnode.drivers.storage import qcow2
from vcnode.drivers.storage.hooks import open_hook
from vcnode.drivers.storage.images import Around, ImageStore, no_points
from vcnode.drivers.storage.layers import LayerStore
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.registry import Progress
from vcnode.drivers.storage.secrets import read_secret
from vcnode.drivers.storage.sockets import HostSockets
from vcnode.drivers.storage.threads import Undo, in_thread, make_in_thread
from vcnode.drivers.storage.vmdirs import VmDirs
from vcnode.errors import StorageError
from vcnode.models.hypervisor import DiskFormat
from vcnode.models.image import ImageConfig
from vcnode.models.vm import DiskFile
from vcnode.settings import ImageSettings

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def _translated(what: str) -> AsyncIterator[None]:
    """Turn what the host says into a StorageError; *what* names the operation and its object."""
    try:
        yield
    except PermissionError as exc:
        raise StorageError(f"{what} was not permitted: the node agent must run as root.") from exc
    except TimeoutError as exc:
        raise StorageError(f"{what} took too long: a filesystem of the host does not answer.") from exc
    except OSError as exc:
        raise exhausted(exc) or StorageError(f"{what} failed; the node's log says why.") from exc


class LocalStorage:
    """`vcnode.drivers.base.Storage` on this host. It keeps nothing in memory: the mounts are the truth.

    Args:
        state_dir: Holds ``images/`` and ``layers/``.
        run_dir: Holds ``vms/<vm_id>/``.
        allowed_roots: Directories under which shared directories and image sources must lie.
        images: Limits of images, and how registries are reached.
        around: As of `ImageStore`.
        secret_dirs: Directories under which files with secrets must lie.
        hook_dirs: Directories under which hooks must lie.
    """

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        allowed_roots: Sequence[Path],
        images: ImageSettings = ImageSettings(),  # noqa: B008 -- frozen
        *,
        around: Around = no_points,
        secret_dirs: Sequence[Path] = (),
        hook_dirs: Sequence[Path] = (),
    ) -> None:
        self._hook_roots = AllowedRoots(hook_dirs, private=(state_dir, run_dir))
        self._secret_roots = AllowedRoots(secret_dirs, private=(state_dir, run_dir))
        roots = AllowedRoots(allowed_roots, private=(state_dir, run_dir))
        self._roots = roots
        self._dirs = VmDirs(run_dir, roots)
        self._sockets = HostSockets(self._dirs, roots)
        self._images = ImageStore(state_dir, roots, images, around=around)
        self._layers = LayerStore(state_dir)

    async def open(self) -> None:
        """Remove what was left incomplete. To be called once, before anything else.

        Raises:
            StorageError: The state directory cannot be used.
        """
        async with _translated("Sweeping the image directory"):
            await in_thread(self._images.sweep)
        async with _translated("Sweeping the directory of writable disks"):
            await in_thread(self._layers.sweep)

    async def vm_ids(self) -> Sequence[str]:
        """VMs that have a directory here, so that recovery can find those that no record knows."""
        async with _translated("Listing the directories of VMs"):
            return await in_thread(self._dirs.ids)

    async def held(self, mark: str) -> Sequence[Held]:
        """See `vcnode.drivers.audit.Auditable`: VMs' directories, mounts in them, their sockets; disks."""
        async with _translated("Listing the directories of VMs"):
            return [
                *await in_thread(self._sockets.held, mark),
                *await in_thread(self._dirs.held, mark),
                *await in_thread(self._layers.held, mark),
                *await in_thread(self._layers.bases),
            ]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See `vcnode.drivers.audit.Auditable`: the VM's directory goes with all that is in it."""
        if held.kind == "disk":
            await self.remove_layer(held.vm_id or "")
        else:
            await self.remove_vm_dir(held.vm_id or "")

    async def make_vm_dir(self, vm_id: str) -> Path:
        """See `vcnode.drivers.base.Storage`. AlreadyExistsError when the VM has one."""
        async with _translated(f"Making the directory of VM {vm_id}"):
            return await make_in_thread(self._dirs.make, vm_id)

    async def remove_vm_dir(self, vm_id: str) -> None:
        """See `vcnode.drivers.base.Storage`. Never deletes what is shared, even if that cannot be unmounted.

        Raises:
            StorageError: Something stays; may be tried again.
        """
        async with _translated(f"Removing the directory of VM {vm_id}"):
            await in_thread(self._remove_vm_dir, vm_id)

    def _remove_vm_dir(self, vm_id: str) -> None:
        self._sockets.remove(vm_id)
        self._dirs.remove(vm_id)

    async def write_note(self, vm_id: str, text: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Writing the note of VM {vm_id}"):
            await in_thread(self._dirs.write_note, vm_id, text)

    async def read_notes(self, mark: str) -> Mapping[str, str]:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated("Reading the notes of VMs"):
            return await in_thread(self._dirs.read_notes, mark)

    async def check_rootfs(self, path: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Looking at {path!r}"):
            await in_thread(self._roots.check_directory, path)

    async def open_file(self, path: str, *, writable: bool = False) -> int:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Opening {path!r}"):
            return await make_in_thread(_opened, partial(self._roots.open_file, path, writable=writable))

    async def open_hook(self, path: str) -> int:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Opening {path!r}"):
            return await make_in_thread(_opened, partial(open_hook, self._hook_roots, path))

    async def listen(self, vm_id: str, path: str) -> int:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Listening at {path!r}"):
            return await make_in_thread(_opened, partial(self._sockets.listen, vm_id, path))

    async def connect(self, path: str) -> int:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Connecting to {path!r}"):
            return await make_in_thread(_opened, partial(self._sockets.connect, path))

    async def open_disk(
        self,
        path: str,
        disk_format: DiskFormat,
        *,
        writable: bool = False,
        overlay_id: str | None = None,
        timeout_s: float,
    ) -> DiskFile:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Opening disk image {path!r}"):
            fd, size_bytes = await make_in_thread(self._open_image, path, disk_format, writable)
            if writable or overlay_id is None:
                return DiskFile(fd=fd, format=disk_format, read_only=not writable)
            try:
                over = await self._layers.open_overlay(overlay_id, size_bytes, timeout_s=timeout_s)
            except BaseException:
                os.close(fd)
                raise
            return DiskFile(fd=over, format=DiskFormat.QCOW2, base_fd=fd, base_format=disk_format)

    def _open_image(
        self, undo: list[Undo], path: str, disk_format: DiskFormat, writable: bool
    ) -> tuple[int, int]:
        fd = self._roots.open_file(path, writable=writable)
        undo.append(lambda: os.close(fd))
        if disk_format is DiskFormat.QCOW2:
            return fd, qcow2.size_bytes(os.pread(fd, qcow2.HEADER_BYTES, 0), path)
        return fd, os.fstat(fd).st_size

    async def read_secret(self, path: str, *, private: bool = False) -> bytes:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated("Reading a secret"):
            return await in_thread(read_secret, self._secret_roots, path, private=private)

    async def share(self, vm_id: str, name: str, path: str, *, read_only: bool = False) -> None:
        """See `vcnode.drivers.base.Storage`. AlreadyExistsError when *name* is taken."""
        async with _translated(f"Sharing {path!r} with VM {vm_id}"):
            await make_in_thread(partial(self._dirs.share, read_only=read_only), vm_id, name, path)

    async def unshare(self, vm_id: str, name: str) -> None:
        """See `vcnode.drivers.base.Storage`.

        Raises:
            StorageError: It stays mounted; may be tried again.
        """
        async with _translated(f"Taking the share {name} away from VM {vm_id}"):
            await in_thread(self._dirs.unshare, vm_id, name)

    async def build_image(self, source: str, *, timeout_s: float) -> ImageFile:
        """See `vcnode.drivers.base.Storage` and `ImageStore.build`."""
        async with _translated(f"Making an image of {source!r}"):
            return await self._images.build(source, timeout_s=timeout_s)

    async def pull_image(
        self,
        source: PullSource,
        known: Callable[[str], tuple[str, ImageConfig] | None],
        progress: Progress,
        *,
        timeout_s: float,
    ) -> ImageFile:
        """See `vcnode.drivers.base.Storage` and `ImageStore.pull`."""
        async with _translated(f"Pulling {source.reference!r}"):
            return await self._images.pull(source, known, progress, timeout_s=timeout_s)

    async def blank_image(self, *, timeout_s: float) -> ImageFile:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated("Making an empty image"):
            return await self._images.blank(timeout_s=timeout_s)

    async def image_file(self, digest: str) -> ImageFile:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Looking for image {digest}"):
            return await in_thread(self._images.file, digest)

    async def image_files(self) -> Sequence[ImageFile]:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated("Listing the images"):
            return await in_thread(self._images.files)

    async def remove_image(self, digest: str) -> None:
        """See `vcnode.drivers.base.Storage`. VMs that have it attached go on reading it."""
        async with _translated(f"Removing image {digest}"):
            await in_thread(self._images.remove, digest)

    async def make_layer(self, layer_id: str, size_mib: int, *, timeout_s: float) -> LayerFile:
        """See `vcnode.drivers.base.Storage` and `LayerStore`."""
        async with _translated(f"Making disk {layer_id}"):
            return await self._layers.make(layer_id, size_mib, timeout_s=timeout_s)

    async def remove_layer(self, layer_id: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        async with _translated(f"Removing disk {layer_id}"):
            await in_thread(self._layers.remove, layer_id)


def _opened(undo: list[Undo], work: Callable[[], int]) -> int:
    """The descriptor that *work* opens; *undo* closes it."""
    fd = work()
    undo.append(lambda: os.close(fd))
    return fd
