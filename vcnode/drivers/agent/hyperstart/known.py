"""What the host must remember of a guest's containers, which the guest cannot list: a file beside the VM.

It holds nothing that is secret, and ends with the VM's directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vcnode.errors import AgentError

FILE = "hyperstart.json"


class Known(BaseModel):
    """A container that was started."""

    model_config = ConfigDict(extra="forbid")

    stdio: int
    stderr: int
    terminal: bool
    instance: int
    """Of its output; see `LogPosition`."""
    exit_code: int | None = None
    """Once it has ended."""


class Memory(BaseModel):
    """What is known of one guest."""

    model_config = ConfigDict(extra="forbid")

    pod: str | None = None
    """STARTPOD, once the guest has taken it: a guest that has cleaned up needs it again."""
    pod_runs: bool = False
    """Whether the guest has a pod now."""
    containers: dict[str, Known] = {}

    @classmethod
    def load(cls, directory: Path) -> Memory:
        """What an earlier session has left; nothing, if there was none. Raises AgentError."""
        try:
            return cls.model_validate_json((directory / FILE).read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as exc:
            raise AgentError(f"{directory / FILE} cannot be read: start the pod anew.") from exc

    def save(self, directory: Path) -> None:
        """Keep it. Not synced: no VM outlives its host. Raises AgentError."""
        fresh = directory / f"{FILE}.new"
        try:
            fresh.write_text(self.model_dump_json())
            os.replace(fresh, directory / FILE)
        except OSError as exc:
            raise AgentError(f"{directory / FILE} cannot be written: {exc.strerror}.") from exc
