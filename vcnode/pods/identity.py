"""Who the node is, beside its database: one that was lost or put back must not make it another.

Holds the identity that tells two nodes of one name apart, and the last epoch, which must never come again.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)


class Identity(BaseModel):
    """Content of the file."""

    model_config = ConfigDict(frozen=True)

    node: str
    """The node's name."""
    identity: str = Field(min_length=1)
    """Made with the state directory."""
    epoch: int = Field(ge=0)
    """The last that was used."""


def read_identity(path: Path, node: str) -> Identity | None:
    """What is kept at *path*; None when there is nothing, or nothing of this node."""
    try:
        found = Identity.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        log.warning("%s cannot be read", path, exc_info=exc)
        return None
    return found if found.node == node else None


def write_identity(path: Path, identity: Identity) -> None:
    """Replace the file as a whole, on the disk when this returns.

    A failure is logged only: the database has it, too.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        with fresh.open("w") as file:
            file.write(identity.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except OSError as exc:
        log.warning("%s cannot be written", path, exc_info=exc)
