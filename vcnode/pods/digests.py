"""Files held against digests. Blocking."""

from __future__ import annotations

import hashlib
import os

from vcnode.errors import FailedPreconditionError

_CHUNK_BYTES = 1 << 20


def verify(fd: int, digest: str, field: str) -> None:
    """See that the open file *fd* holds what *digest* (``sha256:…`` or ``sha512:…``) says.

    Its position stays what it is.

    Raises:
        FailedPreconditionError: It holds something else; names *field*, and says what it is.
        OSError: It cannot be read.
    """
    algorithm, _, wanted = digest.partition(":")
    hashed, at = hashlib.new(algorithm), 0
    while chunk := os.pread(fd, _CHUNK_BYTES, at):
        hashed.update(chunk)
        at += len(chunk)
    if hashed.hexdigest() != wanted:
        raise FailedPreconditionError(
            f"{field}: the file does not have this digest; it has {algorithm}:{hashed.hexdigest()}.",
            field=field,
        )
