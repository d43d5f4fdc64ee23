"""What travels beside the bodies: header names, and the body of an error reply."""

from __future__ import annotations

from typing import Final

from pydantic import ValidationError

from vcnode.errors import NodeError, VcnodeError, from_code
from vcnode.models.base import JsonObject, Reply

COMMAND_ID: Final = "Vcnode-Command-Id"
"""Idempotency key of a command; made on arrival when absent, and always in the reply."""
DEADLINE: Final = "Vcnode-Deadline"
"""RFC 3339 time with zone at which the caller stops waiting."""
EXPECTED_REVISION: Final = "Vcnode-Expected-Revision"
"""The command is refused unless the pod's revision is this number."""
DUPLICATE: Final = "Vcnode-Duplicate"
"""``true`` in a reply that was not made anew: the command id had been seen before."""
TRACEPARENT: Final = "traceparent"
"""W3C trace context."""
ACTOR: Final = "Vcnode-Actor"
"""Who sends a command, by his own word; kept in audit events as a claim."""
REQUEST_INFO: Final = "Nats-Request-Info"
"""Who sends a command, by the NATS server's word, where it comes from another account."""
SERVICE_ERROR: Final = "Nats-Service-Error"
"""Message of an error reply (NATS ADR-32); absent when the command succeeded."""
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
"""Number of an error reply (NATS ADR-32)."""

COMMAND_ID_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"


class ErrorReply(Reply):
    """Body of an error reply."""

    code: str
    """For programs: ``not_found``, ``invalid_argument``, …"""
    message: str
    """One sentence for people."""
    details: JsonObject = {}
    """The same facts as data."""
    retryable: bool = False
    """Whether the same command, with the same id, may succeed later."""
    error_id: str | None = None
    """Finds the matching lines in the node's log."""

    def to_error(self) -> VcnodeError:
        """The error that the node raised, with ``error_id`` among its details."""
        error = from_code(self.code, self.message, self.details)
        if self.error_id is not None:
            error.details["error_id"] = self.error_id
        return error


def parse_error(body: bytes, headers: dict[str, str]) -> VcnodeError | None:
    """The error that a reply carries; None when it reports a success.

    A reply of something else that speaks ADR-32 (no body of ours) gives `NodeError` with its message.
    """
    if SERVICE_ERROR not in headers and SERVICE_ERROR_CODE not in headers:
        return None
    try:
        return ErrorReply.model_validate_json(body).to_error()
    except ValidationError:
        number = headers.get(SERVICE_ERROR_CODE, "?")
        return NodeError(f"{headers.get(SERVICE_ERROR, 'The command failed.')} (error {number})")
