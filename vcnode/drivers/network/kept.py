"""Small records of network drivers, one file each, that outlive the node agent and a reboot of the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from vcnode.errors import NetworkError
from vcnode.models.vm import Data

R = TypeVar("R", bound=Data)

_SUFFIX = ".json"
_UNFINISHED = ".new"


class Kept(Generic[R]):
    """Records of one kind by name. All methods block for the time of a write to the disk.

    Args:
        directory: Where they are; made with the first.
        parse: Makes a record of its JSON again.
    """

    def __init__(self, directory: Path, parse: Callable[[bytes], R]) -> None:
        self._directory = directory
        self._parse = parse

    def path(self, name: str) -> Path:
        """The file of a record."""
        return self._directory / f"{name}{_SUFFIX}"

    def save(self, name: str, record: R) -> None:
        """Write a record, whole or not at all; on the disk when this returns.

        Raises:
            NetworkError: It cannot be written; an earlier one stays.
        """
        path = self.path(name)
        temporary = path.with_suffix(_UNFINISHED)
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary.open("wb") as file:
                file.write(record.model_dump_json().encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._sync()
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise NetworkError(f"{path} cannot be written: {exc.strerror}.") from exc

    def find(self, prefix: str) -> dict[str, R]:
        """All records whose name begins so, by name, in the order of their names.

        Raises:
            NetworkError: One of them cannot be read, or makes no sense.
        """
        return {name: self._load(name) for name in self.names(prefix)}

    def names(self, prefix: str) -> list[str]:
        """Names of all records that begin so, sorted."""
        try:
            files = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise NetworkError(f"{self._directory} cannot be read: {exc.strerror}.") from exc
        return sorted(f[: -len(_SUFFIX)] for f in files if f.startswith(prefix) and f.endswith(_SUFFIX))

    def remove(self, name: str) -> None:
        """Forget a record. Idempotent. Raises NetworkError."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as exc:
            raise NetworkError(f"{self.path(name)} cannot be removed: {exc.strerror}.") from exc

    def tidy(self) -> None:
        """Remove what a crash has left in the middle of `save`; nobody may be saving. Raises NetworkError."""
        try:
            for path in self._directory.glob(f"*{_UNFINISHED}"):
                path.unlink(missing_ok=True)
        except OSError as exc:
            raise NetworkError(f"{self._directory} cannot be tidied up: {exc.strerror}.") from exc

    def _load(self, name: str) -> R:
        path = self.path(name)
        try:
            return self._parse(path.read_bytes())
        except OSError as exc:
            raise NetworkError(f"{path} cannot be read: {exc.strerror}.") from exc
        except (ValidationError, RecursionError) as exc:
            raise NetworkError(f"{path} is damaged; undo by hand what it tells of, and remove it.") from exc

    def _sync(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
