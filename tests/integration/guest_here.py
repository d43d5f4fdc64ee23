"""A guest agent without a VM: the real agent in namespaces of its own on this machine, its port a socket.

Most of what the agent does is plain Linux; here it can be tried in milliseconds. What only a guest has (9p,
disks, clock, power, controllers of cgroup v2 on a hybrid host) is left to the VM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from vcnode.guest.agent import agent, cgroups, devices, syscalls
from vcnode.guest.agent.mounts import Mounts

IDENTITY = {"agent_version": "test", "boot_id": "here", "kernel": os.uname().release}


def cgroup2_mount() -> Path | None:
    """Where cgroup v2 is mounted on this machine."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, fstype, *_ = line.split()
        if fstype == "cgroup2":
            return Path(path)
    return None


def make_busybox(directory: Path, busybox: str = "/bin/busybox") -> None:
    """A root file system with nothing but busybox and a few users."""
    for name in ("bin", "etc", "proc", "dev", "sys", "tmp", "root", "home/ann"):
        (directory / name).mkdir(parents=True)
    shutil.copy(busybox, directory / "bin/busybox")
    applets = (
        "sh cat echo true false id ls ps sleep env pwd hostname grep touch rm mknod mount umount dd head "
        "tail wc stat kill yes seq nproc mkdir chmod ln setsid sha256sum dmesg tr ulimit test"
    )
    for applet in applets.split():
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "tmp").chmod(0o1777)
    (directory / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000:Ann:/home/ann:/bin/sh\nbob:x:1001:1000::/home/bob:/bin/sh\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nann:x:1000:\ndisk:x:6:ann,bob\nwheel:x:10:ann\n")


class GuestHere:
    """A running agent. ``share`` is what a guest would see as the 9p share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.share = directory / "share"
        self.pid = -1

    def start(self, cgroup: Path) -> socket.socket:
        """Start the agent; returns the host's end of its port."""
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                ours.close()
                self._serve(theirs, cgroup)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()
        return ours

    def _serve(self, theirs: socket.socket, cgroup: Path) -> None:
        theirs.setblocking(False)
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        shared = self.directory / "run/shared"
        shared.mkdir(parents=True)
        syscalls.mount(str(self.share), str(shared), None, syscalls.MS_BIND)
        (cgroup / cgroups.PARENT).mkdir(exist_ok=True)
        devices.restrict(str(cgroup / cgroups.PARENT))
        mounts = Mounts(str(self.directory / "run"), share_mounted=True)
        agent.Agent(
            theirs.fileno(), IDENTITY, lambda: None, guard_oom=False, mounts=mounts, cgroup_root=str(cgroup)
        ).serve()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def guest_here() -> Iterator[tuple[GuestHere, socket.socket]]:
    """A running agent and the host's end of its port; everything is gone afterwards."""
    mount = cgroup2_mount()
    assert mount is not None
    with tempfile.TemporaryDirectory(prefix="vcnode-guest-") as name:
        found = GuestHere(Path(name))
        make_busybox(found.share / "busybox")
        cgroup = mount / f"vcnode-test-{os.getpid()}-{Path(name).name[-8:]}"
        cgroup.mkdir()
        try:
            sock = found.start(cgroup)
            try:
                yield found, sock
            finally:
                sock.close()
                found.stop()
        finally:
            remove_cgroup(cgroup)


def remove_cgroup(path: Path) -> None:
    """Kill all processes in a cgroup and remove it with those below it."""
    kill = path / "cgroup.kill"
    if kill.exists():
        kill.write_text("1")
    events = path / "cgroup.events"
    fd = os.open(events, os.O_RDONLY)
    try:
        import select

        poll = select.poll()
        while b"populated 1" in os.pread(fd, 4096, 0):
            poll.register(fd, select.POLLPRI)
            assert poll.poll(10_000), f"{path} did not become empty"
    finally:
        os.close(fd)
    for below, _, _ in os.walk(path, topdown=False):
        os.rmdir(below)
