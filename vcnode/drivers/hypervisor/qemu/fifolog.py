"""A FIFO that a VM writes into, and the bounded log that the node makes of it.

The serial console and QEMU's own standard error both go this way, because both can be flooded by a guest:

- While nobody reads, the kernel's pipe buffer (64 KiB) is the bound, and no disk fills.
- QEMU opens the console's FIFO for reading and writing, so it never sees it broken when the node agent goes
  away, and writes without blocking: a full console makes the guest wait for it, as a slow serial line would,
  while QEMU itself answers on. Measured (QEMU 7.2): processes in the guest that write to it sleep; kernel
  messages go on at 100 characters/s; both recover at once when the node reads again.
- QEMU gets its standard error as a write end that does not block: what finds no room is dropped.
- While the node agent reads, the log is rotated, one old file is kept, and a flood wakes the event loop no
  more than once in `REST_S`; a silent guest costs nothing.

A regular file would have no bound while the node agent is down, a socket would lose the first lines of a
boot, QEMU's ``ringbuf`` would lose the last ones before its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

CHUNK_BYTES = 65_536
"""As much as the pipe holds by default."""
REST_S = 0.05
"""Pause between two reads of one FIFO; what comes meanwhile waits in the pipe."""
TAIL_BYTES = 8192
"""Most recent bytes kept in memory, for messages: a kernel panic with its call trace fits."""


class BoundedFile:
    """A log file of at most *max_bytes*, with one older file beside it (``.1``).

    Errors of the file system are logged once and cost the bytes at hand, nothing else.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._fd: int | None = None
        self._size = 0
        self._failed = False

    def write(self, data: bytes) -> None:
        """Append *data*, cut to the last ``max_bytes``; rotates first when it would not fit."""
        data = data[-self._max_bytes :]
        try:
            if self._fd is None:
                self._open()
            if self._size + len(data) > self._max_bytes and self._size:
                self.close()
                os.replace(self._path, f"{self._path}.1")
                self._open()
            if self._fd is not None:
                self._size += os.write(self._fd, data)
            self._failed = False
        except OSError as exc:
            if not self._failed:
                log.warning("Cannot write %s: %s", self._path, exc)
            self._failed = True

    def tail(self, max_bytes: int) -> bytes:
        """The last bytes that an earlier node agent wrote, if any."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
                return file.read(max_bytes)
        except OSError:
            return b""

    def read(self, max_bytes: int) -> bytes:
        """The last *max_bytes*, of the older file as well."""
        newer = self.tail(max_bytes)
        older = BoundedFile(Path(f"{self._path}.1"), max_bytes=self._max_bytes)
        rest = max_bytes - len(newer)
        return (older.tail(rest) if rest else b"") + newer

    def close(self) -> None:
        """Close the file. Idempotent; the next write opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o640)
        self._size = os.fstat(self._fd).st_size


class FifoLog:
    """Reads a FIFO into a `BoundedFile`, from construction until `close`.

    Raises:
        OSError: The FIFO cannot be opened.
    """

    def __init__(
        self, fifo: Path, path: Path, *, max_bytes: int, on_data: Callable[[], None] | None = None
    ) -> None:
        # Open for writing as well: then the end of QEMU is no end of file, which epoll would report for ever.
        self._fd: int | None = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._file = BoundedFile(path, max_bytes=max_bytes)
        self._tail = bytearray(self._file.tail(TAIL_BYTES))
        self._on_data = on_data
        self._rest: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._listen()

    def drain(self) -> None:
        """Take what the FIFO holds now; for when the writer is gone."""
        while self._take():
            pass

    def text(self) -> str:
        """The last lines (`TAIL_BYTES` at most), with control characters made harmless."""
        return printable(bytes(self._tail))

    def read(self, max_bytes: int) -> str:
        """The last *max_bytes* that the files hold, as `text` has them. Blocking."""
        return printable(self._file.read(max_bytes))

    def close(self) -> None:
        """Stop reading. Idempotent; what is in the FIFO stays there while QEMU holds it."""
        if self._fd is not None:
            if self._rest is not None:
                self._rest.cancel()
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
            self._file.close()

    def _listen(self) -> None:
        self._rest = None
        if self._fd is not None:
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._rest = self._loop.call_later(REST_S, self._listen)
            self._take()

    def _take(self) -> bool:
        """Move one chunk from the FIFO to the log; False when there was nothing."""
        if self._fd is None:
            return False
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return False
        self._file.write(data)
        self._tail += data[-TAIL_BYTES:]
        del self._tail[:-TAIL_BYTES]
        if self._on_data is not None:
            self._on_data()
        return bool(data)


def printable(data: bytes) -> str:
    """The lines of *data* that are not empty, without characters that could do anything to a terminal."""
    text = data.decode("utf-8", "replace").replace("\r", "")
    clean = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    return "\n".join(line.rstrip() for line in clean.split("\n") if line.strip())


def last_lines(text: str, count: int) -> str:
    """The last *count* lines of *text*."""
    return "\n".join(text.split("\n")[-count:])
