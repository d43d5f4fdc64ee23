"""Writable disks: of containers, and overlays of the disk images of pods.

Those of containers are sparse ext4 files, each the copy of one that was formatted for its size.

``<state_dir>/layers/<layer_id>`` is a disk, ``.base-<MiB>`` what those of a size are copied from, and
``.new-<layer_id>`` one that is not complete. A copy shares its blocks where the filesystem can (reflink), and
else copies the few hundred KiB that are not holes, so no container waits for a format.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
from pathlib import Path

from vcnode.aio import deadline_as
from vcnode.drivers.audit import Held
from vcnode.drivers.base import LayerFile
from vcnode.drivers.storage import tools
from vcnode.drivers.storage.threads import Undo, make_in_thread
from vcnode.drivers.storage.vmdirs import check_name
from vcnode.errors import DeadlineExceededError, ResourceExhaustedError, StorageError

log = logging.getLogger(__name__)

MKFS = "mkfs.ext4"
QEMU_IMG = "qemu-img"
_UUID = "00000000-0000-0000-0000-000000000001"
_MIB = 1024 * 1024
_RESERVE_BYTES = 256 * _MIB
"""Left free on the state directory's filesystem: the database and the other pods need it."""
_COPY_BYTES = 1 << 30
_OVERLAY_BYTES = 64 * _MIB
"""Most that an empty overlay takes; a hundredth of that for a disk of a TiB."""
BASE = ".base-"
FICLONE = 0x40049409
"""Source: linux/fs.h, _IOW(0x94, 9, int); ioctl_ficlone(2)."""


def mkfs_argv(target: str) -> list[str]:
    """The command that formats *target* and writes next to nothing: what it leaves out is zeros already."""
    options = f"hash_seed={_UUID},root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1"
    return [
        MKFS,
        "-q",
        "-F",
        "-m",
        "0",
        "-J",
        "size=4",
        "-O",
        "^resize_inode",
        "-U",
        _UUID,
        "-E",
        options,
        target,
    ]


class LayerStore:
    """The directory ``<state_dir>/layers``."""

    def __init__(self, state_dir: Path, *, reserve_bytes: int = _RESERVE_BYTES) -> None:
        self._dir = Path(os.path.realpath(state_dir)) / "layers"
        self._reserve_bytes = reserve_bytes
        self._formatting = asyncio.Lock()

    def sweep(self) -> None:
        """Make the directory, and remove what was not completed. Blocking. Raises OSError."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._dir.glob(".new-*"):
            path.unlink()

    def held(self, mark: str) -> list[Held]:
        """The disks whose id begins with *mark*. Blocking."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._dir))
        except FileNotFoundError:
            return []
        return [Held("disk", str(self._dir / name), name) for name in names if name.startswith(mark)]

    def bases(self) -> list[Held]:
        """What disks are copied from. Blocking."""
        return [Held("disk", str(path), None) for path in sorted(self._dir.glob(f"{BASE}*"))]

    async def make(self, layer_id: str, size_mib: int, *, timeout_s: float) -> LayerFile:
        """See `vcnode.drivers.base.Storage.make_layer`. Raises OSError besides."""
        path = self._dir / check_name(layer_id)
        late = DeadlineExceededError(f"Making disk {layer_id} took longer than {timeout_s:g} s.")
        async with deadline_as(timeout_s, lambda: late):
            if await asyncio.to_thread(path.exists):
                return LayerFile(path, is_new=False)
            base = await self._base(size_mib)
            await make_in_thread(self._copy, base, path)
        return LayerFile(path, is_new=True)

    async def open_overlay(self, layer_id: str, size_bytes: int, *, timeout_s: float) -> int:
        """Open what is written over a disk image of that size: an empty qcow2 image, made unless it is there.

        It names no image: whoever opens it says what lies beneath. The caller closes the descriptor.

        Raises:
            DeadlineExceededError, ResourceExhaustedError, StorageError: It could not be made, and nothing is
                left.
            OSError: The host refused.
        """
        path = self._dir / check_name(layer_id)
        late = DeadlineExceededError(f"Making disk {layer_id} took longer than {timeout_s:g} s.")
        async with deadline_as(timeout_s, lambda: late):
            if not await asyncio.to_thread(path.exists):
                await self._make_overlay(path, size_bytes)
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    async def _make_overlay(self, path: Path, size_bytes: int) -> None:
        self._check_space()
        new = path.with_name(f".new-{path.name}")
        argv = [QEMU_IMG, "create", "-q", "-f", "qcow2", str(new), str(-(-size_bytes // 512) * 512)]
        try:
            ended = await tools.run(argv, file_bytes=_OVERLAY_BYTES)
            if ended.returncode != 0:
                log.error("%s failed (exit %d): %s", QEMU_IMG, ended.returncode, ended.errors)
                raise StorageError(f"{QEMU_IMG} failed; the node's log says why.")
            new.chmod(0o600)
            await asyncio.to_thread(_settle, new, path)
        except FileNotFoundError as exc:
            raise StorageError(f"{QEMU_IMG} is not installed on this node: install qemu-utils.") from exc
        finally:
            new.unlink(missing_ok=True)

    def remove(self, layer_id: str) -> None:
        """See `vcnode.drivers.base.Storage.remove_layer`. Blocking. Raises OSError."""
        (self._dir / check_name(layer_id)).unlink(missing_ok=True)

    async def _base(self, size_mib: int) -> Path:
        """The formatted file of that size, made once."""
        base = self._dir / f"{BASE}{size_mib}"
        async with self._formatting:
            if await asyncio.to_thread(base.exists):
                return base
            new = self._dir / f".new-base-{size_mib}"
            try:
                await asyncio.to_thread(_make_hole, new, size_mib * _MIB)
                ended = await tools.run(mkfs_argv(str(new)), file_bytes=size_mib * _MIB)
                if ended.returncode != 0:
                    log.error("%s failed (exit %d): %s", MKFS, ended.returncode, ended.errors)
                    raise StorageError(f"{MKFS} failed; the node's log says why.")
                await asyncio.to_thread(_settle, new, base)
            except FileNotFoundError as exc:
                raise StorageError(f"{MKFS} is not installed on this node: install e2fsprogs.") from exc
            finally:
                new.unlink(missing_ok=True)
        return base

    def _check_space(self) -> None:
        space = os.statvfs(self._dir)
        if space.f_bavail * space.f_frsize < self._reserve_bytes:
            raise ResourceExhaustedError(
                f"There is not enough space for a writable disk: free some below {self._dir}.",
                resource="disk",
                reserve_bytes=self._reserve_bytes,
            )

    def _copy(self, undo: list[Undo], base: Path, path: Path) -> None:
        """Copy *base* to *path*, in one step as others see it."""
        self._check_space()
        new = path.with_name(f".new-{path.name}")
        undo.append(lambda: new.unlink(missing_ok=True))
        with base.open("rb", buffering=0) as source, new.open("xb", buffering=0) as target:
            os.fchmod(target.fileno(), 0o600)
            clone(source.fileno(), target.fileno())
        undo.append(lambda: path.unlink(missing_ok=True))
        _settle(new, path)


def clone(source: int, target: int) -> None:
    """Make the empty file *target* equal to *source*, sharing blocks or at least holes. Blocking."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        return
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL):
            raise
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            count = os.copy_file_range(source, target, min(end - at, _COPY_BYTES), at, at)
            if count == 0:
                raise OSError(errno.EIO, "The file became shorter while it was copied")
            at += count


def _make_hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)


def _settle(new: Path, path: Path) -> None:
    """Give a complete file its name, durably: what is in it must not be less than the name promises."""
    fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
