"""SCSI disks that the host plugs in: found by their serial, mounted (see `Disks.acquire`), let go again.

A disk appears some milliseconds after the host has asked for it, which a host does early. The kernel
announces it by a uevent, so nobody polls; the socket for these exists only while somebody waits.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from vcnode.guest.agent import modules, syscalls, uevents
from vcnode.guest.agent.failures import FAILED_PRECONDITION, NOT_FOUND, Failure
from vcnode.guest.agent.loop import IN
from vcnode.guest.agent.syscalls import MS_NODEV, MS_RDONLY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.loop import Loop, Timer

SYS_BLOCK = "/sys/block"
DEV = "/dev"
STAYS = "slot-"
"""What the serial of a disk begins with that the host does not unplug when nobody uses it any more."""
EXT4_OPTIONS = "discard,noinit_itable"
"""What is deleted gives its room on the host back; nothing is written that nobody has asked for (ext4(5))."""
_NOT_THIS_FS = frozenset({errno.EINVAL, errno.EUCLEAN, errno.EBADMSG, errno.EOPNOTSUPP})
"""What the kernel says of a disk without such a file system, or with one that is damaged or too new."""
APPEARS_WITHIN_S = 10.0
"""How long a disk may take to appear after a request has named it."""


def serial_of(page: bytes) -> str:
    """The serial in a "unit serial number" page (SPC-4, 7.8.15): 4 bytes of header, then text."""
    return page[4 : 4 + int.from_bytes(page[2:4], "big")].decode("ascii", "replace").strip()


def find(disk_id: str, sys_block: str = SYS_BLOCK) -> str | None:
    """The kernel's name (``sda``) of the disk with this serial; None when there is none."""
    for name in sorted(os.listdir(sys_block)):
        if not name.startswith("sd"):
            continue
        try:
            fd = os.open(f"{sys_block}/{name}/device/vpd_pg80", os.O_RDONLY | os.O_CLOEXEC)
            try:
                page = os.read(fd, 256)
            finally:
                os.close(fd)
        except OSError:
            continue  # unplugged meanwhile, or a disk without a serial: not ours in either case
        if serial_of(page) == disk_id:
            return name
    return None


