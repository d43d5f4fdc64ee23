"""What a pod has of its host: directories, disks and sockets; and what its containers mount."""

from __future__ import annotations

import posixpath
import re
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import HostPath, Request

MAX_VOLUMES = 64
MAX_MOUNTS = 64
"""Most of one container."""
MAX_SOCKETS = 6
"""As many serial ports as a VM has besides those of its agent."""
MAX_TAG_BYTES = 31
"""Longest tag of a 9p device. Source: virtio 1.2, 5.12 leaves it open; QEMU, hw/9pfs/9p.h, MAX_TAG_LEN."""

MountTag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,118}[A-Za-z0-9_])?$")]
"""Name of a volume: a file name, and no longer than one that has a prefix."""
PortName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$")]
ObjectId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]

BIND_OPTIONS = frozenset({"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime"})
"""Options of every mount."""
_TMPFS_OPTION = re.compile(
    r"size=[0-9]{1,18}[kKmMgG%]?|nr_inodes=[0-9]{1,18}[kKmMgG]?|mode=[0-7]{3,4}|[ug]id=[0-9]{1,9}"
)
_KEPT = ("/proc", "/sys", "/run/secrets")
"""Where a container finds what is the guest's: nothing of its own is mounted there."""


class VolumeDriver(StrEnum):
    """How a VM reaches a directory of its host."""

    P9 = "9p"
    """Into any pod at any time."""
    VIRTIO_FS = "virtio-fs"
    """Faster; by a process of its own beside the VM, which has to boot for it."""


class Volume(Request):
    """A directory or a disk of the host that a pod's containers can mount. Exactly one of ``host_path`` and
    ``device`` is given."""

    mount_tag: MountTag
    """Its name in the pod."""
    host_path: HostPath | None = None
    """Directory on the host."""
    device: HostPath | None = None
    """File on the host that is a disk with a file system."""
    fs: Literal["ext4", "erofs"] | None = None
    """That file system; required with ``device``."""
    driver: VolumeDriver = VolumeDriver.P9
    """How a ``host_path`` is reached."""
    read_only: bool = False
    """Whether nothing in the pod can write to it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.host_path is None) == (self.device is None):
            raise ValueError("give exactly one of 'host_path' and 'device'")
        if (self.device is None) != (self.fs is None):
            raise ValueError("'fs' goes with 'device', and is required there")
        if self.device is not None and self.driver is not VolumeDriver.P9:
            raise ValueError("'driver' is for a 'host_path'")
        return self

    @property
    def needs_boot(self) -> bool:
        """Whether only a VM that boots can have it."""
        return self.driver is VolumeDriver.VIRTIO_FS


class Mount(Request):
    """What a container mounts, in the order in which they are given."""

    type: Literal["bind", "tmpfs", "socket"] = "bind"
    """``bind``: a volume of the pod, or a part of it. ``tmpfs``: memory of the guest, empty at each start;
    the container's memory limit counts it. ``socket``: the device of one of the pod's ``sockets``."""
    source: Annotated[str, StringConstraints(pattern=r"^[^\x00]+$", max_length=4096)] | None = None
    """With ``bind``: the volume's ``mount_tag``, or ``TAG/path/in/it``. With ``socket``: its ``name``."""
    destination: Annotated[str, StringConstraints(pattern=r"^/[^\x00]+$", max_length=4096)]
    """Absolute path in the container; made if it is missing."""
    options: tuple[Annotated[str, StringConstraints(max_length=64)], ...] = Field(default=(), max_length=16)
    """As of mount(8): ``ro``, ``nosuid``, ``nodev``, ``noexec``, ``noatime`` and their opposites; of a tmpfs
    also ``size=``, ``nr_inodes=``, ``mode=``, ``uid=``, ``gid=``. Default: ``nodev``; of a tmpfs also
    ``nosuid``."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.source is None) != (self.type == "tmpfs"):
            raise ValueError("'source' is required, but with the type 'tmpfs'")
        if ".." in self.destination.split("/") or ".." in (self.source or "").split("/"):
            raise ValueError("'source' and 'destination' must not contain '..'")
        place = posixpath.normpath("/" + self.destination.lstrip("/"))
        if place == "/" or any(place == kept or place.startswith(f"{kept}/") for kept in _KEPT):
            raise ValueError(f"'destination' must not be / and not lie in {', '.join(_KEPT)}")
        for option in self.options:
            tmpfs = self.type == "tmpfs" and _TMPFS_OPTION.fullmatch(option)
            if not tmpfs and (self.type == "socket" or option not in BIND_OPTIONS):
                raise ValueError(f"'options' of the type {self.type} cannot have {option!r}")
        return self

    @property
    def tag(self) -> str | None:
        """The volume that it is of."""
        return None if self.type != "bind" or self.source is None else self.source.partition("/")[0]

    @property
    def path(self) -> str:
        """What of the volume it is, relative; empty: all."""
        return "" if self.source is None else self.source.partition("/")[2].strip("/")


class Socket(Request):
    """A UNIX socket of the host that is connected with a serial port of the guest."""

    name: PortName
    """Name of the port in the guest, as ``/sys/class/virtio-ports`` has it; a container gets it by a mount of
    the type ``socket``."""
    host_path: HostPath
    """The socket on the host."""
    mode: Literal["listen", "connect"] = "listen"
    """``listen``: the node makes the socket, for root, and takes one client at a time. ``connect``: a
    program on the host listens there, and the port is connected to it when the pod starts, for once."""
    id: ObjectId | None = None
    """Id of the character device in QEMU. Default: made of the name's place in the list."""
    device_id: ObjectId | None = None
    """Id of the port's device in QEMU. Default: as of ``id``."""

    def chardev_id(self, number: int) -> str:
        """Id of the character device of the socket at place *number* of the list."""
        return self.id or f"port{number}"

    def port_id(self, number: int) -> str:
        """Id of its port."""
        return self.device_id or self.chardev_id(number)


def check_distinct(volumes: tuple[Volume, ...], sockets: tuple[Socket, ...]) -> None:
    """See that nothing has the name of another. Raises ValueError."""
    for what, names in (
        ("volumes", [volume.mount_tag for volume in volumes]),
        ("sockets", [socket.name for socket in sockets]),
        ("sockets", [socket.host_path for socket in sockets]),
        ("sockets", [socket.chardev_id(number) for number, socket in enumerate(sockets)]),
        ("sockets", [socket.port_id(number) for number, socket in enumerate(sockets)]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"'{what}' must be distinct; {', '.join(twice)} is used more than once")
