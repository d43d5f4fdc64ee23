"""The audit trail: one event per command that may change something, told with its outcome.

The event is part of the transaction that keeps the outcome: whoever repeats the command, and however often
the node agent is killed on the way, there is one.
"""

from __future__ import annotations

import json
from datetime import datetime

from vcnode.models.audit import AuditRecord
from vcnode.models.events import Event, EventKind
from vcnode.pods.store import Tx
from vcnode.pods.stored import Stored

DENIED = "permission_denied"
_MADE_IDS = {"pod.create": "pod_id", "pod.run": "pod_id", "container.create": "container_id"}
"""Commands that may leave an id to the node, and where their reply has it."""


def concluded(record: AuditRecord, stored: Stored) -> AuditRecord:
    """The record with the outcome, and with the ids that the node has made."""
    changes: dict[str, object] = {"ok": stored.ok, "code": "ok" if stored.ok else stored.code or "internal"}
    if not stored.ok:
        error = _object(stored.body)
        message, details = error.get("message"), error.get("details")
        changes["message"] = message if isinstance(message, str) else None
        rule = details.get("rule") if isinstance(details, dict) else None
        changes["rule"] = rule if isinstance(rule, str) and stored.code == DENIED else None
    elif (field := _MADE_IDS.get(record.verb)) is not None and field not in record.names:
        made = _object(stored.body).get(field)
        if isinstance(made, str):
            changes["names"] = {**record.names, field: made}
    return record.model_copy(update=changes)


def tell(tx: Tx, record: AuditRecord, *, time: datetime, mock: bool) -> Event:
    """Put the event of a record into the outbox."""
    kind = EventKind.AUDIT_DONE if record.ok else EventKind.AUDIT_FAILED
    if record.code == DENIED:
        kind = EventKind.AUDIT_DENIED
    return tx.emit(
        kind,
        f"command/{record.command_id}",
        record.model_dump(mode="json"),
        time=time,
        mock=mock,
        command_id=record.command_id,
        traceparent=record.traceparent,
    )


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
