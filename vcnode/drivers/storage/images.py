"""Images: read-only erofs files, named after the digest of their bytes and shared by all pods.

A build goes through a directory of its own below ``images/tmp``: the source, bound there read-only with
links not followed, or unpacked there from a tar; then ``mkfs.erofs``; then the digest; then one rename.
Whatever interrupts it, an image is either complete and synced under its final name or not there, and
`ImageStore.sweep` removes the rest at the next start.

Not compressed: the page cache then holds what the guests read, once for all pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import vcnode
from vcnode.aio import deadline_as, finish
from vcnode.drivers.base import ImageFile, PullSource
from vcnode.drivers.storage import oci, syscalls, tools, unpack
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.registry import Progress, Registry
from vcnode.drivers.storage.threads import in_thread
from vcnode.drivers.storage.trees import remove_tree, unmount_below
from vcnode.drivers.storage.vmdirs import HARDENED
from vcnode.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StorageError,
)
from vcnode.models.image import ImageConfig, PullProgress
from vcnode.settings import ImageSettings

log = logging.getLogger(__name__)

MKFS = "mkfs.erofs"
Around = Callable[[str], contextlib.AbstractContextManager[None]]


def no_points(_step: str) -> contextlib.AbstractContextManager[None]:
    """No failpoints."""
    return contextlib.nullcontext()


_RESERVE_BYTES = 256 * 1024 * 1024
"""Left free on the state directory's filesystem: the database and the other pods need it."""
_UNPACK_MEMORY_BYTES = 1024 * 1024 * 1024
_CLEAN_UP_S = 60.0
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_FILE = re.compile(r"sha256-([0-9a-f]{64})\.erofs")
BLANK = "blank.erofs"
"""The image with nothing in it."""
_CHUNK_BYTES = 1024 * 1024
_UUID = "00000000-0000-0000-0000-000000000000"
_EPOCH_2100 = "4102444800"
"""mkfs.erofs writes SOURCE_DATE_EPOCH instead of the present time into the superblock, and sets all times
after it back to it: a moment far ahead keeps the files' own times."""


