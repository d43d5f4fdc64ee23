"""virtiofsd: a process beside QEMU for each directory that a VM has by virtio-fs.

It is handed a listening socket to which we are connected already, and QEMU gets our end: nobody else can
connect. It serves this one connection and ends with it, whichever of us dies; besides, it
is in the VM's cgroup. The VM's directory is in its environment, by which `named` finds it: its working
directory becomes the root of what it serves.

Source: QEMU docs/tools/virtiofsd.rst (to 7.2); README of gitlab.com/virtio-fs/virtiofsd (the one in Rust).
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from vcnode.drivers.hypervisor.qemu.process import VM_DIR, Process, read_stat
from vcnode.drivers.hypervisor.qemu.spawner import Spawner

VIRTIOFSD = "virtiofsd"
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Where distributions put it, outside of PATH: those of the program in Rust first, then QEMU's own."""
QEMUS_OWN = "/usr/lib/qemu/virtiofsd"


def find() -> str | None:
    """Path of the program; None: it is not installed."""
    places = (path for path in _PLACES if os.access(path, os.X_OK))
    return shutil.which(VIRTIOFSD) or next(places, None)


def command(program: str, listener_fd: int, directory: str) -> list[str]:
    """The command line of one. It gives up what it need not have and shuts itself into *directory*."""
    if os.path.realpath(program) == QEMUS_OWN:
        return [program, f"--fd={listener_fd}", "-o", f"source={directory}", "-o", "sandbox=namespace"]
    return [program, f"--fd={listener_fd}", f"--shared-dir={directory}", "--sandbox=namespace"]


def start(
    spawner: Spawner, program: str, directory: str, *, stderr_fd: int, vm_dir: Path, netns_path: str | None
) -> tuple[Process, socket.socket]:
    """Start one for *directory*; the process, and QEMU's end of the connection.

    Raises:
        HypervisorError, ResourceExhaustedError, NetworkError: As `spawn`.
        OSError: The host has no room for the sockets.
    """
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = vm_dir / f"{VIRTIOFSD}.sock"  # in a directory that is for root only
            listener.bind(str(path))
            try:
                listener.listen(1)
                ours.connect(str(path))
            finally:
                path.unlink()
            process = spawner.spawn(
                command(program, listener.fileno(), directory),
                stderr_fd=stderr_fd,
                fds=(listener.fileno(),),
                directory=vm_dir,
                netns_path=netns_path,
            )
    except BaseException:
        ours.close()
        raise
    return process, ours


class Helper(NamedTuple):
    """A virtiofsd that was found by its VM's directory."""

    pid: int
    start_ticks: int
    vm_id: str


def _vm_dir(environ: bytes) -> Path | None:
    start = f"{VM_DIR}=".encode()
    found = (word.removeprefix(start) for word in environ.split(b"\0") if word.startswith(start))
    return next((Path(os.fsdecode(word)) for word in found), None)


def named(vms: Path, mark: str) -> list[Helper]:
    """All that serve VMs whose directory is in *vms* and whose id begins with *mark*."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            program = os.readlink(f"/proc/{entry}/exe")
            if os.getsid(int(entry)) != int(entry):
                continue  # the part of one that serves; it ends with the one that we started
            place = _vm_dir(Path(f"/proc/{entry}/environ").read_bytes())
        except OSError:
            continue  # it has ended, or is the kernel's, or somebody else's
        if place is None:
            continue
        if Path(program).name.startswith(VIRTIOFSD) and place.parent == vms and place.name.startswith(mark):
            stat = read_stat(int(entry))
            if stat is not None and not stat.zombie:
                found.append(Helper(int(entry), stat.start_ticks, place.name))
    return sorted(found)
