"""Whether this host can run pods, checked one thing at a time; each finding says how to mend it.

Checks look and try, and change nothing. What needs a driver or NATS is passed in as a `Probe`.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vcnode.drivers.hypervisor.qemu.cgroup import CONTROLLERS, cgroup2_mount
from vcnode.drivers.hypervisor.qemu.machines import host_architecture
from vcnode.drivers.storage import tools
from vcnode.errors import UnsupportedError, VcnodeError
from vcnode.pods.salvage import damaged_files
from vcnode.settings import Settings

MIN_PYTHON = (3, 11)
MIN_KERNEL = (5, 14)
MIN_QEMU = (7, 0)
MIN_FREE_BYTES = 1024**3
MIN_RUN_FREE_BYTES = 64 * 1024**2
MIN_MEM_MIB = 512
MAX_SOCKET_PATH_BYTES = 107
"""sockaddr_un.sun_path without its NUL; unix(7)."""
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
PROBE_TIMEOUT_S = 30.0
_TOOL_TIMEOUT_S = 10.0

Level = Literal["ok", "warn", "fail"]
Probe = Callable[[], Awaitable["Finding"]]
"""A check that somebody else brings along."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """Short name."""
    level: Level
    """``fail``: no pod can run; ``warn``: pods run, with a drawback."""
    detail: str
    """What was seen."""
    mend: str = ""
    """What to do, unless all is well."""


async def examine(settings: Settings, probes: Sequence[tuple[str, Probe]] = ()) -> AsyncIterator[Finding]:
    """Run all checks, yielding each finding as it comes.

    Args:
        settings: The node's.
        probes: More checks by name, such as KVM and NATS; each may take PROBE_TIMEOUT_S seconds. An error
            of vcnode, or the lack of an answer, becomes a finding.
    """
    yield check_python(sys.version_info[:3])
    yield check_kernel(os.uname().release)
    yield check_capabilities(_read("/proc/self/status"))
    yield await check_qemu(settings.qemu.binary)
    yield check_mkfs(shutil.which("mkfs.erofs"))
    yield check_mkfs_ext4(shutil.which("mkfs.ext4"))
    yield await check_netns()
    yield check_cgroup(_read("/proc/self/mountinfo"))
    yield check_directory("state-dir", settings.state_dir, MIN_FREE_BYTES)
    yield check_database(settings.state_dir)
    yield check_directory("run-dir", settings.run_dir, MIN_RUN_FREE_BYTES)
    yield check_socket_path(settings.run_dir)
    yield check_roots(settings.allowed_roots)
    yield check_memory(_read("/proc/meminfo"))
    for name, probe in probes:
        yield await _probed(name, probe)


def _read(path: str) -> str:
    """A file of procfs, which never blocks."""
    return Path(path).read_text()


async def _probed(name: str, probe: Probe) -> Finding:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await probe()
    except VcnodeError as exc:
        return Finding(name, "fail", exc.message, "Do what the message says.")
    except TimeoutError:
        return Finding(name, "fail", f"No answer within {PROBE_TIMEOUT_S:g} s.", "See the log of the node.")


def check_python(version: Sequence[int]) -> Finding:
    """Python is recent enough."""
    text = ".".join(map(str, version))
    if tuple(version) >= MIN_PYTHON:
        return Finding("python", "ok", text)
    return Finding("python", "fail", text, "Install Python 3.11 or later and make the environment anew.")


def check_kernel(release: str) -> Finding:
    """The host's kernel has the calls for safe mounts."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is not None and (int(match[1]), int(match[2])) >= MIN_KERNEL:
        return Finding("kernel", "ok", f"Linux {release}")
    return Finding("kernel", "fail", f"Linux {release}", "Run a kernel of 5.14 or later; Debian 12 has 6.1.")


