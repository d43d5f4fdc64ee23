"""Output of a process on its way to the host without a copy: its pages go from pipe to pipe to the port.

splice(2) of only a part of a pipe into a virtio port of Linux 6.1 breaks the port: port_fops_splice_write
sizes its list of buffers by all that is in the pipe and hands the unused ones to the device too (it then says
"zero sized buffers are not allowed"). So the port only ever gets the whole of a pipe of our own.
Source: Linux drivers/char/virtio_console.c.
"""

from __future__ import annotations

import fcntl
import os

PIPE_BYTES = (2 << 20, 1 << 20)
"""Size of the pipe before the port: a frame whose first and last page are not full, and what is around it;
else what the kernel allows everybody (fs.pipe-max-size): such a frame takes another turn."""


class Relay:
    """One frame at a time; `begin` it, then `push` until that is done."""

    def __init__(self) -> None:
        self._read, self._write = _pipe()
        self._held = 0
        self._source = -1
        self._left = 0
        self._tail = b""

    @property
    def busy(self) -> bool:
        """Whether a frame has not gone out as a whole."""
        return self._held > 0 or self._left > 0

    def begin(self, source: int, count: int, head: bytes, tail: bytes) -> None:
        """Take a frame: *count* bytes, which the pipe *source* holds already, between *head* and *tail*."""
        self._held = os.write(self._write, head)
        self._left, self._tail = count, tail
        self._take(source)
        if self._left:
            self._source = os.dup(source)

    def _take(self, source: int) -> None:
        """Move pages, as many as the pipe takes: there may be few bytes on each."""
        try:
            while self._left:
                count = os.splice(source, self._write, self._left, flags=os.SPLICE_F_NONBLOCK)
                self._left -= count
                self._held += count
            self._held += os.write(self._write, self._tail)
            self._tail = b""
        except BlockingIOError:
            return  # full

    def push(self, port: int) -> bool:
        """Give the port what it takes; False when it takes no more for now."""
        while self._held:
            try:
                self._held -= os.splice(self._read, port, self._held, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
            if self._left or self._tail:
                self._take(self._source)
        self._let_go()
        return True

    def _let_go(self) -> None:
        if self._source >= 0:
            os.close(self._source)
            self._source = -1

    def drop(self) -> None:
        """Forget the frame: the session that it belongs to is over."""
        if self.busy:
            self.close()
            self._read, self._write = _pipe()
            self._held, self._left, self._tail = 0, 0, b""

    def close(self) -> None:
        """Let go of the pipe."""
        self._let_go()
        os.close(self._read)
        os.close(self._write)


def _pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for size in PIPE_BYTES:
        try:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, size)
            break
        except PermissionError:
            continue
    return read_end, write_end
