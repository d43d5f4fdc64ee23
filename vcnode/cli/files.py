"""``vcnode cp``, and the tar streams below it."""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
from typing import IO, TYPE_CHECKING, Annotated, BinaryIO

import typer

from vcnode.cli import flags
from vcnode.cli.command import Cli, command
from vcnode.cli.exits import UsageError

if TYPE_CHECKING:
    from vcnode.client import NodeClient
    from vcnode.client.sessions import CopyIn

BLOCK_BYTES = 128 * 1024
RemotePath = Annotated[str, typer.Argument(metavar="PATH", help="Absolute path in the container.")]
MaxBytes = Annotated[
    int | None, typer.Option("--max-bytes", metavar="N", min=0, help="Fail when there is more content.")
]


async def copy_in(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, path: RemotePath, max_bytes: MaxBytes = None
) -> None:
    """Unpack the tar stream on standard input in a directory of a container.

    \b
    tar -C site -c . | vcnode container copy-in web main /srv/www
    """
    async with cli.node() as node, node.copy_in(pod_id, container_id, path, max_bytes=max_bytes) as stream:
        await _send(stream, sys.stdin.buffer)


async def copy_out(
    cli: Cli, pod_id: flags.Pod, container_id: flags.Container, path: RemotePath, max_bytes: MaxBytes = None
) -> None:
    """Write a file or directory of a container to standard output, as a tar stream.

    \b
    vcnode container copy-out web main /var/log | tar -t
    """
    from vcnode.cli.terminal import Printer

    printer = Printer()
    sys.stdout.flush()
    async with cli.node() as node, node.copy_out(pod_id, container_id, path, max_bytes=max_bytes) as stream:
        async for piece in stream.pieces():
            await printer.write(sys.stdout.fileno(), piece)


async def cp(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="PATH, POD/CONTAINER:PATH, or -.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The same.")],
    max_bytes: MaxBytes = None,
) -> None:
    """Copy files into or out of a container: one of the two is POD/CONTAINER:PATH. '-' is a tar stream.

    Into a directory that exists, or under another name where there is none. Owners, modes, links and times
    are kept; on the way out, owners only for root.

    \b
    vcnode cp site web/main:/srv/www
    vcnode cp web/main:/var/log/app.log .
    vcnode cp web/main:/etc - | tar -t
    """
    from_there, to_there = _remote(source), _remote(target)
    if (from_there is None) == (to_there is None):
        raise UsageError("Give one place in a container, as POD/CONTAINER:PATH, and one here.")
    if to_there is not None and source != "-":
        _check_source(source)
    async with cli.node() as node:
        if to_there is not None:
            await _copy_in(node, source, to_there, max_bytes)
        elif from_there is not None:
            await _copy_out(node, from_there, target, max_bytes)


def _remote(place: str) -> tuple[str, str, str] | None:
    """Pod, container and path, where *place* is in a container."""
    where, colon, path = place.partition(":")
    pod_id, slash, container_id = where.partition("/")
    if not colon or not slash or "/" in container_id or not path.startswith("/") or pod_id in ("", ".", ".."):
        return None
    return pod_id, container_id, path


def _check_source(path: str) -> None:
    if not os.path.lexists(path):
        raise UsageError(f"There is no {path}.")


async def _send(stream: CopyIn, source: BinaryIO | IO[bytes]) -> None:
    from asyncio import to_thread

    while data := await to_thread(source.read, BLOCK_BYTES):
        await stream.write(data)
    await stream.finish()


async def _copy_in(node: NodeClient, source: str, there: tuple[str, str, str], max_bytes: int | None) -> None:
    async with node.copy_in(*there, max_bytes=max_bytes) as stream:
        if source == "-":
            await _send(stream, sys.stdin.buffer)
            return
        await _through_pipe(stream, source)


