"""The kernel and its modules out of their packages; kept unpacked, for that is most of a build's work.

What is kept is one file: a line of JSON, then all contents one after the other. It is checked before use, and
a file that is not right counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vcnode.guest.image import debs, kernel, modules
from vcnode.guest.image.errors import GuestImageError
from vcnode.guest.image.modules import Module

_SKIPPED = tuple(
    f"/kernel/{part}/"
    for part in ("sound", "drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/usb")
)
"""Not even read: no device of a microvm is there, and they make a third of the kernel package."""
_MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the guest gets it."""

    release: str
    """As ``uname -r`` says."""
    vmlinux: bytes
    """What QEMU boots: see `kernel.bootable`."""
    modules: tuple[Module, ...]
    """In load order."""


def unpack(packages: Sequence[Path]) -> Kernel:
    """Read the kernel's packages.

    Raises:
        GuestImageError: There is no kernel in them that QEMU can boot, or a wanted module is missing.
    """
    image, release, builtin = b"", "", ""
    loadable: dict[str, bytes] = {}
    for deb in packages:
        for path, content in debs.members(deb, _wanted):
            if isinstance(content, str):
                continue
            if path.startswith("/boot/vmlinuz-"):
                image, release = content, path.removeprefix("/boot/vmlinuz-")
            elif path.endswith("/modules.builtin"):
                builtin = content.decode(errors="replace")
            else:
                loadable[path] = content
    chosen = modules.select(loadable, modules.builtin_modules(builtin))
    return Kernel(release, kernel.bootable(image, platform.machine()), tuple(chosen))


def _wanted(path: str) -> bool:
    if path.startswith("/boot/vmlinuz-"):
        return True
    if not path.startswith("/usr/lib/modules/") or any(part in path for part in _SKIPPED):
        return False
    return modules.module_name(path) is not None or PurePosixPath(path).name == "modules.builtin"


def cached(packages: Sequence[Path], cache_dir: Path, key: str) -> Kernel:
    """As `unpack`, but at most once for each *key*, which says what the packages and the builder are.

    Keeps the result of the last key only.

    Raises:
        GuestImageError: As `unpack`.
        OSError: The cache cannot be written.
    """
    file = cache_dir / f"kernel-{key}"
    found = _read(file)
    if found is not None:
        return found
    unpacked = unpack(packages)
    for old in cache_dir.glob("kernel-*"):
        old.unlink(missing_ok=True)
    _write(file, unpacked)
    return unpacked


def _write(file: Path, unpacked: Kernel) -> None:
    contents = [unpacked.vmlinux, *(module.content for module in unpacked.modules)]
    header = {
        "release": unpacked.release,
        "sizes": [len(content) for content in contents],
        "modules": [[module.name, list(module.depends)] for module in unpacked.modules],
        "sha256": hashlib.sha256(b"".join(contents)).hexdigest(),
    }
    descriptor, temporary = tempfile.mkstemp(prefix="kernel-partial-", dir=file.parent)
    try:
        with open(descriptor, "wb") as target:
            target.writelines([json.dumps(header).encode(), b"\n", *contents])
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(file: Path) -> Kernel | None:
    try:
        with file.open("rb") as source:
            header: Any = json.loads(source.readline(_MAX_HEADER_BYTES))
            body = source.read()
        if hashlib.sha256(body).hexdigest() != header["sha256"]:
            return None
        contents, position = [], 0
        for size in header["sizes"]:
            contents.append(body[position : position + size])
            position += size
        named = zip(header["modules"], contents[1:], strict=True)
        loadable = tuple(Module(name, content, tuple(depends)) for (name, depends), content in named)
        return Kernel(header["release"], contents[0], loadable)
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):  # absent, cut short, or of old
        return None


def key(digests: Sequence[str], builder: str) -> str:
    """The key for packages with these SHA-256 *digests*, read by the builder with the digest *builder*."""
    if not digests:
        raise GuestImageError("There is no kernel package.")
    return hashlib.sha256("\n".join((*digests, builder)).encode()).hexdigest()[:32]
