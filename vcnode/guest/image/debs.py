"""Read .deb files through dpkg-deb, which knows every compression that packages come in."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from vcnode.guest.image.errors import GuestImageError

_MERGED = ("bin", "lib", "lib64", "sbin")
"""Top directories that are links into /usr nowadays; packages may still have either name in them."""


def normal_path(name: str) -> str:
    """A member's path as on a system with merged /usr: ``./lib/x`` is ``/usr/lib/x``.

    Raises:
        GuestImageError: The path has ``..`` in it.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise GuestImageError(f"A package has the path {name!r} in it.")
    if parts and parts[0] in _MERGED:
        parts.insert(0, "usr")
    return "/" + "/".join(parts)


def members(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | str]]:
    """Path (normal) and content of the files for which *wanted*(path); of symbolic links, the target.

    Raises:
        GuestImageError: The package is damaged, or dpkg-deb is not there.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", str(deb)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as exc:
            raise GuestImageError("dpkg-deb cannot be started: the builder needs Debian or Ubuntu.") from exc
        with process:
            try:
                if process.stdout is None:  # cannot be: asked for above
                    raise GuestImageError("dpkg-deb has no output.")
                yield from _members(process.stdout, wanted)
                while process.stdout.read(1 << 16):  # padding, so that dpkg-deb ends by itself
                    pass
            except (tarfile.TarError, EOFError) as exc:
                process.terminate()
                raise GuestImageError(f"The package {deb.name} is damaged.") from exc
            except BaseException:  # also when the caller wants no more
                process.terminate()
                raise
        if process.returncode != 0:
            raise GuestImageError(f"The package {deb.name} is damaged.")


def _members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | str]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = normal_path(member.name)
            if not wanted(path):
                continue
            if member.issym():
                yield path, member.linkname
            elif member.isfile():
                file = archive.extractfile(member)
                if file is not None:  # None for what is no file, which was asked above
                    yield path, file.read()
