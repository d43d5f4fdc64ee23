"""What a container sees: its namespaces, its root, and the file systems that the kernel provides.

`enter_main` runs in the child that becomes process 1 of a container, `enter_join` in each later one.

The order in `enter_main` matters: the root is exchanged first, and everything is mounted from inside, so that
a link in the container's files (``/dev -> /run``) can lead nowhere but into those files.
"""

from __future__ import annotations

import errno
import os
import stat

from vcnode.guest.agent import syscalls, volumes
from vcnode.guest.agent.entries import ended, is_gone
from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure, printable
from vcnode.guest.agent.params import invalid
from vcnode.guest.agent.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REC, MS_REMOUNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NAMESPACES = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWCGROUP

# (mount point, type, flags, options); OCI runtime specification, config-linux.md, Default Filesystems.
_MOUNTS = (
    ("/proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, None),
    ("/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k"),
    ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, "mode=1777,size=64m"),  # noqa: S108
    ("/dev/mqueue", "mqueue", MS_NOSUID | MS_NOEXEC | MS_NODEV, None),
    ("/sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, None),
)
_CGROUPS = ("/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, None)
"""Of the container's own group."""
_WORKPLACE = "/mnt"
"""A directory of the guest in which a process mounts what nobody else sees."""
_OPTIONAL_TYPES = frozenset({"mqueue"})
"""File systems that a kernel may lack without a container being the worse for it."""

# Name, major, minor; Documentation/admin-guide/devices.txt
_DEVICES = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
)

# moby and containerd, DefaultSpec: what would tell of the machine, or let root in a container change it.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


SECRETS = "/run/secrets"
"""Where a container finds its secrets; the place that Docker and Kubernetes have made usual."""
ETC = "/run/vcnode/etc"
ETC_FILES = ("hostname", "hosts", "resolv.conf")
"""Files of the guest that every container sees in its own /etc."""


Trees = list[tuple[str, int]]
"""Where in a container to mount what `prepare` has made, and its descriptor."""


def prepare() -> Trees:
    """Move into most of the namespaces of a container, and make what the kernel provides in each.

    There are no files of a container yet, and no group, so the rest is left to `enter_main`.
    """
    syscalls.unshare(_NAMESPACES & ~syscalls.CLONE_NEWCGROUP)
    syscalls.mount(None, "/", None, MS_REC | syscalls.MS_PRIVATE)
    guest_fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    syscalls.mount("tmpfs", _WORKPLACE, "tmpfs", MS_NOSUID, "mode=755")
    os.chroot(_WORKPLACE)
    os.chdir("/")
    _mount_kernel_files()
    _protect()
    # /dev first, as what is masked in /proc is of its file system: df(1) takes the first that it finds.
    trees = [(path, syscalls.open_tree(path, recursive=True)) for path in ("/dev", "/proc", "/sys")]
    os.fchdir(guest_fd)
    os.chroot(".")
    os.close(guest_fd)
    syscalls.umount(_WORKPLACE, syscalls.MNT_DETACH)
    return trees


def enter_main(fields: tuple[Any, ...], fds: list[int], trees: Trees | None = None) -> None:
    """Make the namespaces of a container around its root, and move into them. See `entries.Entry.main`.

    With *trees* the caller is one that has called `prepare`; *fds* has the mount of the root then, too.
    """
    root, readonly, hostname, secrets, mounts = fields
    # First the group, then its namespace: what a cgroup namespace shows starts at the group of its maker.
    os.write(fds[0], b"0")
    syscalls.unshare(_NAMESPACES if trees is None else syscalls.CLONE_NEWCGROUP)
    syscalls.sethostname(hostname)
    files = _own_files()
    secrets_fd = syscalls.open_tree(secrets) if secrets else -1
    taken = [volumes.take(source, path) if source else None for source, path, *_ in mounts]
    if trees is None:
        _exchange_root(root)
        _mount_kernel_files()
    else:
        _put_tree(fds[1], _WORKPLACE)
        _exchange_root(_WORKPLACE)
        for path, fd in trees:
            make_directory(path)
            _put_tree(fd, path)
    _mount(*_CGROUPS)
    for name, fd in files:
        _put_over(fd, f"/etc/{name}")
    for each, (_, _, destination, flags, data) in zip(taken, mounts, strict=True):
        volumes.put(each, destination, flags, data)
    if secrets_fd >= 0:
        _put_secrets(secrets_fd)
    if trees is None:
        _protect()
    if readonly:
        syscalls.mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def enter_join(_fields: tuple[Any, ...], fds: list[int]) -> None:
    """Join a running container; its root becomes the caller's. See `entries.Entry.join`."""
    cgroup_procs_fd, pidfd = fds
    os.write(cgroup_procs_fd, b"0")
    # The container must not look into a process that still holds the guest's memory (CVE-2016-9962).
    syscalls.set_undumpable()
    try:
        syscalls.setns(pidfd, _NAMESPACES)
    except OSError as exc:
        if is_gone(exc):
            raise ended() from exc
        raise


def enter_launch(_fields: tuple[Any, ...], fds: list[int]) -> None:
    """Join a running container but for its group; its pid namespace is for children only."""
    syscalls.set_undumpable()
    syscalls.setns(fds[2], _NAMESPACES | syscalls.CLONE_NEWPID)


def enter_files(fields: tuple[Any, ...], _fds: list[int]) -> None:
    """Move into the root of a container that does not run. See `entries.Entry.files`."""
    syscalls.set_undumpable()
    syscalls.unshare(syscalls.CLONE_NEWNS)
    _exchange_root(fields[0])


def _own_files() -> list[tuple[str, int]]:
    """Copies of the mounts of those of `ETC_FILES` that there are, with their names."""
    found = []
    for name in ETC_FILES:
        try:
            found.append((name, syscalls.open_tree(f"{ETC}/{name}")))
        except FileNotFoundError:
            continue
    return found


def _exchange_root(root: str) -> None:
    """Make *root* the root, and let go of the guest's: nothing of it can be reached any more."""
    syscalls.mount(None, "/", None, MS_REC | syscalls.MS_PRIVATE)
    os.chdir(root)
    # The old root is put on top of the new one, and taken off again: no directory is needed for it.
    # Source: pivot_root(2), NOTES, pivot_root(".", ".").
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def _put_tree(fd: int, path: str) -> None:
    """Mount what `prepare` has made, and let go of it: a working directory may name a descriptor."""
    syscalls.move_mount(fd, path)
    os.close(fd)


def _mount_kernel_files() -> None:
    for target, fstype, flags, options in _MOUNTS:
        _mount(target, fstype, flags, options)
        if target == "/dev":
            _fill_dev()


def _protect() -> None:
    for path in MASKED_PATHS:
        _mask(path)
    for path in READONLY_PATHS:
        _make_readonly(path)


def _mount(target: str, fstype: str, flags: int, options: str | None) -> None:
    make_directory(target)
    try:
        syscalls.mount(fstype, target, fstype, flags, options)
    except OSError:
        if fstype not in _OPTIONAL_TYPES:
            raise


def make_directory(path: str) -> None:
    """Make sure that *path* is a directory of its own, not a link to one.

    Raises:
        Failure: ``invalid_argument``; the root has something else there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        os.mkdir(path, 0o755)
        return
    if not stat.S_ISDIR(mode):
        raise invalid("root", f"{printable(path)} must be a directory in the container's root")


def _fill_dev() -> None:
    for name, major, minor in _DEVICES:
        path = f"/dev/{name}"
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(path, 0o666)  # noqa: S103 (mknod obeys the umask; these are for everybody)
    for target, link in _LINKS:
        os.symlink(target, link)


def _put_over(fd: int, path: str) -> None:
    """Mount a file of the guest's over one of the container's, which is made if it is missing.

    A root that cannot be written to and lacks the file goes without.
    """
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        try:
            os.close(os.open(path, flags, 0o644))
        except FileNotFoundError:
            os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
            os.close(os.open(path, flags, 0o644))
        syscalls.move_mount(fd, path)
    except OSError as exc:
        if exc.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(fd)


def _put_secrets(fd: int) -> None:
    """Mount the directory of secrets, read-only.

    Raises:
        Failure: ``failed_precondition``; the root cannot be written to and has no such directory.
    """
    try:
        os.makedirs(SECRETS, exist_ok=True)
        syscalls.move_mount(fd, SECRETS)
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY
        syscalls.mount(None, SECRETS, None, MS_REMOUNT | MS_BIND | flags)
    except OSError as exc:
        text = f"The container's root has no directory {SECRETS}, and none can be made: {exc.strerror}."
        raise Failure(FAILED_PRECONDITION, text) from exc
    finally:
        os.close(fd)


def _mask(path: str) -> None:
    """Hide a file behind /dev/null, a directory behind an empty one; nothing when it is not there."""
    try:
        syscalls.mount("/dev/null", path, None, MS_BIND)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        syscalls.mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0")


def _make_readonly(path: str) -> None:
    """Forbid changes below *path*; nothing when it is not there."""
    try:
        syscalls.mount(path, path, None, MS_BIND | MS_REC)
    except FileNotFoundError:
        return
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY
    syscalls.mount(None, path, None, MS_REMOUNT | MS_BIND | flags)