def find_usable(disk_id: str, sys_block: str = SYS_BLOCK, dev: str = DEV) -> str | None:
    """As `find`, but None as well while the disk cannot be opened yet.

    The kernel shows a disk in sysfs and /dev a moment before it lets anybody open it (ENXIO until then), and
    announces it after that. Source: Linux block/genhd.c, device_add_disk (``bdev_add`` after ``device_add``).
    """
    name = find(disk_id, sys_block)
    if name is None:
        return None
    try:
        os.close(os.open(f"{dev}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENOENT):
            return None
        raise
    return name


class Disks:
    """The mounted disks, each shared by all containers that use it."""

    def __init__(self, loop: Loop, directory: str, sys_block: str = SYS_BLOCK, dev: str = DEV) -> None:
        self._dev = dev
        self._loop = loop
        self._directory = directory
        self._sys_block = sys_block
        self._users: dict[str, int] = {}
        self._staying: dict[str, str] = {}
        """Names of the disks that stay, once they were used."""
        self._waiting: list[_Waiting] = []
        self._uevents = -1

    def when_there(
        self, disk_id: str, found: Callable[[str], None], missing: Callable[[Failure], None]
    ) -> Callable[[], None] | None:
        """Call ``found(name)`` once the disk is there, or *missing* after the time limit.

        Returns:
            None when one of the two was called already, else a function that gives up now (calls *missing*).
        """
        if disk_id in self._staying:
            found(self._staying[disk_id])
            return None
        look = partial(find_usable, disk_id, self._sys_block, self._dev)
        return self.when(look, f"disk {disk_id!r}", found, missing)

    def when(
        self,
        look: Callable[[], str | None],
        what: str,
        found: Callable[[str], None],
        missing: Callable[[Failure], None],
    ) -> Callable[[], None] | None:
        """As `when_there` for any device: *look* gives its name once it is there, *what* is for people."""
        waiting = _Waiting(look, found, missing)
        self._waiting.append(waiting)
        try:
            name = look()
            if name is None:
                # What has appeared between that look and the opening of the socket is seen by a second one.
                self._listen()
                name = look()
        except OSError as exc:
            self._stop_waiting(waiting)
            missing(Failure.of(exc, f"wait for {what}"))
            return None
        if name is not None:
            self._stop_waiting(waiting)
            found(name)
            return None

        def give_up(why: str) -> None:
            self._stop_waiting(waiting)
            missing(Failure(NOT_FOUND, f"No {what} appeared {why}."))

        late = f"within {APPEARS_WITHIN_S:g} s"
        waiting.timer = self._loop.call_later(APPEARS_WITHIN_S, lambda: give_up(late))
        return lambda: give_up("before its container was deleted")

    def _listen(self) -> None:
        if self._uevents < 0:
            self._uevents = uevents.listen()
            self._loop.watch(self._uevents, IN, self._on_uevent)

    def _stop_waiting(self, waiting: _Waiting) -> None:
        if waiting.timer is not None:
            waiting.timer.cancel()
        self._waiting.remove(waiting)
        if not self._waiting and self._uevents >= 0:
            self._loop.unwatch(self._uevents)
            os.close(self._uevents)
            self._uevents = -1

    def _on_uevent(self, _events: int) -> None:
        """Something was plugged in or out."""
        uevents.drain(self._uevents)
        for waiting in list(self._waiting):
            # Serving one may have ended another's wait (its container was deleted).
            if waiting not in self._waiting:
                continue
            try:
                name = waiting.look()
            except OSError as exc:
                self._stop_waiting(waiting)
                waiting.missing(Failure.of(exc, "open a disk"))
                continue
            if name is not None:
                self._stop_waiting(waiting)
                waiting.found(name)

    def path(self, disk_id: str) -> str:
        """Where a disk is mounted."""
        return f"{self._directory}/{disk_id}"

    def acquire(self, disk_id: str, name: str, *, writable: bool = False, fs: str | None = None) -> None:
        """Mount disk *name* unless it is mounted already. Whoever acquires releases, also after a failure.

        Unless *fs* says so, an image is erofs; a *writable* disk is ext4, as the host has formatted it.

        Raises:
            Failure: ``failed_precondition``; somebody else has made it, and it holds no such file system.
        """
        is_of_host = fs is None
        fs = fs or ("ext4" if writable else "erofs")
        count = self._users.get(disk_id, 0)
        self._users[disk_id] = count + 1
        if count == 0:
            if disk_id.startswith(STAYS):
                self._staying[disk_id] = name
            make_directory(self.path(disk_id))
            if fs == "ext4":
                modules.load(modules.EXT4)
            flags, data = (MS_NODEV, EXT4_OPTIONS) if writable else (MS_NODEV | MS_RDONLY, None)
            try:
                syscalls.mount(f"/dev/{name}", self.path(disk_id), fs, flags, data)
            except OSError as exc:
                if is_of_host or exc.errno not in _NOT_THIS_FS:
                    raise
                text = f"Disk {disk_id} cannot be mounted: {exc.strerror}; its file must hold an {fs}."
                raise Failure(FAILED_PRECONDITION, text) from exc

    def release(self, disk_id: str) -> None:
        """Give a disk up; the last one unmounts it and removes the device, so that the host can unplug it,
        unless it is one that stays.

        Can be repeated when it raised OSError.
        """
        count = self._users.get(disk_id, 0)
        if count > 1:
            self._users[disk_id] = count - 1
            return
        if count == 1:
            # The mount may have another user for a moment, such as the last process of a container that is
            # just being cleared away: nothing must be on its way to the disk when that is pulled out.
            _sync(self.path(disk_id))
            unmount_directory(self.path(disk_id))
            stays = disk_id.startswith(STAYS)
            if not stays and (name := find(disk_id, self._sys_block)) is not None:
                _delete_device(f"{self._sys_block}/{name}/device/delete")
            del self._users[disk_id]


class _Waiting:
    __slots__ = ("found", "look", "missing", "timer")

    def __init__(
        self,
        look: Callable[[], str | None],
        found: Callable[[str], None],
        missing: Callable[[Failure], None],
    ) -> None:
        self.look = look
        self.found = found
        self.missing = missing
        self.timer: Timer | None = None


def make_directory(path: str) -> None:
    """Make sure that there is this directory, its parents included; mostly these are there."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        os.makedirs(path, exist_ok=True)


def _sync(path: str) -> None:
    """Write out the file system at *path*; nothing when there is no such directory any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _delete_device(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)


def unmount_directory(path: str) -> None:
    """Unmount *path* and remove the directory; nothing when neither is there.

    A process that the guest itself runs (``execute`` without a container) may sit below it: then the mount
    goes when the process does, and is out of everybody's way until then.
    """
    try:
        syscalls.umount(path)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            syscalls.umount(path, syscalls.MNT_DETACH)
        elif exc.errno not in (errno.EINVAL, errno.ENOENT):  # not a mount point; not there
            raise
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
