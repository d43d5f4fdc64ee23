"""What containers wrote, in files on the host: ``logs/<pod>/<container>/<position>.log``.

A log is a sequence of bytes, counted from its first; the *position* of a record is that of its first byte,
and each file is named after the position at which it begins. So rotation is a new file, and the oldest
removed. A record says of itself how far the guest's output is kept with it, so that nothing else has to be
remembered: after a crash the last record that is whole is the truth. Lengths stand on both ends of a record,
and the end of a log can be read without its beginning.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vcnode.drivers.audit import Held
from vcnode.drivers.base import LogPosition, LogRecord
from vcnode.errors import StorageError

Kind = Literal["stdout", "stderr", "end", "node"]
_KINDS: tuple[Kind, ...] = ("stdout", "stderr", "end", "node")
_HEADER = struct.Struct(">BxHIQQQQQ")
"""Kind, 0, length of the data, position, time, instance, the guest's offset after it, bytes lost so far."""
_TRAILER = struct.Struct(">II")
"""Length of the data again, CRC-32 of header and data."""
_FRAME = _HEADER.size + _TRAILER.size
_MOST_LOST = (1 << 63) - 1


class Piece(NamedTuple):
    """One record, or a part of it."""

    kind: Kind
    position: int
    time_ns: int
    data: bytes