async def _through_pipe(stream: CopyIn, source: str) -> None:
    """Pack in a thread, send here; the pipe in between is the only buffer."""
    import asyncio

    reading, writing = os.pipe()

    def pack() -> None:
        name = os.path.basename(os.path.abspath(source))
        with (
            os.fdopen(writing, "wb") as sink,
            tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(source, arcname=name)

    packing = asyncio.get_running_loop().run_in_executor(None, pack)
    with os.fdopen(reading, "rb") as pipe:
        try:
            while data := await asyncio.to_thread(pipe.read, BLOCK_BYTES):
                await stream.write(data)
        finally:
            pipe.close()  # a packer that is still at it gets EPIPE
            try:
                await packing
            except BrokenPipeError:
                pass
            except OSError as exc:
                raise UsageError(f"{exc.filename or source} cannot be read: {exc.strerror}.") from exc
    await stream.finish()


async def _copy_out(
    node: NodeClient, there: tuple[str, str, str], target: str, max_bytes: int | None
) -> None:
    import asyncio

    from vcnode.cli.terminal import Printer

    async with node.copy_out(*there, max_bytes=max_bytes) as stream:
        if target == "-":
            printer = Printer()
            sys.stdout.flush()
            async for piece in stream.pieces():
                await printer.write(sys.stdout.fileno(), piece)
            return
        reading, writing = os.pipe()
        unpacking = asyncio.get_running_loop().run_in_executor(None, _unpack, reading, target)
        try:
            with os.fdopen(writing, "wb", 0) as pipe, contextlib.suppress(BrokenPipeError):
                async for piece in stream.pieces():
                    await asyncio.to_thread(pipe.write, piece)
        except BaseException:
            with contextlib.suppress(OSError, tarfile.TarError):  # what it had to unpack was cut off
                await unpacking
            raise
        try:
            await unpacking
        except (OSError, tarfile.TarError) as exc:
            raise UsageError(f"{target} cannot be written: {exc}.") from exc


def _unpack(reading: int, target: str) -> None:
    """Unpack what a node sends, which is not trusted: nothing in it leads out of *target*."""
    into = os.path.isdir(target)
    root, name = (target, None) if into else os.path.split(os.path.abspath(target))
    with os.fdopen(reading, "rb") as pipe:
        with tarfile.open(fileobj=pipe, mode="r|") as archive:
            archive.extraction_filter = tarfile.tar_filter if os.geteuid() == 0 else tarfile.data_filter
            for entry in archive:
                if name is not None:
                    entry.name = "/".join([name, *entry.name.split("/")[1:]])
                    if entry.islnk():
                        entry.linkname = "/".join([name, *entry.linkname.split("/")[1:]])
                _make_way(root, entry)
                archive.extract(entry, root)
        while pipe.read(BLOCK_BYTES):
            pass


def _make_way(root: str, entry: tarfile.TarInfo) -> None:
    """Remove what is where *entry* goes, instead of following it, and see that it goes nowhere else.

    The filters of `tarfile` are not enough for a stranger's archive: the one that keeps owners lets hard
    links lead anywhere, through which the next entry of that name is written, and lets devices be made; both
    resolve links by a function that long paths get the better of (CVE-2025-4517).

    Raises:
        TarError: It would lead through a link, or is a device.
    """
    if entry.ischr() or entry.isblk():
        raise tarfile.TarError(f"{entry.name} is a device")
    where = _place(root, entry.name)
    if entry.islnk():
        target = _place(root, entry.linkname)
        if target == where or not os.path.lexists(target):
            raise tarfile.TarError(f"{entry.name} links to nothing that came before")
        if os.path.islink(target):  # a link to a link would get its owner and mode set through it
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(target)
        else:
            entry.linkname = os.path.relpath(target, root)
    if where == root:
        return
    if os.path.islink(where) or (os.path.exists(where) and not entry.isdir() and not os.path.isdir(where)):
        os.unlink(where)


def _place(root: str, name: str) -> str:
    """Path of a name in an archive, to which no link leads. Raises TarError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    where = root
    for at, part in enumerate(parts):
        if part == ".." or (at and os.path.islink(where)):
            raise tarfile.TarError(f"{name} leads out of the archive")
        where = os.path.join(where, part)
    return where


def register(root: typer.Typer, containers: typer.Typer) -> None:
    """Add the commands."""
    command(root, "cp")(cp)
    command(containers, "copy-in")(copy_in)
    command(containers, "copy-out")(copy_out)
