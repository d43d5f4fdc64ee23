"""Copies of files by READFILE and WRITEFILE, as tar streams.

Both commands carry one whole plain file. Owner, mode and time are not in them, nor directories and links: a
file that is written belongs to root with mode 0644, or keeps what it has if it is there.
"""

from __future__ import annotations

import asyncio
import io
import json
import posixpath
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from vcnode.drivers.agent.hyperstart.errors import RefusedError
from vcnode.drivers.base import ProcessExit
from vcnode.errors import InvalidArgumentError, NotFoundError, UnsupportedError, VcnodeError

MAX_FILE_BYTES = 16 * 1000 * 1000
"""Largest file; it goes through memory, at 512 bytes a round trip."""
FILE_LIMIT_S = 600.0
KILLED = 137
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one container."""

    read: Callable[[str, int], Awaitable[bytes]]
    """Path, and most bytes of it."""
    write: Callable[[str, bytes], Awaitable[None]]


class _Copy:
    """A `RunningProcess` that runs here: whoever reads its output does the work."""

    def __init__(self, files: Files, path: str, max_bytes: int) -> None:
        self._files = files
        self._path = posixpath.normpath(path)
        self._max_bytes = min(max_bytes, MAX_FILE_BYTES)
        self._exit: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()

    async def _copy(self) -> bytes:
        raise NotImplementedError

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """See `RunningProcess.output`."""
        try:
            made = await self._copy()
            for at in range(0, len(made), _CHUNK):
                yield "stdout", made[at : at + _CHUNK]
            self._end(0)
        except VcnodeError as exc:
            yield "stderr", json.dumps([exc.code, exc.message]).encode()
            self._end(1)
        finally:
            self._end(KILLED)

    async def resize(self, rows: int, columns: int) -> None:
        """It has no terminal."""

    async def signal(self, number: int) -> None:
        """See `RunningProcess.signal`: it ends, whatever the signal."""
        await self.close()

    async def wait(self) -> ProcessExit:
        """See `RunningProcess.wait`."""
        return await asyncio.shield(self._exit)

    async def close(self) -> None:
        """See `RunningProcess.close`. What a command to the guest has begun goes on."""
        self._end(KILLED)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(ProcessExit(code))


class CopyOut(_Copy):
    """The file as an archive of one entry."""

    async def write_stdin(self, data: bytes) -> None:
        """It reads nothing."""

    async def close_stdin(self) -> None:
        """It reads nothing."""

    async def _copy(self) -> bytes:
        try:
            data = await self._files.read(self._path, self._max_bytes)
        except RefusedError as exc:
            raise NotFoundError(
                f"The guest does not give {self._path}: there is no such file, or it is a directory, of which"
                " hyperstart copies none."
            ) from exc
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as made:
            entry = tarfile.TarInfo(posixpath.basename(self._path))
            entry.size = len(data)
            made.addfile(entry, io.BytesIO(data))
        return archive.getvalue()


class CopyIn(_Copy):
    """Writes the plain files of an archive, once all of it has come."""

    def __init__(self, files: Files, path: str, max_bytes: int) -> None:
        super().__init__(files, path, max_bytes)
        self._archive = io.BytesIO()
        self._too_long = False
        self._complete = asyncio.Event()

    async def write_stdin(self, data: bytes) -> None:
        """See `RunningProcess.write_stdin`; what is beyond the bound is dropped, and told at the end."""
        if self._archive.tell() + len(data) > 2 * self._max_bytes + (1 << 20):
            self._too_long = True
        else:
            self._archive.write(data)

    async def close_stdin(self) -> None:
        """See `RunningProcess.close_stdin`: now it is written."""
        self._complete.set()

    async def close(self) -> None:
        """See `RunningProcess.close`."""
        self._too_long = True
        self._complete.set()
        await super().close()

    async def _copy(self) -> bytes:
        await self._complete.wait()
        if self._too_long:
            raise _too_much(self._max_bytes)
        found = plain_files(self._archive.getvalue(), self._max_bytes)
        for name, data in found:
            try:
                await self._files.write(posixpath.join(self._path, name), data)
            except RefusedError as exc:
                if len(found) > 1 or "/" in name:
                    raise NotFoundError(f"The guest does not write {name!r} below {self._path}.") from exc
                await self._rename(data)
        return b""

    async def _rename(self, data: bytes) -> None:
        """What is to be written to is no directory, so it is the file's own new name."""
        try:
            await self._files.write(self._path, data)
        except RefusedError as exc:
            raise NotFoundError(
                f"The guest does not write {self._path}: it has no directory for it."
            ) from exc


def plain_files(archive: bytes, max_bytes: int) -> list[tuple[str, bytes]]:
    """The files in a tar archive. Pure.

    Raises:
        InvalidArgumentError: It is no archive, or a name leads out of where it is unpacked.
        UnsupportedError: It has something else in it, or too much.
    """
    found: list[tuple[str, bytes]] = []
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as made:
            for entry in made:
                name = posixpath.normpath(entry.name)
                if name.startswith(("/", "..")) or name == ".":
                    raise InvalidArgumentError(f"The archive's entry {entry.name!r} leads elsewhere.")
                if not entry.isfile():
                    raise UnsupportedError(f"hyperstart copies plain files only; {entry.name!r} is none.")
                total += entry.size
                content = made.extractfile(entry)
                if total > max_bytes or content is None:
                    raise _too_much(max_bytes)
                found.append((name, content.read()))
    except (tarfile.TarError, EOFError, ValueError, OSError) as exc:
        raise InvalidArgumentError("This is no tar archive.") from exc
    return found


def _too_much(max_bytes: int) -> UnsupportedError:
    return UnsupportedError(f"This is more than can be copied with hyperstart, {max_bytes} bytes.")
