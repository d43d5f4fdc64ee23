"""Replies: of what went well, of what went wrong, and of what was answered before. Pure but for the log."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vcnode.errors import (
    DeadlineExceededError,
    NodeError,
    ResourceExhaustedError,
    UnavailableError,
    VcnodeError,
)
from vcnode.models import wire
from vcnode.models.audit import AuditRecord
from vcnode.pods.stored import Stored

log = logging.getLogger(__name__)

MAX_HEADER_CHARS = 512
"""Longest error message in a header; the body has it whole."""
EXECUTING = frozenset({"pod.exec", "container.exec"})
"""Verbs whose effect the node cannot undo."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reply, ready to be sent."""

    body: bytes
    headers: dict[str, str]
    code: str = "ok"
    """``ok``, or the error's code."""
    number: int | None = None
    """The error's number; None when the command succeeded."""
    retryable: bool = False
    audit: AuditRecord | None = None
    """What is still to be told of it if this outcome stays; None: nothing, or the journal has told it."""
    traceparent: str | None = None
    """Of the command, for what is still to be told of it."""
    quiet: bool = False
    """Whether a node that was asked among all does not answer at all."""

    @property
    def ok(self) -> bool:
        """Whether the command succeeded."""
        return self.number is None


def error_outcome(
    error: BaseException, verb: str, *, retryable: bool | None = None, begun: bool = False
) -> Outcome:
    """Turn any error into a reply, and log it under the reply's error id.

    Errors of vcnode say by their own promise nothing that the caller must not see; of any other the caller
    learns the error id only. *retryable* overrides what the error says of itself; *begun* tells that the
    command had passed its checks and was being carried out.
    """
    error_id = uuid.uuid4().hex[:16]
    if isinstance(error, VcnodeError):
        known = error
    else:
        known = NodeError("The node failed in an unexpected way; its log has the details under the error id.")
    unexpected = known.number >= 500 and not isinstance(known, (UnavailableError, DeadlineExceededError))
    log.log(
        logging.ERROR if unexpected else logging.INFO,
        "%s failed: %s",
        verb,
        known.message,
        exc_info=error if unexpected else None,
        extra={"error_id": error_id, "code": known.code},
    )
    # A command that ran inside a guest may have done anything before it was given up: not to be repeated.
    if retryable is None:
        retryable = known.retryable and not (begun and verb in EXECUTING)
    reply = wire.ErrorReply(
        code=known.code,
        message=known.message,
        details=_plain(known.details),
        retryable=retryable,
        error_id=error_id,
    )
    return Outcome(
        body=reply.model_dump_json().encode(),
        headers=_error_headers(known.message, known.number),
        code=known.code,
        number=known.number,
        retryable=retryable,
    )


def oversized(verb: str, outcome: Outcome, *, limit_bytes: int) -> Outcome:
    """What to reply instead of *outcome*, whose body does not fit into a message.

    The command itself has succeeded or failed as *outcome* says.
    """
    error = ResourceExhaustedError(
        f"{verb} is done, but its reply of {len(outcome.body)} bytes exceeds the {limit_bytes} that NATS "
        "takes here; ask for less.",
        size_bytes=len(outcome.body),
        limit_bytes=limit_bytes,
    )
    return with_id(error_outcome(error, verb, retryable=False), outcome.headers[wire.COMMAND_ID])


def from_stored(stored: Stored) -> Outcome:
    """The reply that the journal has kept."""
    if stored.ok:
        return Outcome(body=stored.body, headers={})
    number = stored.number or NodeError.number
    message = wire.ErrorReply.model_validate_json(stored.body).message
    return Outcome(
        body=stored.body,
        headers=_error_headers(message, number),
        code=stored.code or NodeError.code,
        number=number,
    )


def as_duplicate(outcome: Outcome) -> Outcome:
    """Mark a reply as one that was not made anew."""
    return replace(outcome, headers={**outcome.headers, wire.DUPLICATE: "true"}, audit=None)


def with_id(outcome: Outcome, command_id: str, traceparent: str | None = None) -> Outcome:
    """Put the command's id into a reply, and its trace beside it."""
    headers = {**outcome.headers, wire.COMMAND_ID: command_id}
    return replace(outcome, headers=headers, traceparent=traceparent)


def _plain(details: Mapping[str, object]) -> dict[str, object]:
    """*details* as JSON data, whatever is in them."""
    plain: dict[str, object] = json.loads(json.dumps(details, default=str, skipkeys=True))
    return plain


def _error_headers(message: str, number: int) -> dict[str, str]:
    line = " ".join(message.split())
    if len(line) > MAX_HEADER_CHARS:
        line = f"{line[: MAX_HEADER_CHARS - 1]}…"
    return {wire.SERVICE_ERROR: line, wire.SERVICE_ERROR_CODE: str(number)}
