"""What a command is about, for the log lines of its work. Pure."""

from __future__ import annotations

from vcnode.models.base import Request


def about(request: Request) -> dict[str, str]:
    """``pod_id`` and ``container_id``, as far as *request* names them."""
    found: dict[str, str] = {}
    for kind in ("pod", "container"):
        name = getattr(request, f"{kind}_id", None) or getattr(getattr(request, kind, None), "id", None)
        if isinstance(name, str):
            found[f"{kind}_id"] = name
    return found
