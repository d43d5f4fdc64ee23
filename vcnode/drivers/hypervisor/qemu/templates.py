"""Templates on disk and in memory: a booted guest's RAM and state, from which clones start.

On disk a template is a directory ``<state_dir>/templates/<key>`` with ``ram`` (sparse), ``state`` (QEMU's
migration stream without RAM) and ``manifest.json`` with the digests of both. In use, its RAM is a **sealed
memfd**: QEMU 7.2 passes discards of a clone's memory (balloon, free page reporting) on to the file behind it
even though the mapping is private, which would change the memory of every other clone. A memfd with
``F_SEAL_WRITE`` refuses that, whatever QEMU or a guest tries. Source: memfd_create(2), fcntl(2) "File seals".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcnode.errors import HypervisorError, NotFoundError

F_ADD_SEALS = 1033
SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE. Source: linux/fcntl.h; Python has no names."""
CHUNK_BYTES = 1024 * 1024
HOLE_BYTES = 64 * 1024
"""Runs of zeros of this size are left out of the memfd: they would only use memory."""
_ZEROS = bytes(HOLE_BYTES)


class BrokenTemplateError(HypervisorError):
    """A template cannot be used: damaged, incomplete, or QEMU cannot restore it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A template that is being made; `TemplateStore.publish` or `TemplateStore.discard` ends it."""

    directory: Path

    @property
    def ram(self) -> Path:
        """The guest's memory, mapped shared by the VM that becomes the template."""
        return self.directory / "ram"

    @property
    def state(self) -> Path:
        """Where that VM's state goes."""
        return self.directory / "state"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A template in use; its descriptors belong to the store."""

    ram_fd: int
    """Sealed memfd."""
    state: bytes
    """Migration stream; small, since it has no RAM."""


class TemplateStore:
    """The templates of one node. Blocking: call it in threads, except `has` and `names`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loaded: dict[str, Loaded] = {}

    def sweep(self) -> None:
        """Make the directory and remove what interrupted builds left. Raises HypervisorError."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for entry in self._directory.iterdir():
                if entry.name.startswith(".") or not (entry / "manifest.json").is_file():
                    shutil.rmtree(entry)
        except OSError as exc:
            raise HypervisorError(f"The template directory {self._directory} cannot be used.") from exc

    def draft(self, key: str, vm_id: str) -> Draft:
        """Begin a template, of the VM *vm_id*. Raises HypervisorError."""
        directory = self._directory / f".{key}.{vm_id}"
        try:
            directory.mkdir(mode=0o700)
        except OSError as exc:
            raise HypervisorError(f"The template directory {self._directory} cannot be used.") from exc
        return Draft(directory)

    def drafts(self, mark: str) -> list[tuple[Draft, str]]:
        """Templates that were begun, with their VMs, of those whose id begins with *mark*."""
        found = [(Draft(entry), entry.name.rpartition(".")[2]) for entry in self._directory.glob(".*")]
        return [(draft, vm_id) for draft, vm_id in found if vm_id.startswith(mark)]

    def discard(self, draft: Draft) -> None:
        """Remove a draft. Idempotent."""
        shutil.rmtree(draft.directory, ignore_errors=True)

    def publish(self, key: str, draft: Draft) -> None:
        """Make a draft the template *key*, durably and at once; replaces one that is there.

        Raises:
            HypervisorError: It could not be written; the draft is still there.
        """
        final = self._directory / key
        try:
            manifest = {
                "ram_sha256": _digest_ram(draft.ram),
                "state_sha256": _sha256(draft.state.read_bytes()),
                "ram_bytes": draft.ram.stat().st_size,
                "used_bytes": draft.ram.stat().st_blocks * 512 + draft.state.stat().st_size,
            }
            for path in (draft.ram, draft.state):
                _sync(path)
            (draft.directory / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
            _sync(draft.directory / "manifest.json")
            self.drop(key)
            draft.directory.rename(final)
            _sync(self._directory)
        except OSError as exc:
            raise HypervisorError(f"Template {key} could not be written to {final}.") from exc

    def names(self) -> list[str]:
        """Keys of the templates on disk, those that were used last first."""
        found = [
            (entry.stat().st_mtime_ns, entry.name)
            for entry in self._directory.iterdir()
            if not entry.name.startswith(".")
        ]
        return [name for _, name in sorted(found, reverse=True)]

    def idle_s(self, key: str) -> float:
        """Seconds since it was last used; 0 when there is none."""
        try:
            return max(0.0, time.time() - (self._directory / key).stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def has(self, key: str) -> bool:
        """Whether there is such a template; it may still prove damaged when it is loaded."""
        return key in self._loaded or (self._directory / key / "manifest.json").is_file()

    def used_bytes(self, key: str) -> int:
        """Bytes that it takes on disk; 0 when there is none."""
        try:
            return int(self._manifest(key)["used_bytes"])
        except (BrokenTemplateError, NotFoundError):
            return 0

    def load(self, key: str) -> Loaded:
        """Verify a template and bring its RAM into a sealed memfd, once; later calls give the same.

        Raises:
            NotFoundError: There is none.
            BrokenTemplateError: It is damaged.
        """
        if (loaded := self._loaded.get(key)) is None:
            loaded = self._load(key)
            if (other := self._loaded.setdefault(key, loaded)) is not loaded:
                os.close(loaded.ram_fd)
                loaded = other
        with contextlib.suppress(OSError):  # only the order of eviction hangs on it
            os.utime(self._directory / key)
        return loaded

    def drop(self, key: str) -> None:
        """Forget and remove a template; clones that run keep their memory. Idempotent."""
        if (loaded := self._loaded.pop(key, None)) is not None:
            os.close(loaded.ram_fd)
        shutil.rmtree(self._directory / key, ignore_errors=True)

    def close(self) -> None:
        """Let go of all memory; what is on disk stays. Idempotent."""
        while self._loaded:
            os.close(self._loaded.popitem()[1].ram_fd)

    def _manifest(self, key: str) -> dict[str, Any]:
        try:
            manifest = json.loads((self._directory / key / "manifest.json").read_text())
        except FileNotFoundError as exc:
            raise NotFoundError(f"There is no template {key}.") from exc
        except (OSError, ValueError) as exc:
            raise BrokenTemplateError(f"The manifest of template {key} cannot be read.") from exc
        if not isinstance(manifest, dict):
            raise BrokenTemplateError(f"The manifest of template {key} is no object.")
        return manifest

    def _load(self, key: str) -> Loaded:
        manifest = self._manifest(key)
        directory = self._directory / key
        fd = os.memfd_create(f"vcnode-template-{key[:16]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            state = (directory / "state").read_bytes()
            digest = _fill(fd, directory / "ram")
            if digest != manifest.get("ram_sha256") or _sha256(state) != manifest.get("state_sha256"):
                raise BrokenTemplateError(f"Template {key} is damaged: its digest differs.")
            fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
        except BaseException as exc:
            os.close(fd)
            if isinstance(exc, OSError):
                raise BrokenTemplateError(f"Template {key} cannot be read.") from exc
            raise
        return Loaded(ram_fd=fd, state=state)


def state_fd(state: bytes) -> int:
    """A descriptor from which one QEMU reads *state*; the caller closes it."""
    fd = os.memfd_create("vcnode-state", os.MFD_CLOEXEC)
    try:
        os.write(fd, state)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _fill(fd: int, ram: Path) -> str:
    """Copy *ram* into *fd* without its zeros; returns the digest of what was read (see `_digest_ram`)."""
    digest = hashlib.sha256()
    with ram.open("rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size
        os.ftruncate(fd, size)
        digest.update(size.to_bytes(8, "big"))
        for offset, chunk in _data(source.fileno(), size):
            digest.update(offset.to_bytes(8, "big"))
            digest.update(chunk)
            for begin in range(0, len(chunk), HOLE_BYTES):
                piece = chunk[begin : begin + HOLE_BYTES]
                if piece != _ZEROS[: len(piece)]:
                    os.pwrite(fd, piece, offset + begin)
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from here on the copy is used
    return digest.hexdigest()


def _data(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The chunks of a sparse file that may hold data, at fixed boundaries. Source: lseek(2), SEEK_DATA."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            return  # only a hole is left
        offset -= offset % CHUNK_BYTES
        if chunk := os.pread(fd, min(CHUNK_BYTES, size - offset), offset):
            if chunk.count(0) != len(chunk):
                yield offset, chunk
            offset += len(chunk)
        else:
            return


def _digest_ram(path: Path) -> str:
    """Digest of size, offsets and data; holes and zeros do not count, so a copy may be sparse or not."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "big"))
        for offset, chunk in _data(file.fileno(), size):
            digest.update(offset.to_bytes(8, "big"))
            digest.update(chunk)
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
