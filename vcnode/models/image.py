"""What an image says about the process to run, and where a pull stands."""

from __future__ import annotations

from vcnode.models.base import Reply


class ImageConfig(Reply):
    """The part of an image's config that a container obeys. Source: OCI image-spec, config.md."""

    entrypoint: tuple[str, ...] = ()
    """First words of the command."""
    cmd: tuple[str, ...] = ()
    """Words after the entrypoint."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment, as names and values."""
    workdir: str | None = None
    """Working directory, absolute."""
    user: str | None = None
    """``user``, ``user:group``, names or numbers."""
    stop_signal: int | None = None
    """Number of the signal that asks the main process to end."""


class PullProgress(Reply):
    """Where a pull stands; the data of ``image.pulling``."""

    phase: str
    """``resolving``, ``downloading`` or ``unpacking``."""
    done_bytes: int = 0
    """Bytes that were downloaded."""
    total_bytes: int | None = None
    """Bytes to download, once known."""
