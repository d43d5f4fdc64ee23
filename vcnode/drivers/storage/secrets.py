"""Reads files with secrets. Blocking."""

from __future__ import annotations

import os
import stat

from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.errors import InvalidArgumentError
from vcnode.models.secrets import MAX_SECRET_BYTES


def read_secret(roots: AllowedRoots, path: str) -> bytes:
    """What the plain file *path* below *roots* holds.

    Raises:
        InvalidArgumentError, NotFoundError, StorageError: As `AllowedRoots.open`; no plain file, or too long.
        OSError: The host refused.
    """
    fd = roots.open(path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgumentError(f"Host path {path!r} is no plain file.", path=path)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
    with open(again, "rb") as file:
        content = file.read(MAX_SECRET_BYTES + 1)
    if len(content) > MAX_SECRET_BYTES:
        raise InvalidArgumentError(f"Host path {path!r} holds more than {MAX_SECRET_BYTES} bytes.", path=path)
    return content
