"""What a container mounts besides its root: directories and disks of the host, memory, serial ports.

The agent sees that all of it is there (`Volumes`), the container's first process mounts it (`take`, `put`).
"""

from __future__ import annotations

import os
import stat

from vcnode.guest.agent import devices, modules, port, syscalls
from vcnode.guest.agent.cgroups import PARENT
from vcnode.guest.agent.cgroups import ROOT as CGROUP_ROOT
from vcnode.guest.agent.disks import make_directory
from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure, printable
from vcnode.guest.agent.params import Params, invalid
from vcnode.guest.agent.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MOUNTS = 64
VIRTIO_FS = "/etc/vcnode/modules-virtiofs"
_KINDS = ("shared_name", "fs_tag", "disk_id", "port")
_FILE_SYSTEMS = ("ext4", "erofs")

# mount(8): the option, the flag that it is about, whether it sets that.
_FLAGS = {
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "noatime": (syscalls.MS_NOATIME, True),
    "atime": (syscalls.MS_NOATIME, False),
}


class Mount:
    """One entry of ``mounts`` of ``create_container``. Without any of its sources it is a tmpfs."""

    __slots__ = (
        "data",
        "destination",
        "disk_id",
        "flags",
        "fs",
        "fs_tag",
        "path",
        "port",
        "shared_name",
        "writable",
    )

    def __init__(self, params: Params) -> None:
        given = [kind for kind in _KINDS if params.has(kind)]
        if len(given) > 1:
            raise invalid(params.path(given[1]), f"does not go with {given[0]}")
        self.shared_name = params.optional_text("shared_name", longest=255)
        self.fs_tag = params.optional_text("fs_tag", longest=36)
        self.disk_id = params.optional_text("disk_id", longest=20)
        self.port = params.optional_text("port", longest=64)
        for field in ("shared_name", "fs_tag", "disk_id"):
            value = getattr(self, field)
            if value is not None and ("/" in value or value in ("", ".", "..")):
                raise invalid(params.path(field), "must be a name")
        self.fs = params.text("fs") if self.disk_id is not None else ""
        if self.disk_id is not None and self.fs not in _FILE_SYSTEMS:
            raise invalid(params.path("fs"), f"must be one of {', '.join(_FILE_SYSTEMS)}")
        self.writable = not params.flag("read_only", False)
        """Whether the disk is; each mount has its own flags besides."""
        self.path = params.text("path", "")
        self.destination = params.text("destination")
        if not self.destination.startswith("/"):
            raise invalid(params.path("destination"), "must be absolute")
        options = params.array("options", _text, longest=MAX_MOUNTS)
        self.flags, self.data = _parsed(options, MS_NODEV if given else MS_NODEV | MS_NOSUID)
        if self.data and given:
            raise invalid(params.path("options"), f"cannot have {printable(self.data)}")
        if self.port is not None:
            self.flags &= ~MS_NODEV
        params.done()


def parse(item: Any, path: str) -> Mount:
    """Check one entry of ``mounts``."""
    if type(item) is not dict:
        raise invalid(path, "must be of type dict")
    return Mount(Params(item, path))


def _text(item: Any, path: str) -> str:
    if type(item) is not str:
        raise invalid(path, "must be of type str")
    return item


def _parsed(options: tuple[str, ...], flags: int) -> tuple[int, str]:
    """Flags of mount(2), and what the file system itself is to be told."""
    rest = []
    for option in options:
        flag, sets = _FLAGS.get(option, (0, True))
        flags = flags | flag if sets else flags & ~flag
        if not flag:
            rest.append(option)
    return flags, ",".join(rest)


class Volumes:
    """What the guest itself has mounted of its host, for all containers together.

    Args:
        run: Directory of a tmpfs.
        cgroup_root: Where cgroup v2 is mounted.
    """

    def __init__(self, run: str, cgroup_root: str = CGROUP_ROOT) -> None:
        self._run = run
        self._cgroup_root = cgroup_root
        self._mounted: set[str] = set()
        self._ports: set[tuple[int, int]] = set()

    def virtio_fs(self, tag: str) -> str:
        """The directory of the virtio-fs device *tag*; mounted when first wanted, for the guest's life."""
        path = f"{self._run}/volumes/{tag}"
        if tag not in self._mounted:
            modules.load(VIRTIO_FS)
            make_directory(path)
            syscalls.mount(tag, path, "virtiofs", MS_NODEV)
            self._mounted.add(tag)
        return path

    def let_use(self, path: str) -> None:
        """Let containers use the serial port at *path* from now on, whatever their users."""
        found = os.stat(path)
        number = (os.major(found.st_rdev), os.minor(found.st_rdev))
        if number not in self._ports:
            os.chmod(path, 0o666)  # noqa: S103 -- seen by the guest, and by containers that mount it
            ports = sorted({*self._ports, number})
            wanted = (*devices.ALLOWED, *((major, (minor,)) for major, minor in ports))
            devices.restrict(f"{self._cgroup_root}/{PARENT}", wanted)
            self._ports.add(number)


def find_port(name: str) -> str | None:
    """The device file of the port; None while it is not there."""
    path = port.find(name)
    return path if path is not None and os.path.exists(path) else None


def take(source: str, path: str) -> tuple[int, bool]:
    """A copy of the mount of *path* in *source*, not mounted anywhere, and whether it is a directory.

    No link leads out of *source*. To be called before the root is exchanged.

    Raises:
        Failure: ``failed_precondition``; there is no such file.
    """
    fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
    try:
        if path:
            inner = syscalls.open_in_root(fd, path, os.O_PATH)
            os.close(fd)
            fd = inner
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        return syscalls.open_tree(f"/proc/self/fd/{fd}"), is_directory
    except OSError as exc:
        text = f"{printable(path or source)} of a volume cannot be mounted: {exc.strerror}."
        raise Failure(FAILED_PRECONDITION, text) from exc
    finally:
        os.close(fd)


def put(taken: tuple[int, bool] | None, destination: str, flags: int, data: str) -> None:
    """Mount what was taken, or a tmpfs, at *destination* in the present root.

    Raises:
        Failure: ``failed_precondition``; there is no such place, and none can be made.
    """
    try:
        if taken is None or taken[1]:
            os.makedirs(destination, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(destination), exist_ok=True)
            os.close(os.open(destination, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644))
        if taken is None:
            syscalls.mount("tmpfs", destination, "tmpfs", flags, data)
        else:
            syscalls.move_mount(taken[0], destination)
            syscalls.mount(None, destination, None, MS_REMOUNT | MS_BIND | flags)
    except OSError as exc:
        text = f"Nothing can be mounted at {printable(destination)}: {exc.strerror}."
        raise Failure(FAILED_PRECONDITION, text) from exc
    finally:
        if taken is not None:
            os.close(taken[0])
