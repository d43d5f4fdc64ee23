"""What the demo has left on the host: looked up, never remembered.

Everything the demo makes carries its one temporary directory somewhere: in a command line, as a mount point,
as a file or socket below it. The network of a pod is known from its status.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vcnode.models.pod import PodStatus


@dataclass(frozen=True, slots=True)
class Held:
    """What a pod had on the host, by its status."""

    vm_id: str
    """Names its directory, and with that its sockets, its mounts and the command lines of its processes."""
    netns_path: str | None = None
    interfaces: tuple[str, ...] = ()

    @classmethod
    def by(cls, pod: PodStatus) -> Held:
        """What *pod*, which is running, has."""
        return cls(
            vm_id=pod.hypervisor.vm_id if pod.hypervisor is not None else pod.pod_id,
            netns_path=None if pod.network is None else pod.network.path,
            interfaces=tuple(
                e.host_interface
                for e in (() if pod.network is None else pod.network.endpoints)
                if e.host_interface is not None
            ),
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for."""

    what: str
    found: tuple[str, ...]


def of_pod(root: Path, held: Held) -> tuple[Check, ...]:
    """Look for what is left of a pod while the node agent, with other VMs perhaps, goes on below *root*."""
    directory = root / "run" / "vms" / held.vm_id
    return (
        Check("process of the pod's VM", tuple(processes(held.vm_id))),
        Check("mount", tuple(mounts(directory))),
        Check("directory or socket of the VM", (str(directory),) if directory.exists() else ()),
        Check("network namespace or tap", tuple(links(held))),
    )


def of_demo(root: Path) -> tuple[Check, ...]:
    """Look for what is left when everything below *root* should have ended."""
    return (Check("process", tuple(processes(str(root)))), Check("mount", tuple(mounts(root))))


def processes(needle: str) -> Iterator[str]:
    """Processes, but this one, whose command line or working directory holds *needle*; each as its id and
    command."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if os.fsencode(needle) in line + b"\0" + _directory_of(entry):
            words = line.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            yield f"{entry.name} {words[:100]}"


def _directory_of(process: Path) -> bytes:
    """Where a process works: a QEMU names its files by that."""
    try:
        return os.fsencode(os.readlink(process / "cwd"))
    except OSError:  # it ended meanwhile, or is somebody else's
        return b""


def mounts(root: Path) -> list[str]:
    """Mount points below *root*, the deepest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Source: proc(5); blanks and such are written as octal escapes.
        point = line.split(" ")[4].encode().decode("unicode_escape")
        if Path(point).is_relative_to(root):
            found.append(point)
    return sorted(found, key=len, reverse=True)


def links(held: Held) -> Iterator[str]:
    """What is still there of the network of *held*."""
    if held.netns_path is not None and Path(held.netns_path).exists():
        yield held.netns_path
    for name in held.interfaces:
        if Path("/sys/class/net", name).exists():
            yield name
