"""The codec of the guest's port: framing, sync, messages, credit, and what hostile bytes may cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcnode.guest import protocol
from vcnode.guest.protocol import (
    DATA,
    EOF,
    EVENT,
    HELLO,
    MARKER,
    MAX_MESSAGE,
    MAX_PAYLOAD,
    MORE,
    REPLY,
    REQUEST,
    CreditReceived,
    DataReceived,
    EofReceived,
    Guest,
    Host,
    LocalError,
    ProtocolError,
    ReplyReceived,
    RequestReceived,
    ResetReceived,
    SessionEnded,
    SessionStarted,
    TooLargeError,
    encode_frame,
    encode_object,
)

SESSION = "0123456789abcdef" * 2
OTHER_SESSION = "fedcba9876543210" * 2
IDENTITY = {"agent_version": "1.2", "boot_id": "b007", "kernel": "6.1"}
WINDOW = 1000


def pump(source: Host | Guest, target: Host | Guest) -> list[protocol.Event]:
    """Carry over what *source* has to send; the events that come of it."""
    return list(target.receive_data(source.data_to_send()))


def content_of(events: Iterable[protocol.Event]) -> bytes:
    """All bytes of streams that came."""
    content = bytearray()
    for event in events:
        match event:
            case DataReceived(_, data):
                content += data
            case protocol.BulkReceived(_, pieces):
                content += b"".join(pieces)
    return bytes(content)


def connected(host_window: int = WINDOW, guest_window: int = WINDOW) -> tuple[Host, Guest]:
    """Two ends with an open session."""
    host, guest = Host(SESSION, host_window), Guest(dict(IDENTITY), guest_window)
    host.send_sync()
    pump(host, guest)
    pump(guest, host)
    assert host.established
    assert guest.established
    return host, guest


def with_stream(host: Host, guest: Guest, *, to_guest: bool) -> int:
    """Open a stream by a request, as `execute` does."""
    stream = host.new_stream(sending=to_guest)
    host.send_request("open", {"stream": stream})
    (request,) = pump(host, guest)
    assert isinstance(request, RequestReceived)
    (guest.open_receiver if to_guest else guest.open_sender)(request.params["stream"])
    guest.send_reply(request, {})
    assert isinstance(pump(guest, host)[0], ReplyReceived)
    return stream


def only(events: Iterable[protocol.Event], kind: type) -> Any:
    """The one event that there is, of this kind."""
    (event,) = events
    assert isinstance(event, kind)
    return event


# -- sync and hello --------------------------------------------------------------------------------


def test_hello_opens_a_session_at_both_ends() -> None:
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    host.send_sync()

    at_guest = only(pump(host, guest), SessionStarted)
    at_host = only(pump(guest, host), SessionStarted)

    assert at_guest.hello["session"] == at_host.hello["session"] == SESSION
    assert {name: at_host.hello[name] for name in IDENTITY} == IDENTITY


def test_identity_is_read_anew_for_each_hello() -> None:
    """A clone of a template takes its identity after its agent has started."""
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    guest.identity["boot_id"] = "another"
    host.send_sync()
    pump(host, guest)

    assert only(pump(guest, host), SessionStarted).hello["boot_id"] == "another"


@given(garbage=st.binary(max_size=200), cut=st.integers(0, 60))
@settings(deadline=None)
def test_sync_ends_whatever_an_earlier_host_left_behind(garbage: bytes, cut: int) -> None:
    _, guest = connected()
    # Half a frame, its header promising the longest payload there is.
    list(guest.receive_data(garbage + encode_frame(DATA, 1, bytes(MAX_PAYLOAD))[: 12 + cut]))
    host = Host(OTHER_SESSION)
    host.send_sync()

    assert isinstance(pump(host, guest)[-1], SessionStarted)
    assert only(pump(guest, host), SessionStarted).hello["session"] == OTHER_SESSION


def test_marker_right_at_a_frame_boundary_is_found() -> None:
    _, guest = connected()
    hello = encode_object({"version": 1, "session": OTHER_SESSION, "window": 5})

    ended, started = guest.receive_data(MARKER + encode_frame(HELLO, 0, hello))

    assert isinstance(ended, SessionEnded)
    assert isinstance(started, SessionStarted)


def test_host_drops_everything_before_the_hello_of_its_own_session() -> None:
    stale = Guest(dict(IDENTITY))
    old = Host(OTHER_SESSION)
    old.send_sync()
    pump(old, stale)
    stale.send_event("old", {})
    leftover = stale.data_to_send()
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    host.send_sync()
    pump(host, guest)

    (started,) = host.receive_data(leftover[5:] + leftover + guest.data_to_send())

    assert isinstance(started, SessionStarted)


def test_markers_in_stale_output_do_not_hide_the_real_one() -> None:
    """Output of a container can hold a marker and the head of a HELLO that never ends."""
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    host.send_sync()
    pump(host, guest)
    bait = MARKER + encode_frame(HELLO, 0, bytes(protocol.MAX_HELLO))[:40]

    events = list(host.receive_data(bait * 3 + guest.data_to_send()))

    assert only(events, SessionStarted).hello["session"] == SESSION


def test_each_repeated_sync_is_answered_and_the_late_answers_are_dropped() -> None:
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    host.send_sync()
    first = host.data_to_send()
    for _ in range(2):
        host.send_sync()
    others = host.data_to_send()
    list(guest.receive_data(first))
    only(pump(guest, host), SessionStarted)
    # The host goes on; the guest gets the other syncs first.
    number = host.send_request("ping", {})

    events = list(guest.receive_data(others + host.data_to_send()))
    request = events[-1]
    assert isinstance(request, RequestReceived)
    guest.send_reply(request, {})

    assert only(pump(guest, host), ReplyReceived).id == number


def test_more_answers_than_syncs_break_the_session() -> None:
    host, _ = connected()
    hello = encode_object({"version": 1, "session": SESSION, "window": 5, **IDENTITY})

    with pytest.raises(ProtocolError):
        list(host.receive_data(MARKER + encode_frame(HELLO, 0, hello)))
    assert not host.established


def test_sync_is_refused_once_the_session_is_open() -> None:
    host, _ = connected()
    with pytest.raises(LocalError):
        host.send_sync()


def test_guest_of_another_version_says_so_and_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(SESSION)
    host.send_sync()
    sync = host.data_to_send()
    monkeypatch.setattr(protocol, "VERSION", 7)
    guest = Guest(dict(IDENTITY))
    assert list(guest.receive_data(sync)) == []
    assert not guest.established
    answer = guest.data_to_send()
    monkeypatch.undo()

    with pytest.raises(ProtocolError, match="version 7"):
        list(host.receive_data(answer))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1"},
        {"version": True},
        {"window": 0},
        {"window": -5},
        {"window": 1 << 40},
        {"window": 1.5},
        {"window": None},
        {"kernel": 5},
        {"kernel": "k" * 257},
        {"boot_id": None},
    ],
    ids=str,
)
def test_host_refuses_a_hello_with_bad_fields(change: dict[str, Any]) -> None:
    host = Host(SESSION)
    host.send_sync()
    hello = {"version": 1, "session": SESSION, "window": 5, **IDENTITY, **change}

    with pytest.raises(ProtocolError):
        list(host.receive_data(MARKER + encode_frame(HELLO, 0, encode_object(hello))))


@pytest.mark.parametrize("session", ["", "xyz", "A" * 32, 5, None, "0" * 33])
def test_guest_ignores_a_hello_with_a_bad_session(session: object) -> None:
    guest = Guest(dict(IDENTITY))
    hello = encode_object({"version": 1, "session": session, "window": 5})

    assert list(guest.receive_data(MARKER + encode_frame(HELLO, 0, hello))) == []
    assert guest.data_to_send() == b""


def test_new_session_drops_what_the_old_one_had_to_send() -> None:
    _, guest = connected()
    guest.send_event("stale", {})
    new = Host(OTHER_SESSION)
    new.send_sync()

    assert isinstance(pump(new, guest)[0], SessionEnded)
    assert [type(e) for e in pump(guest, new)] == [SessionStarted]


def test_hang_up_drops_session_half_frame_and_output() -> None:
    _, guest = connected()
    list(guest.receive_data(encode_frame(REQUEST, 0, b"{}")[:7]))
    guest.send_event("stale", {})

    assert isinstance(guest.hang_up(), SessionEnded)
    assert guest.hang_up() is None
    assert guest.pending_bytes == 0
    assert not guest.established


# -- messages --------------------------------------------------------------------------------------


@given(size=st.sampled_from([0, 1, MAX_PAYLOAD - 60, MAX_PAYLOAD, MAX_PAYLOAD + 1, 3 * MAX_PAYLOAD, 900_000]))
@settings(deadline=None)
def test_long_messages_come_whole(size: int) -> None:
    host, guest = connected()
    text = "é" + "x" * size
    number = host.send_request("method", {"text": text})

    request = only(pump(host, guest), RequestReceived)
    assert (request.id, request.method, request.params) == (number, "method", {"text": text})
    guest.send_reply(request, {"text": text})
    assert only(pump(guest, host), ReplyReceived).result == {"text": text}


def test_message_over_the_limit_is_refused_and_nothing_is_sent() -> None:
    host, _ = connected()
    with pytest.raises(TooLargeError):
        host.send_request("method", {"text": "x" * MAX_MESSAGE})
    assert host.data_to_send() == b""


def test_reply_over_the_limit_can_still_become_an_error() -> None:
    host, guest = connected()
    host.send_request("method", {})
    request = only(pump(host, guest), RequestReceived)
    with pytest.raises(TooLargeError):
        guest.send_reply(request, {"text": "x" * MAX_MESSAGE})
    guest.send_error(request, "internal", "Too much.")
    assert only(pump(guest, host), ReplyReceived).error == ("internal", "Too much.")


def test_undecodable_file_names_survive() -> None:
    """Arguments that are no UTF-8 travel as lone surrogates, as os.fsencode wants them back."""
    host, guest = connected()
    host.send_request("method", {"args": ["\udcff"]})
    assert only(pump(host, guest), RequestReceived).params == {"args": ["\udcff"]}


def test_reply_to_a_request_of_an_earlier_session_is_dropped() -> None:
    host, guest = connected()
    host.send_request("slow", {})
    old = only(pump(host, guest), RequestReceived)
    new = Host(OTHER_SESSION)
    new.send_sync()
    pump(new, guest)
    pump(guest, new)
    new.send_request("other", {})
    pump(new, guest)

    guest.send_reply(old, {"for": "the old one"})

    assert guest.data_to_send() == b""


def test_second_reply_to_one_request_is_the_callers_error() -> None:
    host, guest = connected()
    host.send_request("method", {})
    request = only(pump(host, guest), RequestReceived)
    guest.send_reply(request, {})
    with pytest.raises(LocalError):
        guest.send_error(request, "internal", "Again.")


def test_events_without_a_session_are_dropped() -> None:
    guest = Guest(dict(IDENTITY))
    guest.send_event("happened", {})
    assert guest.data_to_send() == b""


def test_requests_without_a_reply_are_bounded() -> None:
    host, _ = connected()
    for _ in range(protocol.MAX_REQUESTS):
        host.send_request("ping", {})
    with pytest.raises(LocalError):
        host.send_request("ping", {})


HOSTILE_MESSAGES: list[tuple[int, bytes]] = [
    (REPLY, b"not json"),
    (REPLY, b"\xff\xfe"),
    (REPLY, b"[]"),
    (REPLY, b"NaN"),
    (REPLY, b'{"id": NaN, "result": {}}'),
    (REPLY, b"[" * 30_000),
    (REPLY, b'{"id": ' + b"9" * 5000 + b"}"),
    (REPLY, b'{"id": 99, "result": {}}'),
    (REPLY, b'{"id": true, "result": {}}'),
    (REPLY, b'{"id": "1", "result": {}}'),
    (REPLY, b'{"id": [], "result": {}}'),
    (REPLY, b'{"id": 1}'),
    (REPLY, b'{"id": 1, "result": []}'),
    (REPLY, b'{"id": 1, "result": {}, "error": {"code": "a", "message": "b"}}'),
    (REPLY, b'{"id": 1, "error": {"code": 5, "message": "b"}}'),
    (REPLY, b'{"id": 1, "error": {"code": "a"}}'),
    (EVENT, b"{}"),
    (EVENT, b'{"event": 5}'),
    (REQUEST, b'{"id": 1, "method": "ping", "params": {}}'),
    (HELLO, b"{}"),
]


@pytest.mark.parametrize(
    ("kind", "payload"), HOSTILE_MESSAGES, ids=[m[:30].decode("latin1") for _, m in HOSTILE_MESSAGES]
)
def test_bad_message_ends_the_hosts_session(kind: int, payload: bytes) -> None:
    host, _ = connected()
    assert host.send_request("ping", {}) == 1

    with pytest.raises(ProtocolError):
        list(host.receive_data(encode_frame(kind, 0, payload)))
    # And nothing that comes later is looked at, or kept.
    with pytest.raises(ProtocolError):
        list(host.receive_data(bytes(10_000)))
    assert not host._incoming


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b'{"id": 0, "method": "m", "params": {}}',
        b'{"id": true, "method": "m", "params": {}}',
        b'{"id": 5, "method": 5, "params": {}}',
        b'{"id": 5, "method": "m"}',
        b'{"id": 5, "method": "m", "params": []}',
    ],
)
def test_bad_request_ends_the_guests_session(payload: bytes) -> None:
    _, guest = connected()
    only(guest.receive_data(encode_frame(REQUEST, 0, payload)), SessionEnded)


def test_the_same_request_id_twice_ends_the_guests_session() -> None:
    _, guest = connected()
    frame = encode_frame(REQUEST, 0, b'{"id": 5, "method": "m", "params": {}}')
    first, second = guest.receive_data(frame + frame)
    assert isinstance(first, RequestReceived)
    assert isinstance(second, SessionEnded)


# -- frames ----------------------------------------------------------------------------------------


def patched(frame: bytes, at: int, value: bytes) -> bytes:
    """*frame* with bytes replaced and the checksum made right again."""
    body = frame[:at] + value + frame[at + len(value) : -4]
    return body + zlib.crc32(body).to_bytes(4, "big")


GOOD = encode_frame(EVENT, 0, b'{"event":"e"}')
BAD_FRAMES = {
    "kind 0": patched(GOOD, 0, b"\0"),
    "kind 9": patched(GOOD, 0, b"\x09"),
    "flags": patched(GOOD, 1, b"\x02"),
    "MORE on a short part": patched(GOOD, 1, b"\x01"),
    "reserved": patched(GOOD, 2, b"\0\1"),
    "stream of a message": patched(GOOD, 4, b"\0\0\0\1"),
    "length over the limit": patched(GOOD, 8, (MAX_PAYLOAD + 1).to_bytes(4, "big")),
    "length 0": encode_frame(EVENT, 0, b""),
    "checksum": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "payload": GOOD[:14] + b"X" + GOOD[15:],
    "data on stream 0": encode_frame(DATA, 0, b"x"),
    "empty data": encode_frame(DATA, 1, b""),
    "EOF with payload": encode_frame(EOF, 1, b"x"),
    "short credit": encode_frame(protocol.CREDIT, 1, b"\1"),
    "MORE on data": encode_frame(DATA, 1, bytes(MAX_PAYLOAD), MORE),
    "stream that was never opened": encode_frame(DATA, 77, b"x"),
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_bad_frame_ends_the_session(frame: bytes) -> None:
    host, guest = connected()
    with_stream(host, guest, to_guest=False)
    with pytest.raises(ProtocolError):
        list(host.receive_data(frame))
    only(guest.receive_data(frame), SessionEnded)


def test_bad_header_is_noticed_before_its_payload_comes() -> None:
    host, _ = connected()
    with pytest.raises(ProtocolError):
        list(host.receive_data(BAD_FRAMES["length over the limit"][:12]))


def test_message_without_end_is_refused_at_the_limit() -> None:
    host, _ = connected()
    part = encode_frame(EVENT, 0, b"x" * MAX_PAYLOAD, MORE)
    for _ in range(MAX_MESSAGE // MAX_PAYLOAD):
        assert list(host.receive_data(part)) == []
    with pytest.raises(ProtocolError):
        list(host.receive_data(part))


@pytest.mark.parametrize("between", [GOOD, encode_frame(DATA, 1, b"x")], ids=["event", "data"])
def test_message_interrupted_by_another_frame_is_refused(between: bytes) -> None:
    host, guest = connected()
    with_stream(host, guest, to_guest=False)
    host.send_request("ping", {})
    with pytest.raises(ProtocolError):
        list(host.receive_data(encode_frame(REPLY, 0, b"x" * MAX_PAYLOAD, MORE) + between))


# -- streams and credit ----------------------------------------------------------------------------


def test_sender_stops_at_the_window_and_goes_on_with_credit() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=False)
    assert guest.send_data(stream, bytes(WINDOW + 500)) == WINDOW
    assert guest.send_data(stream, b"more") == 0
    assert only(pump(guest, host), DataReceived).data == bytes(WINDOW)

    host.consumed(stream, WINDOW // 2 - 1)
    assert pump(host, guest) == []  # less than half of the window is not worth a frame
    host.consumed(stream, 1)
    only(pump(host, guest), CreditReceived)
    assert guest.credit(stream) == WINDOW // 2


def test_more_data_than_credit_breaks_the_session() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=False)
    with pytest.raises(ProtocolError, match="credit"):
        list(host.receive_data(encode_frame(DATA, stream, bytes(WINDOW + 1))))


@pytest.mark.parametrize("amount", [0, 1, 1 << 31])
def test_more_credit_than_was_used_breaks_the_session(amount: int) -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=True)
    with pytest.raises(ProtocolError, match="credit"):
        list(host.receive_data(encode_frame(protocol.CREDIT, stream, amount.to_bytes(4, "big"))))


def test_eof_finishes_a_stream_in_order() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=True)
    host.send_data(stream, b"last")
    host.send_eof(stream)
    host.send_eof(stream)

    data, eof = pump(host, guest)
    assert isinstance(data, DataReceived)
    assert isinstance(eof, EofReceived)
    assert not host.is_sending(stream)
    with pytest.raises(LocalError):
        host.send_data(stream, b"x")


@pytest.mark.parametrize("kind", [DATA, EOF])
def test_data_after_eof_breaks_the_session(kind: int) -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=False)
    guest.send_eof(stream)
    only(pump(guest, host), EofReceived)
    with pytest.raises(ProtocolError):
        list(host.receive_data(encode_frame(kind, stream, b"x" if kind == DATA else b"")))


def test_reset_ends_a_stream_and_what_was_under_way_is_dropped() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=False)
    guest.send_data(stream, b"under way")
    host.send_reset(stream)
    host.send_reset(stream)

    assert only(pump(host, guest), ResetReceived).stream == stream
    assert pump(guest, host) == []  # data and EOF, both for nobody
    assert not guest.is_sending(stream)
    assert not host._receivers


def test_credit_counts_after_a_reset_too() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=False)
    host.send_reset(stream)
    assert list(host.receive_data(encode_frame(DATA, stream, bytes(WINDOW)))) == []
    with pytest.raises(ProtocolError):
        list(host.receive_data(encode_frame(DATA, stream, b"x")))


def test_credit_and_reset_that_cross_an_eof_are_ignored_but_not_for_ever() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=True)
    host.send_data(stream, bytes(WINDOW))
    host.send_eof(stream)
    reset = encode_frame(protocol.RESET, stream, b"")
    assert list(host.receive_data(reset * 3)) == []
    with pytest.raises(ProtocolError):
        list(host.receive_data(reset))


def test_streams_can_be_opened_once_only() -> None:
    host, guest = connected()
    stream = with_stream(host, guest, to_guest=True)
    for open_again in (guest.open_receiver, guest.open_sender):
        with pytest.raises(LocalError):
            open_again(stream)
    guest.forget(stream)
    with pytest.raises(LocalError):
        guest.open_sender(0)


@pytest.mark.parametrize("call", [lambda g: g.open_sender(1), lambda g: g.open_receiver(1)])
def test_no_stream_without_a_session(call: Callable[[Guest], None]) -> None:
    with pytest.raises(LocalError):
        call(Guest(dict(IDENTITY)))


@pytest.mark.parametrize("window", [0, -1, protocol.MAX_WINDOW + 1])
def test_window_is_bounded(window: int) -> None:
    with pytest.raises(LocalError):
        Host(SESSION, window)