def check_capabilities(status: str) -> Finding:
    """The process has what mounts, namespaces and taps need; *status* is /proc/self/status."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(match[1], 16) if match else 0
    missing = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if not missing:
        return Finding("capabilities", "ok", "all that are needed")
    return Finding(
        "capabilities",
        "fail",
        f"missing: {', '.join(missing)}",
        "Run vcnode as root (sudo, or a system service).",
    )


async def check_qemu(binary: str | None) -> Finding:
    """QEMU is there, starts, and has the machine that guests boot on; None: the one for this host."""
    try:
        arch = host_architecture()
    except UnsupportedError as exc:
        return Finding("qemu", "fail", exc.message, "Run vcnode on another host.")
    program, machine = binary or arch.qemu, arch.machines[0]
    install = f"Install the package {arch.package}, or set qemu.binary."
    version_text = await _output(program, "--version")
    if version_text is None:
        return Finding("qemu", "fail", f"{program} cannot be run", install)
    match = re.search(r"version (\d+)\.(\d+)(?:\.\d+)?", version_text)
    if match is None:
        return Finding("qemu", "fail", f"{program} does not say a version", install)
    if (int(match[1]), int(match[2])) < MIN_QEMU:
        return Finding("qemu", "fail", match[0], "Install QEMU 7.0 or later; Debian 12 has 7.2.")
    if f"\n{machine}" not in (await _output(program, "-machine", "help") or ""):
        return Finding("qemu", "fail", f"{match[0]}, without machine type {machine}", install)
    return Finding("qemu", "ok", match[0])


def check_mkfs(path: str | None) -> Finding:
    """Images can be made."""
    if path is not None:
        return Finding("mkfs.erofs", "ok", path)
    return Finding(
        "mkfs.erofs", "warn", "not found: image.import will fail", "Install the package erofs-utils."
    )


def check_mkfs_ext4(path: str | None) -> Finding:
    """What formats writable disks."""
    if path is not None:
        return Finding("mkfs.ext4", "ok", path)
    return Finding(
        "mkfs.ext4",
        "warn",
        "not found: containers with a writable disk will fail",
        "Install the package e2fsprogs.",
    )


async def check_netns() -> Finding:
    """A network namespace can be made (in a child, which takes it along when it ends)."""
    attempt = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000) != 0)"
    if await _output(sys.executable, "-I", "-S", "-c", attempt) is not None:
        return Finding("network-namespaces", "ok", "can be made")
    return Finding(
        "network-namespaces",
        "warn",
        "cannot be made: only network model noop works",
        "Run as root; in a container, give it CAP_SYS_ADMIN.",
    )


def check_cgroup(mountinfo: str) -> Finding:
    """cgroup v2 is mounted and has the controllers that bound a VM's process."""
    mend = (
        "Boot with systemd.unified_cgroup_hierarchy=1. Pods run without it; their host share is not bounded."
    )
    mount = cgroup2_mount(mountinfo)
    if mount is None:
        return Finding("cgroup-v2", "warn", "not mounted", mend)
    try:
        there = (mount / "cgroup.controllers").read_text().split()
    except OSError:
        return Finding("cgroup-v2", "warn", f"{mount} cannot be read", mend)
    if not os.access(mount, os.W_OK):
        return Finding(
            "cgroup-v2",
            "warn",
            f"{mount} cannot be written",
            "Mount it writable (in a container: the host's); else pods end with the node agent's own cgroup.",
        )
    missing = [name for name in CONTROLLERS if name not in there]
    if missing:
        return Finding("cgroup-v2", "warn", f"{mount} lacks {', '.join(missing)}", mend)
    return Finding("cgroup-v2", "ok", str(mount))


def check_directory(check: str, path: Path, min_free_bytes: int) -> Finding:
    """*path*, or the directory in which it will be made, can be written and has space."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return Finding(
            check, "fail", f"{there} is not a directory", f"Move it away, or choose another {check}."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(check, "fail", f"{there} cannot be written", "Run as root, or mount it writable.")
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    if free < min_free_bytes:
        return Finding(check, "warn", f"{there} has {free >> 20} MiB left", "Free some space there.")
    return Finding(check, "ok", f"{path} ({free >> 20} MiB free)")


def check_database(state_dir: Path) -> Finding:
    """No database was found damaged."""
    aside = [file.name for file in damaged_files(state_dir / "node.db")]
    if not aside:
        return Finding("database", "ok", "none was found damaged")
    return Finding(
        "database",
        "warn",
        f"was found damaged and rebuilt: {', '.join(aside)}",
        f"Check the disk; look at what is kept in {state_dir}, then delete it.",
    )


def check_socket_path(run_dir: Path) -> Finding:
    """The sockets of VMs have paths that fit."""
    length = len(os.fsencode(run_dir / "vms" / "vm-0123456789ab" / "agent.sock"))
    if length <= MAX_SOCKET_PATH_BYTES:
        return Finding("socket-paths", "ok", f"{length} of {MAX_SOCKET_PATH_BYTES} bytes")
    return Finding(
        "socket-paths",
        "fail",
        f"{length} bytes long, {MAX_SOCKET_PATH_BYTES} are possible",
        "Choose a run_dir with a shorter path, such as /run/vcnode.",
    )


def check_roots(roots: Sequence[Path]) -> Finding:
    """Allowed roots exist, and no other user of the host can reach into them.

    A guest that has a directory of the host may leave set-uid programs and device nodes in it. They do
    nothing by themselves; a local user who can reach them makes them dangerous.
    """
    there = [root for root in roots if root.is_dir()]
    if not there:
        names = ", ".join(map(str, roots)) or "none is set"
        return Finding(
            "allowed-roots",
            "warn",
            f"no directory: {names}",
            "Make one (mode 0700), or set allowed_roots; until then only images imported earlier work.",
        )
    open_ones = [str(root) for root in there if reachable_by_others(root)]
    if open_ones:
        return Finding(
            "allowed-roots",
            "warn",
            f"other users of this host can reach into {', '.join(open_ones)}",
            f"chmod 0700 {' '.join(open_ones)}: guests may leave set-uid programs there.",
        )
    return Finding("allowed-roots", "ok", ", ".join(map(str, there)))


def reachable_by_others(path: Path) -> bool:
    """Whether *path* and all directories above it let everybody through."""
    real = Path(os.path.realpath(path))
    return all(directory.stat().st_mode & stat.S_IXOTH for directory in (real, *real.parents))


def check_memory(meminfo: str) -> Finding:
    """There is memory for at least one VM; *meminfo* is /proc/meminfo."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    available_mib = int(match[1]) // 1024 if match else 0
    if available_mib >= MIN_MEM_MIB:
        return Finding("memory", "ok", f"{available_mib} MiB available")
    return Finding("memory", "warn", f"{available_mib} MiB available", "Free some, or run fewer pods here.")


async def _output(*argv: str) -> str | None:
    """What a short-lived program prints; None when it cannot be run, fails, or takes too long."""
    try:
        async with asyncio.timeout(_TOOL_TIMEOUT_S):
            ended = await tools.run(argv, file_bytes=0)
    except OSError:  # a TimeoutError is one
        return None
    return ended.output if ended.returncode == 0 else None
