"""The node's keys for sealed secrets: its own, made once, and those that it shares with others. Blocking."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vcnode.errors import StorageError
from vcnode.models.xkeys import BadKeyError, CurveKey

NAME = "xkey"
"""File below the state directory."""
MAX_SEED_BYTES = 1024


def load(state_dir: Path, shared: Sequence[Path]) -> tuple[CurveKey, ...]:
    """The node's own key, made if there is none, and then the others.

    Raises:
        StorageError: A file cannot be read, holds no seed, or others may read it; says which.
    """
    own = state_dir / NAME
    if not own.exists():
        _make(own)
    return tuple(_read(file) for file in (own, *shared))


def write(file: Path, key: CurveKey) -> None:
    """Keep a key where only its owner can read it; an existing file is never replaced. Raises OSError."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as target:
        target.write(f"{key.seed}\n")
        target.flush()
        os.fsync(target.fileno())


def _make(file: Path) -> None:
    """Make the node's key: whole, or not at all, so that a crash leaves no half of it."""
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        write(fresh, CurveKey.make())
        fresh.rename(file)
    except OSError as exc:
        raise StorageError(f"The node's key {file} cannot be made: {exc.strerror}.") from exc


def _read(file: Path) -> CurveKey:
    try:
        with file.open("rb") as source:
            if stat.S_IMODE(os.fstat(source.fileno()).st_mode) & 0o077:
                raise StorageError(f"Others may read the key {file}; run: chmod 600 {file}.")
            text = source.read(MAX_SEED_BYTES)
        return CurveKey.from_seed(text.decode("ascii").strip())
    except OSError as exc:
        raise StorageError(f"The key {file} cannot be read: {exc.strerror}.") from exc
    except (BadKeyError, UnicodeDecodeError) as exc:
        raise StorageError(
            f"{file} holds no seed of a curve key (SX…); make one by 'vcnode secret key'."
        ) from exc
