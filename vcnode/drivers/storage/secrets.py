"""Reads files with secrets. Blocking."""

from __future__ import annotations

from vcnode.drivers.storage.paths import AllowedRoots
from vcnode.errors import InvalidArgumentError
from vcnode.models.secrets import MAX_SECRET_BYTES


def read_secret(roots: AllowedRoots, path: str) -> bytes:
    """What the plain file *path* below *roots* holds.

    Raises:
        InvalidArgumentError, NotFoundError, StorageError: As `AllowedRoots.open_file`; or it is too long.
        OSError: The host refused.
    """
    with open(roots.open_file(path), "rb") as file:
        content = file.read(MAX_SECRET_BYTES + 1)
    if len(content) > MAX_SECRET_BYTES:
        raise InvalidArgumentError(f"Host path {path!r} holds more than {MAX_SECRET_BYTES} bytes.", path=path)
    return content
