"""What a guest has written to its console."""

from __future__ import annotations

from pydantic import Field

from vcnode.models.base import PodId, Reply, Request

MAX_CONSOLE_BYTES = 256 * 1024
"""Most bytes of one reply."""


class PodConsole(Request):
    """``pod.console``."""

    pod_id: PodId
    max_bytes: int = Field(default=64 * 1024, ge=1, le=MAX_CONSOLE_BYTES)
    """Most bytes wanted: the last ones."""


class ConsoleText(Reply):
    """The end of a guest's console."""

    pod_id: str
    """The pod."""
    text: str
    """What its firmware, kernel and programs have written last, without control characters."""
