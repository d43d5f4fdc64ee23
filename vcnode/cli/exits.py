"""What the ``vcnode`` command tells its caller when something fails: exit codes and lines for people.

====  ==========================================================================
code  meaning
====  ==========================================================================
0     done
1     the node failed, or something unexpected happened
2     the command line or a value in it is wrong (``invalid_argument``)
3     no such pod, container or image (``not_found``)
4     the object's state forbids it (``failed_precondition``, ``already_exists``, ``aborted``)
5     no node answered in time (``unavailable``, ``deadline_exceeded``)
6     the node is short of something (``resource_exhausted``)
7     the node's driver cannot do it (``not_implemented``)
8     the node's policy forbids it (``permission_denied``)
130   interrupted by Ctrl-C
====  ==========================================================================

``pod exec`` and ``container exec`` end with the exit code of the command that they ran. So that it cannot be
mixed up with the codes above, a failure of vcnode itself is 125 there, and 124 says that the command was
killed at its time limit (as with timeout(1)).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, TypeGuard

from vcnode.errors import InvalidArgumentError, VcnodeError

INTERNAL = 500
"""Errors of this number and above are the node's own; its log tells more about them."""
MAX_VIOLATIONS = 20
"""Wrong fields that are listed one by one."""


class Exit(IntEnum):
    """Exit codes of the ``vcnode`` command; the table is in the module's docstring."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNAVAILABLE = 5
    EXHAUSTED = 6
    UNSUPPORTED = 7
    DENIED = 8
    EXEC_TIMED_OUT = 124
    EXEC_FAILED = 125
    INTERRUPTED = 130


BY_CODE: Mapping[str, Exit] = {
    "invalid_argument": Exit.USAGE,
    "not_found": Exit.NOT_FOUND,
    "already_exists": Exit.CONFLICT,
    "failed_precondition": Exit.CONFLICT,
    "aborted": Exit.CONFLICT,
    "unavailable": Exit.UNAVAILABLE,
    "deadline_exceeded": Exit.UNAVAILABLE,
    "resource_exhausted": Exit.EXHAUSTED,
    "not_implemented": Exit.UNSUPPORTED,
    "permission_denied": Exit.DENIED,
    "internal": Exit.FAILED,
}
"""Exit code for each error code of `vcnode.errors`."""

HINTS: Mapping[str, str] = {
    "aborted": "Another command holds the pod; try again when it is done.",
    "deadline_exceeded": "The command may have taken effect: look with 'vcnode pod status'.",
}
"""What to do next, for codes whose message cannot say it."""


class UsageError(InvalidArgumentError):
    """A command line that cannot be carried out; found here, before any node was asked."""


def exit_code(error: VcnodeError) -> Exit:
    """The exit code that stands for *error*."""
    return BY_CODE.get(error.code, Exit.FAILED)


def as_text(error: VcnodeError) -> Iterator[str]:
    """*error* as lines for people: the sentence, what is wrong field by field, what to do next."""
    yield f"error: {error.message}"
    violations = error.details.get("violations")
    if _is_list_of_violations(violations):
        told = [v for v in violations if str(v["message"]) not in error.message]
        for violation in told[:MAX_VIOLATIONS]:
            yield f"  {violation['field']}: {violation['message']}"
        if len(told) > MAX_VIOLATIONS:
            yield f"  … and {len(told) - MAX_VIOLATIONS} more"
    denials = error.details.get("denials")
    if _is_list_of_violations(denials):
        for denial in denials[1:MAX_VIOLATIONS]:
            yield f"  {denial['field']}: {denial['message']}"
    leftovers = error.details.get("leftovers")
    if isinstance(leftovers, list):
        for item in leftovers[:MAX_VIOLATIONS]:
            yield f"  left over: {item}"
    if hint := HINTS.get(error.code):
        yield f"  {hint}"
    if error.number >= INTERNAL and (error_id := error.details.get("error_id")):
        yield f"  The node's log has more under error id {error_id}."


def as_json(error: VcnodeError) -> str:
    """*error* as one line of JSON, shaped like the body of an error reply."""
    body = {
        "code": error.code,
        "message": error.message,
        "details": error.details,
        "retryable": error.retryable,
    }
    return json.dumps({"error": body}, ensure_ascii=False, default=str)


def _is_list_of_violations(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(
        isinstance(item, dict) and "field" in item and "message" in item for item in value
    )
