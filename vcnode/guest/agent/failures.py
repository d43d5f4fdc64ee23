"""The one exception that becomes the answer to a request."""

from __future__ import annotations

INVALID_ARGUMENT = "invalid_argument"
NOT_FOUND = "not_found"
ALREADY_EXISTS = "already_exists"
FAILED_PRECONDITION = "failed_precondition"
NOT_IMPLEMENTED = "not_implemented"
INTERNAL = "internal"
CODES = (INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, NOT_IMPLEMENTED, INTERNAL)


class Failure(Exception):  # noqa: N818 (an answer, as the contract has it, not a bug)
    """A request that cannot be carried out.

    Args:
        code: One of `CODES` (contracts/guest-protocol.md, Methods).
        message: One sentence for people; names the object and the value.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @classmethod
    def of(cls, exc: OSError, what: str) -> Failure:
        """Say that the kernel refused *what*."""
        where = f" ({printable(exc.filename)})" if exc.filename else ""
        return cls(INTERNAL, f"Cannot {what}: {exc.strerror}{where}.")


def printable(name: object) -> str:
    """Show a path or word from a request or a root file system: on one line, short, valid UTF-8."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    shown = "".join(char if char.isprintable() else "?" for char in text[:256])
    return shown if len(text) <= 256 else shown + "…"
