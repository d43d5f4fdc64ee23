"""hyperstart's protocol without I/O: frames, flow control, finding one's place, and hostile guests."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.drivers.agent.hyperstart import messages, wire
from vcnode.drivers.agent.hyperstart.wire import (
    Answer,
    Code,
    Control,
    Piece,
    PodFinished,
    ProcessEnded,
    ProtocolError,
    Ready,
    Streams,
)
from vcnode.errors import UnsupportedError
from vcnode.models.network import Endpoint, Route
from vcnode.models.vm import GuestProcess

PROBE, KNOWN = 1 << 62, 77
VERSION = struct.pack(">III", Code.ACK, 12, 4244)


def message(code: int, payload: bytes = b"") -> bytes:
    return struct.pack(">II", code, 8 + len(payload)) + payload


def next_(count: int) -> bytes:
    return message(Code.NEXT, struct.pack(">I", count))


def synced() -> Control:
    """A channel on which the guest has told its version."""
    control = Control()
    ticket = control.send(Code.VERSION)
    assert control.data_to_send() == message(0)
    assert control.receive_data(message(Code.READY) + next_(8) + VERSION) == [
        Ready(),
        Answer(ticket, True, struct.pack(">I", 4244)),
    ]
    return control


def synced_streams() -> Streams:
    streams = Streams(PROBE, [KNOWN])
    assert streams.receive_data(wire.frame(PROBE)) == []
    assert streams.synced
    return streams


# -- commands --------------------------------------------------------------------------------------


def test_a_long_command_goes_out_as_the_guest_reads_it() -> None:
    control = synced()
    payload = bytes(range(256)) * 5
    ticket = control.send(Code.NEWCONTAINER, payload)
    control.send(Code.PING)
    sent = b""
    while chunk := control.data_to_send():
        assert len(chunk) <= wire.CHUNK_BYTES
        assert control.data_to_send() == b""  # nothing before it is read
        sent += chunk
        half = len(chunk) // 2
        assert control.receive_data(next_(half)) == []
        assert control.data_to_send() == b""
        control.receive_data(next_(len(chunk) - half))
    assert sent == message(Code.NEWCONTAINER, payload)
    assert control.receive_data(message(Code.ERROR, b"why")) == [Answer(ticket, False, b"why")]
    assert control.data_to_send() == message(Code.PING)


def test_an_answer_says_that_all_was_read() -> None:
    control = synced()
    first, second = control.send(Code.PING), control.send(Code.PING)
    control.data_to_send()
    assert control.receive_data(message(Code.ACK)) == [Answer(first, True, b"")]
    assert control.data_to_send() == message(Code.PING)
    assert control.receive_data(next_(8) + message(Code.ACK)) == [Answer(second, True, b"")]


def test_news_come_at_any_time_from_both_families() -> None:
    control = synced()
    ticket = control.send(Code.PING)
    control.data_to_send()
    news = b'{"container":"c","process":"init","event":"finished","status":3}\0'
    events = control.receive_data(
        message(23, news)
        + message(Code.FINISHPOD, struct.pack(">II", 1, 0xFFFFFFFF))
        + message(Code.ACK)
        + message(24, news)
        + message(23, b'{"event":"born"}')
    )
    ended = ProcessEnded("c", "init", 3)
    assert events == [ended, PodFinished((1, 0xFFFFFFFF)), Answer(ticket, True, b""), ended]


def test_a_file_may_be_long_and_nothing_else() -> None:
    control = synced()
    ticket = control.send(Code.READFILE, max_answer=100_000)
    control.data_to_send()
    data = bytes(100_000)
    whole = message(Code.ACK, data)
    assert control.receive_data(whole[:50_000]) == []
    assert control.receive_data(whole[50_000:]) == [Answer(ticket, True, data)]
    control.send(Code.PING)
    control.data_to_send()
    with pytest.raises(ProtocolError):
        control.receive_data(struct.pack(">II", Code.ACK, 8 + 65_537))


@pytest.mark.parametrize(
    "data",
    [
        message(99),
        message(Code.ACK),
        message(Code.READY),
        struct.pack(">II", Code.ACK, 7),
        struct.pack(">II", Code.NEXT, 8),
        struct.pack(">II", Code.READY, 12),
        struct.pack(">II", 23, 0xFFFFFFFF),
        next_(1),
        message(Code.FINISHPOD, b"abc"),
        message(23, b"[]"),
        message(23, b"{}"),
        message(23, b"\xff"),
        message(23, b"[" * 60_000),
        message(23, b'{"event":"finished","container":1,"process":"init","status":0}'),
        message(23, b'{"event":"finished","container":"c","process":"init","status":256}'),
        message(23, b'{"event":"finished","container":"c","process":"init","status":true}'),
        message(23, b'{"event":"finished","container":"c","process":"init","status":1.5}'),
    ],
    ids=repr,
)
def test_what_breaks_the_protocol_is_told(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        synced().receive_data(data)


def test_an_answer_to_half_a_command_is_told() -> None:
    control = synced()
    control.send(Code.NEWCONTAINER, bytes(1000))
    control.data_to_send()
    with pytest.raises(ProtocolError):
        control.receive_data(message(Code.ACK))


def test_a_command_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too long"):
        synced().send(Code.WRITEFILE, bytes(wire.MAX_COMMAND_BYTES))


@given(st.binary(max_size=60), st.binary(max_size=40))
def test_a_new_session_finds_its_place(rest: bytes, more: bytes) -> None:
    """After the rest of a message, and stale answers and NEXTs of an earlier session."""
    control = Control()
    ticket = control.send(Code.VERSION)
    control.data_to_send()
    stale = rest.replace(b"\0\0\0", b"xyz")  # what does not begin like a message
    heard = control.receive_data(stale + next_(512) + message(Code.ACK) + message(Code.ERROR, more))
    heard += control.receive_data(next_(8) + VERSION)
    assert Answer(ticket, True, struct.pack(">I", 4244)) in heard
    assert control.synced


def test_a_guest_that_never_gets_to_the_point_is_given_up() -> None:
    control = Control()
    control.send(Code.VERSION)
    control.receive_data(b"\xff" * 100_000)
    with pytest.raises(ProtocolError):
        control.receive_data(b"\xff" * 100_000)


# -- streams ---------------------------------------------------------------------------------------


def test_pieces_come_as_they_are_cut() -> None:
    streams = synced_streams()
    data = wire.frame(KNOWN, b"abc") + wire.frame(5, b"") + wire.frame(KNOWN, b"d")
    got: list[Piece] = []
    for at in range(len(data)):
        got += streams.receive_data(data[at : at + 1])
    assert got == [Piece(KNOWN, b"abc"), Piece(5, b""), Piece(KNOWN, b"d")]


@pytest.mark.parametrize("length", [0, 11, wire.MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_a_frame_of_no_length_is_told(length: int) -> None:
    with pytest.raises(ProtocolError):
        synced_streams().receive_data(struct.pack(">QI", 1, length))


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=40))
def test_streams_find_their_place(rest: bytes, step: int) -> None:
    streams = Streams(PROBE, [KNOWN])
    anchors = [seq.to_bytes(8, "big") for seq in (PROBE, KNOWN)]
    if any(anchor in rest for anchor in anchors):
        return
    data = rest + wire.frame(KNOWN, b"late") + wire.frame(PROBE) + wire.frame(9, b"new")
    got: list[Piece] = []
    for at in range(0, len(data), step):
        got += streams.receive_data(data[at : at + step])
    assert got == [Piece(KNOWN, b"late"), Piece(9, b"new")]


def test_streams_without_an_anchor_are_given_up() -> None:
    streams = Streams(PROBE)
    assert streams.receive_data(b"\xff" * wire.MAX_BEFORE_SYNC) == []
    with pytest.raises(ProtocolError):
        streams.receive_data(b"\xff" * 100)


def test_input_is_cut_so_that_the_guest_can_keep_it() -> None:
    pieces = wire.pieces_of(memoryview(bytes(1200)))
    assert [len(piece) for piece in pieces] == [500, 500, 200]
    assert wire.pieces_of(memoryview(b"")) == []


# -- hostile guests --------------------------------------------------------------------------------


hostile = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda code, length, data: struct.pack(">II", code, length) + data,
        st.integers(0, 30),
        st.one_of(st.integers(0, 64), st.integers(0, 0xFFFFFFFF)),
        st.binary(max_size=64),
    ),
    st.builds(lambda code, data: message(code, data), st.integers(0, 30), st.binary(max_size=64)),
    st.builds(lambda seq, data: wire.frame(seq, data), st.integers(0, (1 << 64) - 1), st.binary(max_size=64)),
)


@given(st.lists(hostile, max_size=8), st.booleans(), st.booleans())
def test_no_guest_raises_anything_else_or_is_kept_without_bound(
    parts: list[bytes], is_synced: bool, busy: bool
) -> None:
    control = synced() if is_synced else Control()
    streams = synced_streams() if is_synced else Streams(PROBE, [KNOWN])
    if busy:
        control.send(Code.PING)
    for part in parts:
        for receive in (control.receive_data, streams.receive_data):
            try:
                receive(part)
            except ProtocolError:
                continue
        control.data_to_send()
    assert len(control._received) <= wire.MAX_EVENT_BYTES + sum(map(len, parts))
    assert len(streams._received) <= wire.MAX_FRAME_BYTES + sum(map(len, parts))


# -- messages --------------------------------------------------------------------------------------


def test_routes_on_the_link_come_first_and_only_ipv4_is_told() -> None:
    endpoint = Endpoint(
        id="e",
        name="net0",
        mac="02:00:00:00:00:01",
        addresses=("fd00::1/64", "10.0.0.2/16"),
        routes=(
            Route(destination="0.0.0.0/0", gateway="10.0.0.1"),
            Route(destination="10.9.0.0/24"),
            Route(destination="::/0", gateway="fd00::9"),
        ),
    )
    dialect = wire.DIALECTS[4242]
    assert messages.interfaces([endpoint], dialect) == [
        {"device": "eth0", "newDeviceName": "net0", "ipAddress": "10.0.0.2", "netMask": "16"}
    ]
    assert messages.routes([endpoint]) == [
        {"dest": "10.9.0.0/24", "device": "net0"},
        {"dest": "default", "device": "net0", "gateway": "10.0.0.1"},
    ]
    assert messages.left_out([endpoint]) == ["fd00::1/64", "::/0"]
    assert messages.interfaces([endpoint.model_copy(update={"addresses": ()})], dialect) == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"user": "0"}, {}),
        ({"user": "root", "group": "0"}, {}),
        ({"user": "12"}, {"user": "12"}),
        ({"user": "0", "group": "5"}, {"user": "0", "group": "5"}),
        ({"supplementary_groups": ("a",)}, {"user": "root", "additionalGroups": ["a"]}),
    ],
)
def test_a_group_is_never_told_without_a_user(fields: dict[str, object], told: dict[str, object]) -> None:
    process = messages.process(
        GuestProcess(args=("x",), **fields),  # type: ignore[arg-type]
        wire.DIALECTS[4244],
        process_id="p",
        stdio=1,
        stderr=2,
        terminal=False,
    )
    got = {key: value for key, value in process.items() if key in ("user", "group", "additionalGroups")}
    assert got == told


def test_limits_are_told_to_the_fork_and_refused_elsewhere() -> None:
    wanted = GuestProcess(args=("x",), rlimits=(("nofile", 5, -1),), capabilities=("CAP_KILL",))
    told = messages.process(
        wanted, wire.clearcontainers(4244), process_id="p", stdio=1, stderr=2, terminal=False
    )
    assert told["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": (1 << 64) - 1}]
    assert told["noNewPrivileges"] is True
    assert told["capabilities"]["effective"] == ["CAP_KILL"]
    with pytest.raises(UnsupportedError):
        messages.process(wanted, wire.DIALECTS[4244], process_id="p", stdio=1, stderr=2, terminal=False)


def test_window_sizes_name_what_the_version_knows() -> None:
    old = messages.window("c", "p", 7, 24, 80, wire.DIALECTS[4242])
    assert old == b'{"seq":7,"row":24,"column":80}'
    new = messages.window("c", "p", 7, 24, 80, wire.DIALECTS[4243])
    assert new == b'{"container":"c","process":"p","row":24,"column":80}'


def test_a_kill_of_all_is_told_where_it_is_known() -> None:
    assert b"allProcesses" not in messages.kill_container("c", 9, wire.DIALECTS[4244], everyone=True)
    forked = messages.kill_container("c", 9, wire.clearcontainers(4244), everyone=True)
    assert forked == b'{"container":"c","signal":9,"allProcesses":true}'