class Chunk(NamedTuple):
    """What a read gives."""

    pieces: list[Piece]
    start: int
    """Where it begins; later than asked for when that is not kept any more."""
    position: int
    """Where the next read goes on."""
    more: bool
    """Whether there is more already."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """How much of a log is kept."""

    max_file_bytes: int
    """A file of so many bytes is followed by another."""
    max_files: int
    """The oldest beyond so many go."""
    min_free_bytes: int
    """With less room on the disk than this, nothing is written."""


class _Record(NamedTuple):
    kind: int
    length: int
    position: int
    time_ns: int
    instance: int
    guest_offset: int
    lost: int


class ContainerLog:
    """The log of one container. Every method blocks on the disk, and may be called in any thread."""

    def __init__(self, directory: Path, rotation: Rotation) -> None:
        self._directory = directory
        self._rotation = rotation
        self._lock = threading.Lock()
        self._files: list[int] = []
        """Positions at which files begin."""
        self._size = 0
        """Bytes of the last file that are whole records."""
        self._end = 0
        self._last: _Record | None = None
        self._guest = LogPosition(0, 0)
        self._lost = 0
        self._untold: list[str] = []
        """What is to be said in the log once it can be written."""
        self._places: dict[int, tuple[int, int]] = {}
        """File and offset of positions at which reads have ended, a few: followers go on there."""
        self._gone = False
        self._open()

    # -- state -------------------------------------------------------------------------------------

    @property
    def guest_position(self) -> LogPosition:
        """How far the guest's output is kept, or given up."""
        return self._guest

    @property
    def end(self) -> int:
        """Position after the last byte."""
        return self._end

    @property
    def start(self) -> int:
        """Position of the first byte that is kept."""
        return self._files[0] if self._files else self._end

    @property
    def at_rest(self) -> bool:
        """Whether the last that was written says that the container has ended."""
        return self._last is not None and _KINDS[self._last.kind] == "end"

    @property
    def lost_bytes(self) -> int:
        """Bytes of output that were dropped, by the guest or for want of room on the disk."""
        return self._lost

    def _open(self) -> None:
        """Find the end, and cut off what is not whole."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        stems = [name.removesuffix(".log") for name in names]
        self._files = sorted(int(stem) for stem in stems if stem.isdigit() and len(stem) == 20)
        while self._files:
            path = self._path(self._files[-1])
            content = path.read_bytes()
            self._size, last = _whole(content)
            if self._size < len(content):
                os.truncate(path, self._size)
            if last is not None:
                self._last = last
                self._end = last.position + last.length
                self._guest = LogPosition(last.instance, last.guest_offset)
                self._lost = last.lost
                return
            self._end = self._files.pop()  # nothing is in it: the position is all that it tells
            path.unlink()

    def _path(self, position: int) -> Path:
        return self._directory / f"{position:020d}.log"

    # -- write -------------------------------------------------------------------------------------

    def append(self, records: Sequence[LogRecord]) -> None:
        """Keep *records*. Without room for them, they are counted as lost, and the log says so later."""
        with self._lock:
            if self._gone:
                return
            out = bytearray()
            before = (self._end, self._last)
            wanted = sum(len(record.data) for record in records)
            for record in records:
                self._take(out, record)
            if not out:
                return
            try:
                self._write(bytes(out))
            except OSError as exc:
                self._end, self._last = before
                self._lost = min(_MOST_LOST, self._lost + wanted)
                self._untold = [f"{wanted} bytes or more of output were lost: {exc.strerror}."]
            else:
                self._untold.clear()

    def _take(self, out: bytearray, record: LogRecord) -> None:
        """Encode what is new of a record; note what the guest has dropped before it."""
        for text in self._untold:
            self._note(out, text, record.time_ns)
        self._untold = []
        known = self._guest.offset if record.instance == self._guest.instance else 0
        data, offset = record.data, record.offset
        if offset > known:
            gap = offset - known
            self._lost = min(_MOST_LOST, self._lost + gap)
            self._guest = LogPosition(record.instance, offset)
            self._note(
                out,
                f"{gap} bytes of output were dropped: they came faster than they were taken.",
                record.time_ns,
            )
        elif offset < known:
            data = data[known - offset :]
            if not data and record.kind != "end":
                return
        if record.kind == "end" and (self.at_rest or offset < known):
            return
        self._guest = LogPosition(record.instance, max(known, record.offset + len(record.data)))
        self._encode(out, record.kind, record.time_ns, data)

    def _note(self, out: bytearray, text: str, time_ns: int) -> None:
        self._encode(out, "node", time_ns, f"vcnode: {text}\n".encode())

    def _encode(self, out: bytearray, kind: Kind, time_ns: int, data: bytes) -> None:
        record = _Record(
            _KINDS.index(kind),
            len(data),
            self._end,
            time_ns,
            self._guest.instance,
            self._guest.offset,
            self._lost,
        )
        head = _HEADER.pack(record.kind, 0, *record[1:])
        crc = zlib.crc32(data, zlib.crc32(head))
        out += head + data + _TRAILER.pack(len(data), crc)
        self._end += len(data)
        self._last = record

    def _write(self, content: bytes) -> None:
        """Append whole records; on OSError nothing of them is left."""
        start = _HEADER.unpack_from(content)[3]
        new = not self._files or (self._size >= self._rotation.max_file_bytes and start > self._files[-1])
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        at = start if new else self._files[-1]
        path = self._path(at)
        room = os.statvfs(self._directory)
        if room.f_bavail * room.f_frsize < self._rotation.min_free_bytes + len(content):
            raise OSError(28, "the disk is nearly full")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        size = 0 if new else self._size
        try:
            done = 0
            try:
                while done < len(content):
                    done += os.pwrite(fd, content[done:], size + done)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        self._size = size + len(content)
        if new:
            self._files.append(at)
            while len(self._files) > self._rotation.max_files:
                self._path(self._files.pop(0)).unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the files. Nothing is written afterwards. Idempotent."""
        with self._lock:
            self._gone = True
            self._files.clear()
            _remove(self._directory)

    # -- read --------------------------------------------------------------------------------------

    def read(self, position: int, *, max_bytes: int, max_pieces: int, until_ns: int | None = None) -> Chunk:
        """What is kept from *position* on, at most *max_bytes*; ``end`` notes are left out.

        A position beyond the end counts as the end.
        """
        with self._lock:
            start = at = min(max(position, self.start), self._end)
            pieces: list[Piece] = []
            left = max_bytes
            for record, data, place in self._from(at):
                if until_ns is not None and record.time_ns >= until_ns:
                    return Chunk(pieces, start, at, more=False)
                if _KINDS[record.kind] == "end":
                    continue
                if not left or len(pieces) >= max_pieces:
                    self._remember(at, place)
                    break
                rest = data[at - record.position :]
                pieces.append(Piece(_KINDS[record.kind], at, record.time_ns, rest[:left]))
                at += min(left, len(rest))
                if left < len(rest):
                    self._remember(at, place)
                    break
                left -= len(rest)
            else:
                if self._files:
                    self._remember(self._end, (self._files[-1], self._size))
            return Chunk(pieces, start, at, more=at < self._end)

    def tail(self, lines: int) -> int:
        """The position *lines* lines before the end; an unfinished last line counts as one."""
        with self._lock:
            if lines == 0:
                return self._end
            for name in reversed(self._files):
                content = self._content(name)
                end = len(content)
                while end:
                    length, _ = _TRAILER.unpack_from(content, end - _TRAILER.size)
                    begin = end - _FRAME - length
                    record = _record(content, begin)
                    data = content[begin + _HEADER.size : end - _TRAILER.size]
                    stop = len(data) - (record.position + length == self._end and data.endswith(b"\n"))
                    while (found := data.rfind(b"\n", 0, stop)) >= 0:
                        lines -= 1
                        if not lines:
                            return record.position + found + 1
                        stop = found
                    end = begin
            return self.start

    def since(self, time_ns: int) -> int:
        """The position of the first byte that was written at this time or later."""
        with self._lock:
            for record, _, _ in self._from(self.start):
                if record.time_ns >= time_ns and record.length:
                    return record.position
            return self._end

    def _content(self, name: int, offset: int = 0) -> bytes:
        with open(self._path(name), "rb") as file:
            file.seek(offset)
            return file.read(self._size - offset) if name == self._files[-1] else file.read()

    def _remember(self, position: int, place: tuple[int, int]) -> None:
        self._places.pop(position, None)
        self._places[position] = place
        if len(self._places) > 64:
            del self._places[next(iter(self._places))]

    def _from(self, position: int) -> Iterator[tuple[_Record, bytes, tuple[int, int]]]:
        """Records from that which holds *position* on, with data and place."""
        if not self._files:
            return
        first = max(0, bisect.bisect_right(self._files, position) - 1)
        name, offset = self._places.get(position, (self._files[first], 0))
        if name not in self._files:
            name, offset = self._files[first], 0
        for file in self._files[self._files.index(name) :]:
            content = self._content(file, offset)
            at = 0
            while at < len(content):
                record = _record(content, at)
                begin = at + _HEADER.size
                if record.position + record.length > position or not record.length:
                    yield record, content[begin : begin + record.length], (file, offset + at)
                at = begin + record.length + _TRAILER.size
            offset = 0


