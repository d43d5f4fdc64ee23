"""What the guest answers that it will not do."""

from __future__ import annotations

from vcnode.errors import AgentError


class RefusedError(AgentError):
    """The guest has answered a command with ERROR, which tells no reason."""
