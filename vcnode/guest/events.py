"""What the codec of the guest protocol tells its caller (`vcnode.guest.protocol`)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class SessionStarted:
    """A session is open. ``hello`` is the peer's HELLO, checked; streams and requests start from nothing."""

    __match_args__ = __slots__ = ("hello",)

    def __init__(self, hello: dict[str, Any]) -> None:
        self.hello = hello


class SessionEnded:
    """Guest only: the session is over, with all its streams and requests. What was to be sent is dropped."""

    __match_args__ = __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class RequestReceived:
    """Guest only: answer with `Guest.send_reply` or `Guest.send_error`, giving this object back."""

    __match_args__ = ("method", "params")
    __slots__ = ("epoch", "id", "method", "params")

    def __init__(self, id: int, method: str, params: dict[str, Any], epoch: int) -> None:  # noqa: A002
        self.id = id
        self.method = method
        self.params = params
        self.epoch = epoch


class ReplyReceived:
    """Host only: the answer to a request; exactly one of ``result`` and ``error`` (code, message) is set."""

    __match_args__ = __slots__ = ("id", "result", "error")

    def __init__(self, id: int, result: dict[str, Any] | None, error: tuple[str, str] | None) -> None:  # noqa: A002
        self.id = id
        self.result = result
        self.error = error


class EventReceived:
    """Host only: something happened in the guest. ``fields`` are unchecked."""

    __match_args__ = __slots__ = ("name", "fields")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields


class DataReceived:
    """Bytes of a stream. Call ``consumed`` once the user has taken them, or the peer stops sending.

    A view shows what was received itself, which it keeps in memory.
    """

    __match_args__ = __slots__ = ("stream", "data")

    def __init__(self, stream: int, data: bytes | memoryview) -> None:
        self.stream = stream
        self.data = data


class BulkReceived:
    """Guest only: as `DataReceived`, in pieces, most of them views of what was received."""

    __match_args__ = __slots__ = ("stream", "pieces")

    def __init__(self, stream: int, pieces: list[bytes | memoryview]) -> None:
        self.stream = stream
        self.pieces = pieces


class EofReceived:
    """The peer has sent the last byte of this stream; the stream is finished."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class CreditReceived:
    """More may be sent on this stream."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


class ResetReceived:
    """The peer wants no more of this stream. EOF was sent in answer; the stream is finished."""

    __match_args__ = __slots__ = ("stream",)

    def __init__(self, stream: int) -> None:
        self.stream = stream


Event = (
    SessionStarted
    | SessionEnded
    | RequestReceived
    | ReplyReceived
    | EventReceived
    | DataReceived
    | BulkReceived
    | EofReceived
    | CreditReceived
    | ResetReceived
)
