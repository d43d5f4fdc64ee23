"""Storage that only pretends: no root, nothing on disk. Its small world is there for tests to inspect."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vcnode.drivers.audit import Held
from vcnode.drivers.base import ImageFile, LayerFile, PullSource
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.storage.images import check_digest
from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.drivers.storage.vmdirs import check_name
from vcnode.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError, StorageError
from vcnode.models.hypervisor import DiskFormat
from vcnode.models.image import ImageConfig, PullProgress
from vcnode.models.vm import DiskFile


@dataclass
class MockWorld:
    """What a real host would hold. Give the same world to a new driver to play a restart of the node."""

    vm_dirs: set[str] = field(default_factory=set)
    """VMs that have a directory."""
    shares: dict[tuple[str, str], str] = field(default_factory=dict)
    """(VM, name) -> host path."""
    notes: dict[str, str] = field(default_factory=dict)
    """By VM id."""
    images: dict[str, ImageFile] = field(default_factory=dict)
    """By digest."""
    layers: dict[str, int] = field(default_factory=dict)
    """Writable disks by id, with their sizes in MiB."""
    sockets: dict[str, str] = field(default_factory=dict)
    """Sockets on the host by path, with the VM that each leads to."""

    @property
    def empty(self) -> bool:
        """Whether no VM and no container holds anything (images stay, as they do in life)."""
        return not self.vm_dirs and not self.shares and not self.layers and not self.sockets


def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


class MockStorage:
    """`vcnode.drivers.base.Storage` without a disk.

    Any path below the allowed roots counts as a directory, whether it exists or not, except where a
    component is ``missing``: that is not found, so that schedulers can test this answer. The digest of an
    image is that of its source's path.

    Args:
        allowed_roots: As of the real driver; judged by name.
        secret_dirs: As of the real driver; a file there holds ``secret of <path>``.
        hook_dirs: As of the real driver; a hook there does nothing, and fails if its name has ``fail`` in it.
        faults: Operations are ``storage.make_vm_dir``, ``storage.share`` and so on.
        world: What is there already.
    """

    def __init__(
        self,
        allowed_roots: Sequence[Path],
        *,
        run_dir: Path = Path("/run/vcnode"),
        secret_dirs: Sequence[Path] = (),
        hook_dirs: Sequence[Path] = (),
        faults: FaultPlan | None = None,
        world: MockWorld | None = None,
    ) -> None:
        self._roots = AllowedRoots(allowed_roots, private=())
        self._secret_roots = AllowedRoots(secret_dirs, private=())
        self._hook_roots = AllowedRoots(hook_dirs, private=())
        self._run_dir = run_dir
        self._faults = faults
        self.world = world if world is not None else MockWorld()

    async def _hit(self, op: str, vm_id: str | None = None) -> None:
        if self._faults is not None:
            await self._faults.hit(f"storage.{op}", vm_id=vm_id)

    def _check(self, path: str) -> None:
        self._roots.judge(path)
        if "missing" in Path(path).parts:
            raise NotFoundError(f"Host path {path!r} does not exist.", path=path)

    async def open(self) -> None:
        """Nothing to do."""

    async def vm_ids(self) -> Sequence[str]:
        """VMs that have a directory."""
        return sorted(self.world.vm_dirs)

    async def held(self, mark: str) -> Sequence[Held]:
        """See `vcnode.drivers.audit.Auditable`."""
        await self._hit("held")
        shares = [Held("mount", f"{vm}/shared/{name}", vm) for vm, name in sorted(self.world.shares)]
        directories = [Held("directory", str(self._run_dir / "vms" / vm), vm) for vm in await self.vm_ids()]
        disks = [Held("disk", f"layers/{layer_id}", layer_id) for layer_id in sorted(self.world.layers)]
        sockets = [Held("socket", path, vm) for path, vm in sorted(self.world.sockets.items())]
        every = (*shares, *sockets, *directories, *disks)
        return [held for held in every if held.vm_id and held.vm_id.startswith(mark)]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See `vcnode.drivers.audit.Auditable`."""
        if held.kind == "disk":
            await self.remove_layer(held.vm_id or "")
        else:
            await self.remove_vm_dir(held.vm_id or "")

    async def make_vm_dir(self, vm_id: str) -> Path:
        """See `vcnode.drivers.base.Storage`; the path that is returned does not exist."""
        check_name(vm_id)
        await self._hit("make_vm_dir", vm_id)
        if vm_id in self.world.vm_dirs:
            raise AlreadyExistsError(f"VM {vm_id} has a directory already.", vm_id=vm_id)
        self.world.vm_dirs.add(vm_id)
        return self._run_dir / "vms" / vm_id

    async def remove_vm_dir(self, vm_id: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        check_name(vm_id)
        await self._hit("remove_vm_dir", vm_id)
        self.world.vm_dirs.discard(vm_id)
        self.world.notes.pop(vm_id, None)
        for key in [key for key in self.world.shares if key[0] == vm_id]:
            del self.world.shares[key]
        for path in [path for path, owner in self.world.sockets.items() if owner == vm_id]:
            del self.world.sockets[path]

    async def write_note(self, vm_id: str, text: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        check_name(vm_id)
        await self._hit("write_note", vm_id)
        if vm_id not in self.world.vm_dirs:
            raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id)
        self.world.notes[vm_id] = text

    async def read_notes(self, mark: str) -> Mapping[str, str]:
        """See `vcnode.drivers.base.Storage`."""
        await self._hit("read_notes")
        return {vm_id: text for vm_id, text in self.world.notes.items() if vm_id.startswith(mark)}

    async def check_rootfs(self, path: str) -> None:
        """See `vcnode.drivers.base.Storage`; nothing is looked at."""
        await self._hit("check_rootfs")
        self._check(path)

    async def open_file(self, path: str, *, writable: bool = False) -> int:
        """See `vcnode.drivers.base.Storage`; the descriptor leads nowhere."""
        await self._hit("open_file")
        self._check(path)
        return _nowhere()

    async def open_disk(
        self,
        path: str,
        disk_format: DiskFormat,
        *,
        writable: bool = False,
        overlay_id: str | None = None,
        timeout_s: float,
    ) -> DiskFile:
        """See `vcnode.drivers.base.Storage`; the descriptors lead nowhere."""
        await self._hit("open_disk")
        self._check(path)
        if overlay_id is None or writable:
            return DiskFile(fd=_nowhere(), format=disk_format, read_only=not writable)
        self.world.layers.setdefault(check_name(overlay_id), 0)
        return DiskFile(fd=_nowhere(), format=DiskFormat.QCOW2, base_fd=_nowhere(), base_format=disk_format)

    async def open_hook(self, path: str) -> int:
        """See `vcnode.drivers.base.Storage`; the program is ``true``, or ``false``."""
        await self._hit("open_hook")
        self._hook_roots.judge(path)
        if "missing" in Path(path).parts:
            raise NotFoundError(f"Host path {path!r} does not exist.", path=path)
        program = shutil.which("false" if "fail" in Path(path).name else "true") or "/bin/true"
        return os.open(program, os.O_RDONLY | os.O_CLOEXEC)

    async def listen(self, vm_id: str, path: str) -> int:
        """See `vcnode.drivers.base.Storage`; the descriptor leads nowhere."""
        await self._hit("listen", vm_id)
        self._check(path)
        if vm_id not in self.world.vm_dirs:
            raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id)
        if path in self.world.sockets:
            raise FailedPreconditionError(f"There is something at {path!r} already.", path=path)
        self.world.sockets[path] = vm_id
        return _nowhere()

    async def connect(self, path: str) -> int:
        """See `vcnode.drivers.base.Storage`; the descriptor leads nowhere."""
        await self._hit("connect")
        self._check(path)
        return _nowhere()

    async def read_secret(self, path: str, *, private: bool = False) -> bytes:
        """See `vcnode.drivers.base.Storage`; nothing is read."""
        await self._hit("read_secret")
        self._secret_roots.judge(path)
        if "missing" in Path(path).parts:
            raise NotFoundError(f"Host path {path!r} does not exist.", path=path)
        return f"secret of {path}".encode()

    async def share(self, vm_id: str, name: str, path: str, *, read_only: bool = False) -> None:
        """See `vcnode.drivers.base.Storage`."""
        check_name(name)
        await self._hit("share", vm_id)
        self._check(path)
        if vm_id not in self.world.vm_dirs:
            raise StorageError(f"VM {vm_id} has no directory on this node.", vm_id=vm_id)
        if (vm_id, name) in self.world.shares:
            raise AlreadyExistsError(f"VM {vm_id} has a share {name} already.", vm_id=vm_id, name=name)
        self.world.shares[vm_id, name] = path

    async def unshare(self, vm_id: str, name: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        check_name(name)
        await self._hit("unshare", vm_id)
        self.world.shares.pop((vm_id, name), None)

    async def build_image(self, source: str, *, timeout_s: float) -> ImageFile:
        """See `vcnode.drivers.base.Storage`; nothing is read."""
        await self._hit("build_image")
        self._check(source)
        name = hashlib.sha256(source.encode()).hexdigest()
        image = ImageFile(f"sha256:{name}", Path(f"/nonexistent/sha256-{name}.erofs"), 4096)
        return self.world.images.setdefault(image.digest, image)

    async def pull_image(
        self,
        source: PullSource,
        known: Callable[[str], tuple[str, ImageConfig] | None],
        progress: Callable[[PullProgress], Awaitable[None]],
        *,
        timeout_s: float,
    ) -> ImageFile:
        """See `vcnode.drivers.base.Storage`; no registry is asked.

        Every image exists, unless its name has a component ``missing``. Its digest is that of its name, its
        command ``sh``.
        """
        await progress(PullProgress(phase="resolving"))
        await self._hit("pull_image")
        if "missing" in source.reference.split("/"):
            raise NotFoundError(
                f"The registry has no image {source.reference!r}.", reference=source.reference
            )
        name = hashlib.sha256(source.reference.encode()).hexdigest()
        manifest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        if (found := known(manifest)) is not None and found[0] in self.world.images:
            return self.world.images[found[0]]
        await progress(PullProgress(phase="downloading", done_bytes=4096, total_bytes=4096))
        image = ImageFile(
            f"sha256:{name}",
            Path(f"/nonexistent/sha256-{name}.erofs"),
            4096,
            config=ImageConfig(cmd=("sh",)),
            manifest_digest=manifest,
        )
        return self.world.images.setdefault(image.digest, image)

    async def blank_image(self, *, timeout_s: float) -> ImageFile:
        """See `vcnode.drivers.base.Storage`; the path that is returned does not exist."""
        await self._hit("blank_image")
        name = hashlib.sha256(b"").hexdigest()
        return ImageFile(f"sha256:{name}", Path(f"/nonexistent/sha256-{name}.erofs"), 4096)

    async def image_file(self, digest: str) -> ImageFile:
        """See `vcnode.drivers.base.Storage`."""
        await self._hit("image_file")
        check_digest(digest)
        try:
            return self.world.images[digest]
        except KeyError as exc:
            raise NotFoundError(f"This node has no image file {digest}.", digest=digest) from exc

    async def image_files(self) -> Sequence[ImageFile]:
        """See `vcnode.drivers.base.Storage`."""
        await self._hit("image_files")
        return [self.world.images[digest] for digest in sorted(self.world.images)]

    async def remove_image(self, digest: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        await self._hit("remove_image")
        check_digest(digest)
        self.world.images.pop(digest, None)

    async def make_layer(self, layer_id: str, size_mib: int, *, timeout_s: float) -> LayerFile:
        """See `vcnode.drivers.base.Storage`; the path that is returned does not exist."""
        check_name(layer_id)
        await self._hit("make_layer")
        is_new = layer_id not in self.world.layers
        self.world.layers.setdefault(layer_id, size_mib)
        return LayerFile(Path("/nonexistent/layers") / layer_id, is_new)

    async def remove_layer(self, layer_id: str) -> None:
        """See `vcnode.drivers.base.Storage`."""
        check_name(layer_id)
        await self._hit("remove_layer")
        self.world.layers.pop(layer_id, None)