def check_digest(digest: str) -> str:
    """The 64 hex digits of *digest*.

    Raises:
        InvalidArgumentError: It is not ``sha256:`` and 64 hex digits in lower case.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidArgumentError(f"{digest!r} is not a digest.", digest=digest)
    return match[1]


def mkfs_argv(target: str, source: str) -> list[str]:
    """The command that makes the same bytes of the same tree, every time (with SOURCE_DATE_EPOCH)."""
    return [MKFS, "--quiet", "-U", _UUID, "--preserve-mtime", "-Eforce-inode-extended", target, source]


class ImageStore:
    """The directory ``<state_dir>/images``.

    Args:
        state_dir: Where it lies; made when needed.
        roots: Where sources may lie.
        settings: Limits, and how registries are reached.
        reserve_bytes: Space that a build leaves free.
        around: Entered around each step of a build, with its name: ``image.fetch``, ``image.unpack``,
            ``image.mkfs``, ``image.rename``; for failpoints.
    """

    def __init__(
        self,
        state_dir: Path,
        roots: AllowedRoots,
        settings: ImageSettings = ImageSettings(),  # noqa: B008 -- frozen
        *,
        reserve_bytes: int = _RESERVE_BYTES,
        around: Around = no_points,
    ) -> None:
        self._around = around
        self._dir = Path(os.path.realpath(state_dir)) / "images"
        self._tmp = self._dir / "tmp"
        self._roots = roots
        self._reserve_bytes = reserve_bytes
        # One build at a time: two would each think that all the free space is theirs.
        self._building = asyncio.Lock()
        self._pulling = asyncio.Semaphore(settings.concurrent_pulls)
        self._registry = Registry(settings)
        self._max_bytes = settings.max_size_mib * 1024 * 1024

    def sweep(self) -> None:
        """Remove what interrupted builds left. Blocking. Idempotent.

        Raises:
            OSError: Something stays.
        """
        self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in os.listdir(self._tmp):
            self._clear(name)

    async def build(self, source: str, *, timeout_s: float) -> ImageFile:
        """Make an image; see `vcnode.drivers.base.Storage.build_image`. Nothing of a failed one is left.

        Raises:
            InvalidArgumentError: Outside the allowed roots, or neither a directory nor a sound tar file.
            NotFoundError: *source* does not exist.
            ResourceExhaustedError: There is not enough space.
            DeadlineExceededError: It took longer than *timeout_s*; nothing was made.
            StorageError: Anything else.
            OSError: The host refused.
        """

        def late() -> DeadlineExceededError:
            return DeadlineExceededError(
                f"Making an image of {source!r} took longer than {timeout_s:g} s; nothing was made.",
                path=source,
            )

        async with deadline_as(timeout_s, late), self._building, self._job() as job:
            plan = await self._prepare(source, job)
            return await self._make(source, job, plan)

    async def blank(self, *, timeout_s: float) -> ImageFile:
        """See `vcnode.drivers.base.Storage.blank_image`. Made once. Raises as `build`.

        It has a name of its own: no record names it, and what no record names is removed.
        """
        late = DeadlineExceededError(f"Making an empty image took longer than {timeout_s:g} s.")
        async with deadline_as(timeout_s, lambda: late), self._building, self._job() as job:
            path = self._dir / BLANK
            if not await in_thread(path.exists):
                target = job / "image.erofs"
                await self._mkfs("nothing", target, job / "root")
                await in_thread(_settle, target, path)
            return await in_thread(_described, path)

    async def pull(
        self,
        source: PullSource,
        known: Callable[[str], tuple[str, ImageConfig] | None],
        progress: Progress,
        *,
        timeout_s: float,
    ) -> ImageFile:
        """Fetch an image and make its file; see `vcnode.drivers.base.Storage.pull_image`."""
        what = source.reference

        def late() -> DeadlineExceededError:
            return DeadlineExceededError(
                f"Pulling {what!r} took longer than {timeout_s:g} s; nothing was made.", reference=what
            )

        async with deadline_as(timeout_s, late), self._pulling, self._job() as job:
            await progress(PullProgress(phase="resolving"))
            try:
                resolved = await self._registry.resolve(source, job)
            except oci.BadImageError as exc:
                raise InvalidArgumentError(f"{what!r} {exc}.", reference=what) from exc
            if (found := await self._found(known(resolved.digest))) is not None:
                return replace(found, manifest_digest=resolved.digest)
            if resolved.total_bytes > self._max_bytes:
                raise InvalidArgumentError(f"{what!r} is larger than an image may be.", reference=what)
            if resolved.total_bytes > self._room():
                raise self._no_space(what)
            with self._around("image.fetch"):
                layout = await self._registry.fetch(source, resolved, job, progress, file_bytes=self._room())
            size = resolved.total_bytes
            await progress(PullProgress(phase="unpacking", done_bytes=size, total_bytes=size))
            async with self._building:
                plan = await self._unpack_layout(what, layout, job / "root")
                image = await self._make(what, job, plan)
            return replace(image, manifest_digest=resolved.digest)

    async def _found(self, known: tuple[str, ImageConfig] | None) -> ImageFile | None:
        """The file of a known image, if it is still there."""
        if known is None:
            return None
        try:
            return replace(await in_thread(self.file, known[0]), config=known[1])
        except NotFoundError:
            return None

    def file(self, digest: str) -> ImageFile:
        """The file of *digest*. Blocking.

        Raises:
            NotFoundError: There is none.
        """
        path = self._path(digest)
        try:
            return ImageFile(digest, path, path.stat().st_size)
        except FileNotFoundError as exc:
            raise NotFoundError(f"This node has no image file {digest}.", digest=digest) from exc

    def files(self) -> list[ImageFile]:
        """All complete images, in order of their digests. Blocking."""
        found = []
        with os.scandir(self._dir) as entries:
            for entry in entries:
                if match := _FILE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # it went while we looked
                        size = entry.stat(follow_symlinks=False).st_size
                        found.append(ImageFile(f"sha256:{match[1]}", self._dir / entry.name, size))
        return sorted(found, key=lambda file: file.digest)

    def remove(self, digest: str) -> None:
        """Delete the file of *digest*. Blocking. Idempotent; who has it open can go on reading."""
        try:
            self._path(digest).unlink()
        except FileNotFoundError:
            return
        _sync_directory(self._dir)

    def _path(self, digest: str) -> Path:
        return self._dir / f"sha256-{check_digest(digest)}.erofs"

    def _clear(self, name: str) -> None:
        job = self._tmp / name
        if not os.path.lexists(job):
            return
        if not job.is_dir() or job.is_symlink():
            job.unlink()
            return
        unmount_below(str(job))
        tmp = os.open(self._tmp, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            remove_tree(tmp, name)
        finally:
            os.close(tmp)

    @contextlib.asynccontextmanager
    async def _job(self) -> AsyncIterator[Path]:
        """A directory for one build, with an empty ``root`` in it; gone at the end, whatever happens."""
        name = secrets.token_hex(8)
        job = self._tmp / name
        try:
            self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
            (job / "root").mkdir(mode=0o755, parents=True)
            yield job
        finally:
            try:
                await finish(asyncio.to_thread(self._clear, name), timeout_s=_CLEAN_UP_S)
            except (OSError, TimeoutError):
                # The image may be made all the same; what is left goes at the next start.
                log.warning("Cannot remove %s now", job, exc_info=True)

    async def _prepare(self, source: str, job: Path) -> oci.Plan | None:
        """Make the tree of *source* appear in ``<job>/root``; returns the plan if it is a container image."""
        with contextlib.ExitStack() as stack:
            fd = await in_thread(self._open, source, stack)
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            if kind == stat.S_IFREG:
                with contextlib.ExitStack() as tar_stack:
                    tar = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                    tar_stack.callback(os.close, tar)
                    await self._unpack(source, job / "root", {"tar": tar}, (tar,))
                return await self._unpack_archive(source, job)
            if kind != stat.S_IFDIR:
                raise InvalidArgumentError(f"{source!r} is neither a directory nor a tar file.", path=source)
            plan = await self._unpack_layout(source, Path(f"/proc/self/fd/{fd}"), job / "root")
            if plan is None:
                await in_thread(_bind_read_only, fd, str(job / "root"))
            return plan

    def _open(self, source: str, stack: contextlib.ExitStack) -> int:
        """Open *source*; *stack* closes it, so that a cancelled caller loses no descriptor."""
        fd = self._roots.open(source)
        stack.callback(os.close, fd)
        return fd

    async def _unpack_archive(self, source: str, job: Path) -> oci.Plan | None:
        """What was unpacked into ``<job>/root`` may be an image itself: then its layers belong there."""
        root, layout = job / "root", job / "layout"
        if not any((root / name).is_file() for name in ("oci-layout", "manifest.json")):
            return None
        root.rename(layout)
        root.mkdir(mode=0o755)
        plan = await self._unpack_layout(source, layout, root)
        if plan is None:
            root.rmdir()
            layout.rename(root)
        return plan

    async def _unpack_layout(self, source: str, layout: Path, root: Path) -> oci.Plan | None:
        """Unpack the container image in *layout* into *root*; None, and nothing is done, if it is none."""
        with contextlib.ExitStack() as stack:
            fd = os.open(layout, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            try:
                plan = await in_thread(oci.plan, fd)
                if plan is None:
                    return None
                layers = []
                for layer in plan.layers:
                    layer_fd = oci.open_file(fd, layer.path)
                    stack.callback(os.close, layer_fd)
                    layers.append((layer_fd, layer.digest))
            except oci.BadImageError as exc:
                raise InvalidArgumentError(f"{source!r} {exc}.", path=source) from exc
            except FileNotFoundError as exc:
                raise InvalidArgumentError(f"{source!r} lacks a layer.", path=source) from exc
            await self._unpack(source, root, {"layers": layers}, tuple(fd for fd, _ in layers))
        return plan

    async def _unpack(self, source: str, root: Path, job: dict[str, object], fds: tuple[int, ...]) -> None:
        """Run the unpacking process on *job*, whose descriptors are *fds*, with *root* as its target."""
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            limits = {"reserve_bytes": self._reserve_bytes, "max_bytes": self._max_bytes}
            with self._around("image.unpack"):
                ended = await tools.run(
                    unpack_argv({**job, **limits, "root": root_fd}),
                    file_bytes=self._room(),
                    memory_bytes=_UNPACK_MEMORY_BYTES,
                    pass_fds=(*fds, root_fd),
                )
        finally:
            os.close(root_fd)
        try:
            result = json.loads(ended.output)
            outcome, text = result["outcome"], result["text"]
        except (ValueError, KeyError, TypeError):
            outcome, text = "died", ended.errors
        if outcome == "refused":
            raise InvalidArgumentError(f"{source!r} {text}.", path=source)
        if outcome == "no_space":
            raise self._no_space(source)
        if outcome != "done":
            log.error("Unpacking %s failed (exit %d): %s", source, ended.returncode, text)
            raise StorageError(f"{source!r} cannot be unpacked; the node's log says why.", path=source)

    async def _make(self, source: str, job: Path, plan: oci.Plan | None) -> ImageFile:
        """The file of the tree in ``<job>/root``."""
        target = job / "image.erofs"
        await self._mkfs(source, target, job / "root")
        with self._around("image.rename"):
            image = await self._keep(target)
        if plan is None:
            return image
        return replace(image, config=plan.config, manifest_digest=plan.manifest_digest)

    async def _mkfs(self, source: str, target: Path, root: Path) -> None:
        try:
            with self._around("image.mkfs"):
                ended = await tools.run(
                    mkfs_argv(str(target), str(root)),
                    file_bytes=self._room(),
                    env={"SOURCE_DATE_EPOCH": _EPOCH_2100},
                )
        except FileNotFoundError as exc:
            raise StorageError(
                f"{MKFS} is not installed on this node: install the package erofs-utils."
            ) from exc
        if ended.returncode == 0:
            return
        if ended.returncode == -signal.SIGXFSZ or self._room() == 0:
            raise self._no_space(source)
        log.error("%s of %s failed (exit %d): %s", MKFS, source, ended.returncode, ended.errors)
        raise StorageError(f"{MKFS} failed for {source!r}; the node's log says why.", path=source)

    def _room(self) -> int:
        """Bytes that a build may still write."""
        space = os.statvfs(self._dir)
        return max(0, space.f_bavail * space.f_frsize - self._reserve_bytes)

    def _no_space(self, source: str) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"There is not enough space for an image of {source!r}: free some below {self._dir}.",
            resource="disk",
            reserve_bytes=self._reserve_bytes,
        )

    async def _keep(self, target: Path) -> ImageFile:
        """Give the finished file its name. Reading a large file takes long, so this can be stopped."""
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(None, self._digest_and_rename, target, stop)
        try:
            return (await asyncio.shield(work))[0]
        except asyncio.CancelledError:
            stop.set()
            await finish(self._give_up(work), timeout_s=_CLEAN_UP_S)
            raise

    async def _give_up(self, work: asyncio.Future[tuple[ImageFile, bool]]) -> None:
        await asyncio.wait({work})
        if work.exception() is None:
            image, is_new = work.result()
            if is_new:
                await asyncio.to_thread(self.remove, image.digest)

    def _digest_and_rename(self, target: Path, stop: threading.Event) -> tuple[ImageFile, bool]:
        """Returns the image, and whether it was not there before."""
        digest = hashlib.sha256()
        with target.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if stop.is_set():
                    raise InterruptedError(errno.EINTR, "cancelled", str(target))
                digest.update(chunk)
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        name = f"sha256:{digest.hexdigest()}"
        path = self._path(name)
        is_new = not path.exists()
        # Replacing a file by the same bytes harms nobody who reads it.
        target.rename(path)
        _sync_directory(self._dir)
        return ImageFile(name, path, size), is_new


def unpack_argv(job: dict[str, object]) -> list[str]:
    """The command that runs `unpack.main` with an interpreter that sees nothing but the standard library."""
    package = str(Path(vcnode.__file__).parent.parent)
    start = f"import sys; sys.path.append({package!r}); from {unpack.__name__} import main; main()"
    return [sys.executable, "-I", "-S", "-B", "-c", start, json.dumps(job)]


def _settle(new: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    with new.open("rb") as file:
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    new.rename(path)
    _sync_directory(path.parent)


def _described(path: Path) -> ImageFile:
    content = path.read_bytes()
    return ImageFile(f"sha256:{hashlib.sha256(content).hexdigest()}", path, len(content))


def _bind_read_only(source_fd: int, target: str) -> None:
    mount = syscalls.clone_mount(source_fd)
    try:
        # Its owner may swap a file for a link while mkfs reads; links are read there, never followed.
        syscalls.set_mount_attributes(mount, add=HARDENED | syscalls.ATTR_RDONLY)
        fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            syscalls.attach_mount(mount, fd)
        finally:
            os.close(fd)
    finally:
        os.close(mount)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
