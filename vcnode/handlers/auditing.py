"""What the audit event of a command will say but for its outcome. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from vcnode.handlers.headers import Meta
from vcnode.models.audit import Actor, AuditRecord
from vcnode.models.base import Request

NAMES = ("pod_id", "container_id", "name", "reference", "session_id")
"""Fields that say what a command is about."""
SECRET_FIELDS = frozenset({"password"})
"""Fields that the digest does not hang on: who sees it could guess them."""
MAX_CHARS = 256
PENDING = "pending"
"""Stands for the code until there is an outcome."""

Way = Literal["rpc", "cmd"]


def begin(
    verb: str, command_id: str, request: Request, meta: Meta, *, way: Way, now: datetime, trusted: bool
) -> AuditRecord:
    """The record of a command that is about to be carried out.

    Args:
        verb: The command.
        command_id: Its id, given or made.
        request: What it asks for.
        meta: Its headers.
        way: How it came.
        now: The time of day.
        trusted: Whether the NATS server's word on the sender cannot be somebody else's.
    """
    fields = request.model_dump(mode="json", exclude_unset=True)
    return AuditRecord(
        verb=verb,
        command_id=command_id,
        way=way,
        actor=actor(meta, trusted=trusted),
        names=names(fields),
        digest=digest(fields),
        received_at=now,
        ok=False,
        code=PENDING,
        traceparent=meta.traceparent,
    )


def actor(meta: Meta, *, trusted: bool) -> Actor:
    """Who sent it. Source: nats-server, ClientInfo (``acc``, ``user``, ``id``, ``name``, ``host``)."""
    try:
        info = json.loads(meta.request_info or "{}")
    except (ValueError, RecursionError):
        info = {}
    if not isinstance(info, dict):
        info = {}
    number = info.get("id")
    found = {
        "account": _text(info.get("acc")),
        "user": _text(info.get("user")),
        "client_id": number if isinstance(number, int) and not isinstance(number, bool) else None,
        "client_name": _text(info.get("name")),
        "host": _text(info.get("host")),
    }
    known = any(value is not None for value in found.values())
    return Actor(**found, verified=trusted and known, claim=meta.actor)


def names(fields: Mapping[str, Any]) -> dict[str, str]:
    """What a request is about, by the names of `NAMES`."""
    found = {name: fields[name] for name in NAMES if isinstance(fields.get(name), str)}
    for kind in ("pod", "container"):
        spec = fields.get(kind)
        if isinstance(spec, Mapping) and isinstance(spec.get("id"), str):
            found[f"{kind}_id"] = spec["id"]
    return found


def digest(fields: Mapping[str, Any]) -> str:
    """See `AuditRecord.digest`."""
    text = json.dumps(_veiled(fields), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _veiled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: "***" if k in SECRET_FIELDS and v is not None else _veiled(v) for k, v in value.items()}
    return [_veiled(item) for item in value] if isinstance(value, list) else value


def _text(value: object) -> str | None:
    return value[:MAX_CHARS] if isinstance(value, str) and value else None
