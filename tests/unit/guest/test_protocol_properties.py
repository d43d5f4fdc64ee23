"""Properties of the codec: any chunking, any corruption, any drop and reconnect."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.guest.test_protocol import (
    IDENTITY,
    OTHER_SESSION,
    SESSION,
    connected,
    only,
    pump,
    with_stream,
)
from vcnode.guest.protocol import (
    MAX_MESSAGE,
    MAX_PAYLOAD,
    SYNC_ZEROS,
    DataReceived,
    EofReceived,
    Guest,
    Host,
    ProtocolError,
    ReplyReceived,
    RequestReceived,
    SessionStarted,
)

MEMORY_BOUND = MAX_MESSAGE + len(SYNC_ZEROS)
"""Most that an end may hold of what came in: one message, and one frame."""


def held(end: Host | Guest) -> int:
    """Bytes of input that *end* keeps."""
    return len(end._incoming) + len(end._partial)


def traffic() -> bytes:
    """What a guest sends in a lively session, from the hello on."""
    host, guest = Host(SESSION), Guest(dict(IDENTITY))
    host.send_sync()
    pump(host, guest)
    sent = guest.data_to_send()
    list(host.receive_data(sent))
    stream = host.new_stream(sending=False)
    host.send_request("open", {})
    request = only(pump(host, guest), RequestReceived)
    guest.open_sender(stream)
    guest.send_data(stream, bytes(range(256)) * 200)
    guest.send_event("happened", {"text": "x" * 2 * MAX_PAYLOAD})
    guest.send_reply(request, {"ok": True})
    guest.send_eof(stream)
    return sent + guest.data_to_send()


TRAFFIC = traffic()


def listening_host() -> Host:
    """A host as it was when `TRAFFIC` was sent: one request under way, one stream open after the hello."""
    host = Host(SESSION)
    host.send_sync()
    return host


def receive(host: Host, data: bytes) -> list[str]:
    """What *data* causes, data byte by byte; the host asks and opens once the session is there."""
    names = []
    for event in host.receive_data(data):
        if isinstance(event, DataReceived):
            names += [f"byte {byte}" for byte in event.data]
        else:
            names.append(type(event).__name__)
        if isinstance(event, SessionStarted):
            host.new_stream(sending=False)
            host.send_request("open", {})
    return names


def kinds(names: list[str]) -> list[str]:
    """The same, with data as one whatever they are."""
    found = ["data" if name.startswith("byte") else name for name in names]
    return [name for before, name in pairwise(["", *found]) if name != before or name != "data"]


WHOLE = receive(listening_host(), TRAFFIC)


@given(st.lists(st.integers(0, len(TRAFFIC)), max_size=30))
@settings(deadline=None)
def test_chunking_changes_nothing(cuts: list[int]) -> None:
    host = listening_host()
    edges = [0, *sorted(cuts), len(TRAFFIC)]
    names = [name for a, b in pairwise(edges) for name in receive(host, TRAFFIC[a:b])]

    assert names == WHOLE
    assert "ReplyReceived" in names
    assert held(host) == 0


@given(
    position=st.integers(0, len(TRAFFIC) - 1),
    change=st.one_of(st.binary(max_size=40), st.just(b"\xff" * 20)),
    drop=st.integers(0, 100),
    step=st.sampled_from([500, 4_096, 32_769, 200_000]),
)
@settings(deadline=None)
def test_corruption_costs_the_host_its_session_at_most(
    position: int, change: bytes, drop: int, step: int
) -> None:
    host = listening_host()
    broken = TRAFFIC[:position] + change + TRAFFIC[position + drop :]
    names: list[str] = []
    try:
        for at in range(0, len(broken), step):
            names += receive(host, broken[at : at + step])
            assert held(host) <= MEMORY_BOUND + step
    except ProtocolError:
        assert held(host) == 0
    # No event is invented: what was told is a beginning of what was sent. Bulk data have no checksum, for the
    # port changes nothing that it carries; what is around them has.
    assert "".join(kinds(WHOLE)).startswith("".join(kinds(names)))


@given(st.lists(st.binary(max_size=3000), max_size=20), st.booleans())
@settings(deadline=None)
def test_guest_survives_anything_and_answers_the_next_sync(chunks: list[bytes], in_session: bool) -> None:
    guest = connected()[1] if in_session else Guest(dict(IDENTITY))
    for chunk in chunks:
        list(guest.receive_data(chunk))
        assert held(guest) <= MEMORY_BOUND
    guest.data_to_send()
    host = Host(OTHER_SESSION)
    host.send_sync()

    assert isinstance(pump(host, guest)[-1], SessionStarted)
    assert isinstance(pump(guest, host)[0], SessionStarted)


@given(data=st.binary(min_size=1, max_size=20_000), window=st.integers(1, 5_000), take=st.integers(1, 7_000))
@settings(deadline=None)
def test_every_byte_arrives_in_order_whatever_the_window(data: bytes, window: int, take: int) -> None:
    host, guest = connected(host_window=window)
    stream = with_stream(host, guest, to_guest=False)
    got, unread, rest, finished = bytearray(), bytearray(), data, False
    while not finished:
        rest = rest[guest.send_data(stream, rest) :] if rest else rest
        if not rest:
            guest.send_eof(stream)
        for event in pump(guest, host):
            match event:
                case DataReceived(_, piece):
                    unread += piece
                case EofReceived():
                    finished = True
        assert len(unread) <= window
        got += unread[:take]
        host.consumed(stream, len(unread[:take]))
        del unread[:take]
        pump(host, guest)
    assert bytes(got + unread) == data


class Reconnects(RuleBasedStateMachine):
    """One guest, many hosts; connections break anywhere and lose what was under way."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest(dict(IDENTITY), 500)
        self.count = 0
        self.asked: set[int] = set()
        self.open: list[RequestReceived] = []

    @initialize()
    def connect(self) -> None:
        """A host comes; what was in its predecessor's socket is gone."""
        self.count += 1
        self.host = Host(f"{self.count:032x}", 700)
        self.host.send_sync()
        self.to_guest = self.to_host = b""
        self.asked.clear()

    @rule(keep=st.integers(0, 40_000), told=st.booleans())
    def reconnect(self, keep: int, told: bool) -> None:
        """The host goes away; part of what it sent still comes, and the guest may notice or not."""
        self.to_guest += self.host.data_to_send()
        self._guest_receives(self.to_guest[:keep])
        if told:
            self._on_guest_event(self.guest.hang_up())
        # What the guest had half written may still reach the next host.
        stale = self.guest.data_to_send()[keep % 97 :]
        self.connect()
        self.to_host = stale

    @precondition(lambda self: self.host.established)
    @rule(size=st.integers(0, 40_000))
    def ask(self, size: int) -> None:
        """The host asks something."""
        if len(self.asked) < 20:
            self.asked.add(self.host.send_request("m", {"x": "x" * size, "session": self.count}))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """The guest answers any request that it has, of whatever session."""
        request = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.guest.send_reply(request, {"session": request.params["session"]})

    @rule(count=st.integers(1, 50_000))
    def carry_to_guest(self, count: int) -> None:
        """Some bytes arrive at the guest."""
        self.to_guest += self.host.data_to_send()
        self._guest_receives(self.to_guest[:count])
        self.to_guest = self.to_guest[count:]

    @rule(count=st.integers(1, 50_000))
    def carry_to_host(self, count: int) -> None:
        """Some bytes arrive at the host: never an answer to another session's request."""
        self.to_host += self.guest.data_to_send()
        for event in self.host.receive_data(self.to_host[:count]):
            if isinstance(event, ReplyReceived):
                assert event.result == {"session": self.count}
                self.asked.remove(event.id)
        self.to_host = self.to_host[count:]

    def _guest_receives(self, data: bytes) -> None:
        for event in self.guest.receive_data(data):
            self._on_guest_event(event)

    def _on_guest_event(self, event: object) -> None:
        # Requests of the old session stay open in the agent: their answers must go nowhere.
        if isinstance(event, RequestReceived):
            self.open.append(event)

    @invariant()
    def memory_is_bounded(self) -> None:
        """Neither end hoards."""
        assert held(self.guest) <= MEMORY_BOUND
        assert held(self.host) <= MEMORY_BOUND

    def teardown(self) -> None:
        """In the end a session always comes about."""
        self.connect()
        pump(self.host, self.guest)
        assert any(isinstance(e, SessionStarted) for e in pump(self.guest, self.host))


TestReconnects = Reconnects.TestCase
TestReconnects.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
