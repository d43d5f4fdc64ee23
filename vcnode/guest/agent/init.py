"""Process 1 of the guest: sets up what a guest needs, starts the agent, and ends the guest with it.

It stays because a process 1 that dies panics the kernel without a word, and because somebody has to reap the
orphans of processes that the guest itself runs. The agent is forked, not executed: both share their memory.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys

from vcnode.guest.agent import agent, modules, process, syscalls
from vcnode.guest.agent.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC, MS_REMOUNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# (mount point, type, flags, options)
_MOUNTS = (
    ("/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, None),
    ("/sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, None),
    ("/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),  # noqa: S108
    ("/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),  # noqa: S108
)
_CGROUP = "/sys/fs/cgroup"
_ROOT_COPY = "/run/root"

# Files of /etc that belong to a pod and not to the image: links to where `identity` and others write them.
_ETC_LINKS = ("hostname", "hosts", "machine-id", "resolv.conf")

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def main() -> NoReturn:
    """Set up the guest, run the agent, and power off when it ends, whatever the reason."""
    try:
        _set_up()
        pid = os.fork()
        if pid == 0:
            _run_agent()
        _supervise(pid)
    except BaseException:
        _say_traceback()
        _say("vcnode-agent: died: init failed\n")
    finally:
        power_off()


def _say(text: str) -> None:
    """Write to the console. Called when all is lost: a console that fails too leaves nothing to be done."""
    try:
        os.write(2, text.encode("utf-8", "replace"))
    except OSError:
        return


def _say_traceback() -> None:
    """Write the present exception to the console; the ``traceback`` module is loaded only now, if at all."""
    sys.__excepthook__(*sys.exc_info())


def _set_up() -> None:
    os.umask(0o022)
    for target, fstype, flags, options in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        _mount_unless_there(fstype, target, flags, options)
    _open_console()
    _link_etc()
    _lighten_kernel()
    _mount_cgroups()
    modules.load(modules.AT_BOOT)
    _loopback_up()
    _leave_ramfs()


def _mount_unless_there(fstype: str, target: str, flags: int, options: str | None) -> None:
    """Mount; the kernel may have mounted devtmpfs on /dev already (CONFIG_DEVTMPFS_MOUNT)."""
    if fstype == "devtmpfs" and os.path.exists(f"{target}/null"):
        return
    syscalls.mount(fstype, target, fstype, flags, options)


def _open_console() -> None:
    """Make the console stdin, stdout and stderr: the kernel does so only if the image has its device."""
    fd = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    for number in (0, 1, 2):
        if number != fd:
            os.dup2(fd, number)
    if fd > 2:
        os.close(fd)


def _link_etc() -> None:
    os.makedirs("/etc", exist_ok=True)
    for name in _ETC_LINKS:
        path = f"/etc/{name}"
        if os.path.lexists(path):
            os.unlink(path)
        os.symlink(f"/run/vcnode/etc/{name}", path)


def _lighten_kernel() -> None:
    """Make grace periods of RCU short: a change of cgroup, namespace or mount waits for one.

    On a machine of a few vCPUs that has nothing else to do a normal one lasts some 10 ms.
    """
    path = "/sys/kernel/rcu_expedited"
    if os.path.exists(path):
        with open(path, "w", encoding="ascii") as file:
            file.write("1")


def _mount_cgroups() -> None:
    flags = MS_NOSUID | MS_NOEXEC | MS_NODEV
    try:
        # Each start of a process in a container moves it into its group: make that cheap (Linux 6.0).
        syscalls.mount("cgroup2", _CGROUP, "cgroup2", flags, "favordynmods")
    except OSError:
        syscalls.mount("cgroup2", _CGROUP, "cgroup2", flags)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(sock, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _leave_ramfs() -> None:
    """Make the root a mount of its own, and read-only.

    pivot_root(2), which is how a container loses sight of the guest's files, refuses while the current root
    is the kernel's first mount (rootfs). A second mount of the same files, moved over the first, is enough;
    a copy into a tmpfs would cost as much memory as the image is large.

    Read-only, because a container can reach the interpreter's file through /proc/PID/exe of a process that is
    just joining it, and must not be able to write to it (CVE-2019-5736).
    """
    os.makedirs(_ROOT_COPY, exist_ok=True)
    syscalls.mount("/", _ROOT_COPY, None, MS_BIND)
    for mounted in ("/proc", "/sys", "/dev", "/tmp"):  # noqa: S108
        syscalls.mount(mounted, f"{_ROOT_COPY}{mounted}", None, MS_BIND | MS_REC)
    os.makedirs(f"{_ROOT_COPY}/run", exist_ok=True)
    syscalls.mount("tmpfs", f"{_ROOT_COPY}/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    os.chdir(_ROOT_COPY)
    syscalls.mount(None, ".", None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    syscalls.mount(".", "/", None, syscalls.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _run_agent() -> NoReturn:
    """Runs in the child; the console is its stderr."""
    code = 1
    try:
        agent.main(lambda: None)
        code = 0
    except BaseException:
        _say_traceback()
    finally:
        os._exit(code)


def _supervise(agent_pid: int) -> None:
    """Reap orphans until the agent ends, and say on the console how it did unless it was asked to.

    The line is for the host: ``vcnode-agent: died: exit N`` or ``vcnode-agent: died: signal N``.
    """
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid != agent_pid:
            continue
        if os.WIFSIGNALED(status):
            _say(f"vcnode-agent: died: signal {os.WTERMSIG(status)}\n")
        elif code := process.exit_code(status):
            _say(f"vcnode-agent: died: exit {code}\n")
        return


def power_off() -> NoReturn:
    """End the guest, and with it the VM."""
    os.sync()
    try:
        syscalls.reboot(syscalls.RB_POWER_OFF)
    except OSError as exc:
        # What cannot be switched off can be restarted, which QEMU takes for the end (-no-reboot).
        _say(f"vcnode-agent: power off failed: {exc}\n")
        syscalls.reboot(syscalls.RB_AUTOBOOT)
    while True:
        signal.pause()
