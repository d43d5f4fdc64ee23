"""What the demo has left on the host: looked up, never remembered.

Everything the demo makes carries its one temporary directory somewhere: in a command line, as a mount point,
as a file or socket below it. The network of a pod is known from its status.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Network:
    """What a pod had on the host's network, by its status."""

    netns_path: str | None = None
    tap_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for."""

    what: str
    found: tuple[str, ...]


def look(root: Path, *, keep: Collection[int], network: Network) -> tuple[Check, ...]:
    """Look for what is left of pods below *root*.

    Args:
        root: The demo's directory.
        keep: Process ids that may still run (the demo, its node agent and its NATS server).
        network: What the pod had.
    """
    return (
        Check("QEMU and helper processes", tuple(processes(root, keep=keep))),
        Check("mounts", tuple(mounts(root))),
        Check("VM directories and sockets", tuple(vm_files(root))),
        Check("network namespaces and taps", tuple(links(network))),
    )


def processes(root: Path, *, keep: Collection[int]) -> Iterator[str]:
    """Processes whose command line names something below *root*."""
    needle = os.fsencode(root)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) in keep:
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if needle in line:
            words = line.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            yield f"{entry.name} {words[:100]}"


def mounts(root: Path) -> list[str]:
    """Mount points below *root*, the deepest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Source: proc(5); blanks and such are written as octal escapes.
        point = line.split(" ")[4].encode().decode("unicode_escape")
        if Path(point).is_relative_to(root):
            found.append(point)
    return sorted(found, key=len, reverse=True)


def vm_files(root: Path) -> Iterator[str]:
    """Everything in the node's directory of running VMs, and every socket below *root*."""
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).parts
        of_a_vm = inside[:2] == ("run", "vms") and len(inside) > 2
        if of_a_vm or stat.S_ISSOCK(path.lstat().st_mode):
            yield str(path)


def links(network: Network) -> Iterator[str]:
    """What is still there of *network*."""
    if network.netns_path is not None and Path(network.netns_path).exists():
        yield network.netns_path
    for name in network.tap_names:
        if Path("/sys/class/net", name).exists():
            yield name
