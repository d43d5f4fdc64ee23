"""Put a directory in place as a whole, one builder at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vcnode.guest.image.errors import GuestImageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def exclusive(lock_file: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold *lock_file* for the length of the block; calls *on_wait* if somebody else holds it.

    The file stays: a lock file that is deleted while somebody waits for it protects nothing.

    Raises:
        GuestImageError: The file cannot be made.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise GuestImageError(f"{lock_file} cannot be written ({exc.strerror}).") from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(directory: Path) -> None:
    """Remove what builds of *directory* that were killed left beside it. Call with the lock held."""
    for path in directory.parent.glob(f".{directory.name}.build-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A scratch directory beside *directory*, gone after the block."""
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.build-", dir=directory.parent) as path:
        yield Path(path)


def write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make *directory* with *files*, all on stable storage."""
    directory.mkdir()
    directory.chmod(0o755)  # whatever the umask: the node agent may be another user than the builder
    for name, content in files.items():
        with (directory / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
    _sync(directory)


def replace_directory(new: Path, target: Path) -> None:
    """Make *new* take the place of *target* in one step; what was there before is then at *new*, if anything.

    A file system that cannot exchange two directories sees a moment without *target*.

    Raises:
        OSError: Nothing was changed.
    """
    if not os.path.lexists(target):
        new.rename(target)
    elif not _exchange(new, target):
        aside = new.with_name(new.name + ".old")
        target.rename(aside)
        try:
            new.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(new)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):  # not on this file system, not in this kernel
        return False
    raise OSError(error, os.strerror(error), str(second))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
