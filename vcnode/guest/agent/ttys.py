"""Terminals of processes: opened by the child inside its container, handed to the agent.

The child opens the container's own devpts, so that its programs find their terminal under its name. What
stands at that path is checked by its device number: a container may put there what it likes
(CVE-2025-52565). The other side is asked of the kernel by descriptor, no path is used again.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import stat
import struct
import termios

from vcnode.guest.agent.failures import INTERNAL, Failure

# ioctl_tty(2); include/uapi/asm-generic/ioctls.h
_TIOCSPTLCK = 0x4004_5431
_TIOCGPTPEER = 0x5441
_PTMX = (5, 2)
_PATHS = ("/dev/pts/ptmx", "/dev/ptmx")


def set_size(fd: int, rows: int, columns: int) -> None:
    """Set a terminal's size; its foreground processes get SIGWINCH."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def take(terminal: tuple[int, int], uid: int) -> None:
    """Make a terminal, hand its other end over descriptor 0, and make it the caller's own.

    Called by the child, which leads a session without a terminal, when it is where its program is to run.

    Raises:
        Failure: The container has no devpts.
    """
    master = _open_master()
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    set_size(slave, *terminal)
    os.fchown(slave, uid, -1)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    with socket.socket(fileno=os.dup(0)) as sock:
        socket.send_fds(sock, [b"t"], [master])
    os.close(master)
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)


def _open_master() -> int:
    for path in _PATHS:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        info = os.fstat(fd)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(*_PTMX):
            return fd
        os.close(fd)
    raise Failure(INTERNAL, "There is no terminal to be had: /dev/pts is not what it should be.")


def receive(sock: socket.socket) -> int:
    """The end of a terminal that a child has handed over; non-blocking.

    Raises:
        Failure: It did not hand one over.
    """
    try:
        _, control, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        control = []
    fds = array.array("i")
    for _level, _kind, data in control:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not fds:
        raise Failure(INTERNAL, "The process came without its terminal.")
    os.set_blocking(fds[0], False)
    return fds[0]
