"""Keys of SSH: the node's own, those that callers name, and those of guests."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import asyncssh

from vcnode.errors import InvalidArgumentError, StorageError

KEY_FILE = "sshd_key"
"""In the state directory: the node's own key, for guests that trust it."""
KEY_TYPE = "ssh-ed25519"
HOST_KEY_ALGORITHMS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
"""What hosts may prove themselves by: no certificates, nothing with SHA-1. The whole list of asyncssh is more
than dropbear 2022.83 takes: it hangs up."""


def own_key(state_dir: Path) -> asyncssh.SSHKey:
    """The node's own key, made if it is missing. Blocking.

    Raises:
        StorageError: It cannot be read or made, others may read it, or it is no key.
    """
    path = state_dir / KEY_FILE
    try:
        if not path.exists():
            _make(path)
        with path.open("rb") as file:
            if problem := exposed(os.fstat(file.fileno())):
                raise StorageError(f"The node's SSH key {path} {problem}; run: chmod 600 {path}.")
            return asyncssh.import_private_key(file.read())
    except OSError as exc:
        raise StorageError(f"The node's SSH key {path} cannot be used: {exc.strerror}.") from exc
    except asyncssh.KeyImportError as exc:
        raise StorageError(f"{path} holds no SSH key; remove it, and the node makes another.") from exc


def _make(path: Path) -> None:
    key = asyncssh.generate_private_key(KEY_TYPE, comment="vcnode")
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(key.export_private_key())
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def exposed(found: os.stat_result) -> str | None:
    """Why a file with a private key is not private; None when it is. As ssh(1) judges it, IdentityFile."""
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to user {found.st_uid}, neither root nor the node agent's"
    if found.st_mode & 0o077:
        return f"may be used by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def read_private(data: bytes, field: str) -> asyncssh.SSHKey:
    """A private key that a caller has named. Raises InvalidArgumentError."""
    try:
        return asyncssh.import_private_key(data)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
        raise InvalidArgumentError.field(field, "holds no private key of SSH without a passphrase") from exc


def public_line(key: asyncssh.SSHKey) -> str:
    """Type and key as in ``known_hosts`` and ``authorized_keys``, without a comment."""
    return " ".join(key.export_public_key().decode().split()[:2])


def algorithms_for(pinned: str | None) -> tuple[str, ...]:
    """By which algorithms a server may prove itself: those of the key that is *pinned*; None: any."""
    kind = None if pinned is None else pinned.split()[0]
    if kind == "ssh-rsa":
        return ("rsa-sha2-512", "rsa-sha2-256")
    return HOST_KEY_ALGORITHMS if kind is None else (kind,)
