"""Opens programs that run as hooks. Blocking."""

from __future__ import annotations

import os
import stat

from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.errors import InvalidArgumentError


def open_hook(roots: AllowedRoots, path: str) -> int:
    """Open the program *path* below *roots*; the caller closes the descriptor.

    It runs with the rights of the node agent, so nobody else may be able to change it.

    Raises:
        InvalidArgumentError, NotFoundError, StorageError: As `AllowedRoots.open_file`; or it is not
            executable, or another user than the node agent's may write to it.
    """
    fd = roots.open_file(path)
    found = os.fstat(fd)
    why = None
    if not found.st_mode & stat.S_IXUSR:
        why = "is not executable"
    elif found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = "can be changed by other users; chown it to root and take the right to write from all others"
    if why is not None:
        os.close(fd)
        raise InvalidArgumentError(f"Hook {path!r} {why}.", path=path)
    return fd