def _record(content: bytes, offset: int) -> _Record:
    kind, _, length, *rest = _HEADER.unpack_from(content, offset)
    return _Record(kind, length, *rest)


def _whole(content: bytes) -> tuple[int, _Record | None]:
    """How much of a file is whole records, and the last of them."""
    offset, last = 0, None
    while len(content) - offset >= _FRAME:
        record = _record(content, offset)
        end = offset + _FRAME + record.length
        if end > len(content):
            break
        length, crc = _TRAILER.unpack_from(content, end - _TRAILER.size)
        if (
            record.kind >= len(_KINDS)
            or length != record.length
            or crc != zlib.crc32(content[offset : end - _TRAILER.size])
        ):
            break
        offset, last = end, record
    return offset, last


def _remove(directory: Path) -> None:
    """Remove a directory with files in it, and nothing below."""
    try:
        for name in os.listdir(directory):
            os.unlink(directory / name)
        os.rmdir(directory)
    except FileNotFoundError:
        return


class LogFiles:
    """The logs of all containers of the node, below *directory*.

    Also `Auditable`: a pod's directory is there for the "VM" ``pod <id>``, for a log outlives its VM.
    """

    def __init__(self, directory: Path, rotation: Rotation) -> None:
        self._directory = directory
        self._rotation = rotation
        self._open: dict[tuple[str, str], ContainerLog] = {}
        self._lock = threading.Lock()

    def log(self, pod_id: str, container_id: str) -> ContainerLog:
        """The log of a container, opened if it was not.

        Raises:
            StorageError: It cannot be read.
        """
        key = (pod_id, container_id)
        with self._lock:
            found = self._open.get(key)
            if found is None:
                try:
                    found = ContainerLog(self._directory / pod_id / container_id, self._rotation)
                except OSError as exc:
                    message = f"The log of container {pod_id}/{container_id} cannot be read: {exc.strerror}."
                    raise StorageError(message) from exc
                self._open[key] = found
            return found

    def delete(self, pod_id: str, container_id: str | None = None) -> None:
        """Remove the log of a container, or of all of a pod. Idempotent.

        Raises:
            StorageError: Something is left; may be repeated.
        """
        with self._lock:
            keys = [k for k in self._open if k[0] == pod_id and container_id in (None, k[1])]
            logs = [self._open.pop(key) for key in keys]
        directory = self._directory / pod_id
        try:
            for log in logs:
                log.delete()
            names = os.listdir(directory) if container_id is None else [container_id]
            for name in names:
                _remove(directory / name)
            if container_id is None:
                os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StorageError(f"The logs of pod {pod_id} cannot be removed: {exc.strerror}.") from exc

    async def held(self, mark: str) -> Sequence[Held]:
        """See `Auditable.held`: everything in this directory is the node's."""
        try:
            names = await asyncio.to_thread(os.listdir, self._directory)
        except FileNotFoundError:
            return []
        return [Held("logs", str(self._directory / name), owner_of(name)) for name in sorted(names)]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See `Auditable.free`."""
        await asyncio.to_thread(self.delete, Path(held.name).name)


def owner_of(pod_id: str) -> str:
    """What stands for a VM in an audit of logs, which outlive their VMs."""
    return f"pod {pod_id}"
