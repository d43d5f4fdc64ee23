"""Reads files with secrets. Blocking."""

from __future__ import annotations

import os
import stat

from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.errors import InvalidArgumentError
from vcnode.models.secrets import MAX_SECRET_BYTES


def read_secret(roots: AllowedRoots, path: str, *, private: bool = False) -> bytes:
    """What the plain file *path* below *roots* holds.

    Args:
        roots: Where it has to lie.
        path: The file.
        private: Whether it must be its owner's alone, who is root or the node agent's user, as of ssh(1).

    Raises:
        InvalidArgumentError, NotFoundError, StorageError: As `AllowedRoots.open_file`; or it is too long, or
            not private.
        OSError: The host refused.
    """
    with open(roots.open_file(path), "rb") as file:
        found = os.fstat(file.fileno())
        if private and (found.st_mode & 0o077 or found.st_uid not in (0, os.geteuid())):
            mode, owner = stat.S_IMODE(found.st_mode), found.st_uid
            raise InvalidArgumentError(
                f"Host path {path!r} may be used by others than root (mode {mode:04o}, user {owner}); run:"
                f" chown root {path}; chmod 600 {path}.",
                path=path,
            )
        content = file.read(MAX_SECRET_BYTES + 1)
    if len(content) > MAX_SECRET_BYTES:
        raise InvalidArgumentError(f"Host path {path!r} holds more than {MAX_SECRET_BYTES} bytes.", path=path)
    return content
