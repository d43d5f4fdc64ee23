"""Which kernel modules the guest gets, and in which order they are loaded. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from vcnode.guest.image import elf
from vcnode.guest.image.compression import decompress
from vcnode.guest.image.errors import GuestImageError

WANTED = (
    "virtio_mmio",  # every device of a microvm
    "virtio_pci",  # and of the other machines
    "virtio_console",  # the agent's port
    "crc32c_generic",  # libcrc32c asks for it by name when it is loaded: nobody in the guest could answer
    "virtio_scsi",  # disks that come and go
    "sd_mod",
    "erofs",  # images
    "overlay",  # a container's writable layer
    "9pnet_virtio",  # directories shared with the host
    "9p",
    "virtio_net",
    "virtio_blk",  # a disk image of the pod's own
    "virtio_rng",
    "virtio_balloon",  # in VMs with memory of their own
)
"""Modules that the agent or a device needs, most urgent first. Dependencies follow from the modules."""
ON_DEMAND = ("ext4", "virtiofs")
"""Modules that the agent loads, with what they depend on, once something wants them."""

_MODULE_FILE = re.compile(r"(?P<name>[A-Za-z0-9_-]+)\.ko(\.(xz|zst|gz))?")


@dataclass(frozen=True, slots=True)
class Module:
    """One loadable module."""

    name: str
    """With underscores, as the kernel says."""
    content: bytes
    """The uncompressed ELF file."""
    depends: tuple[str, ...]
    """Names of the modules that must be loaded before."""


def module_name(path: str) -> str | None:
    """The name of the module in the file *path*, or None if that is no module."""
    match = _MODULE_FILE.fullmatch(PurePosixPath(path).name)
    return match["name"].replace("-", "_") if match else None


def builtin_modules(listing: str) -> frozenset[str]:
    """Names in a kernel's ``modules.builtin``."""
    return frozenset(name for line in listing.splitlines() if (name := module_name(line.strip())) is not None)


def parse_module(name: str, content: bytes) -> Module:
    """Read what a module, as packaged (compressed or not), says about itself.

    Raises:
        GuestImageError: It is no module, or cannot be decompressed.
    """
    plain = content if elf.is_elf(content) else decompress(content)
    (depends,) = elf.modinfo(plain).get("depends", [""])[:1]
    return Module(name, plain, tuple(part.replace("-", "_") for part in depends.split(",") if part))


def load_order(
    wanted: Iterable[str], builtin: frozenset[str], find: Callable[[str], Module | None]
) -> list[Module]:
    """The modules *wanted* and all that they depend on, each after its dependencies, in a fixed order.

    Raises:
        GuestImageError: One is neither built in nor found, or modules depend on each other in a circle.
    """
    ordered: dict[str, Module] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in ordered or name in builtin:
            return
        if name in path:
            raise GuestImageError(f"Kernel modules depend on each other: {' -> '.join((*path, name))}.")
        module = find(name)
        if module is None:
            needed_by = f", which {path[-1]} needs" if path else ""
            raise GuestImageError(f"The kernel package has no module {name}{needed_by}.")
        for dependency in module.depends:
            visit(dependency, (*path, name))
        ordered[name] = module

    for name in wanted:
        visit(name, ())
    return list(ordered.values())


def select(
    files: Mapping[str, bytes], builtin: frozenset[str], wanted: Iterable[str] = (*WANTED, *ON_DEMAND)
) -> list[Module]:
    """Pick from a kernel's module *files* (path to content, as packaged) what is to be loaded, in load order.

    Raises:
        GuestImageError: As `load_order` and `parse_module`.
    """
    by_name = {name: path for path in sorted(files) if (name := module_name(path)) is not None}

    def find(name: str) -> Module | None:
        path = by_name.get(name)
        return None if path is None else parse_module(name, files[path])

    return load_order(wanted, builtin, find)


def closure(modules: Iterable[Module], wanted: Iterable[str]) -> frozenset[str]:
    """Names of those of *modules* that *wanted* are or depend on."""
    by_name = {module.name: module for module in modules}
    found: set[str] = set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name in by_name and name not in found:
            found.add(name)
            left += by_name[name].depends
    return frozenset(found)
