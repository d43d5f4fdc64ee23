"""Two endpoints over a bus that loses, doubles and delays."""

from __future__ import annotations

import random

import pytest

from vcnode.sessions import frames
from vcnode.sessions.endpoint import Ended, Endpoint, Message, Received
from vcnode.sessions.frames import STDIN, STDOUT, FrameError

WINDOW = 64 * 1024


def data(epoch: int, stream: int, offset: int, payload: bytes) -> bytes:
    return b"".join(frames.encode_data(epoch, stream, offset, payload, ends=False))


class Pair:
    """A client and a node, and the bus between them."""

    def __init__(
        self, seed: int = 0, *, loss: float = 0.0, doubling: float = 0.0, delay: float = 0.0
    ) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.loss, self.doubling, self.delay = loss, doubling, delay
        made = [Endpoint(client=c, epoch=1, window=WINDOW, chunk=5000, now=0.0) for c in (True, False)]
        self.client, self.node = made
        for end in made:
            for stream in (frames.CONTROL_UP, frames.CONTROL_DOWN, STDIN, STDOUT):
                end.open(stream)
        self.got: dict[tuple[str, int], bytearray] = {}
        self.ended: list[tuple[str, int]] = []
        self.messages: list[tuple[str, dict[str, object]]] = []
        self.wire: list[tuple[float, int, str, bytes]] = []
        self._count = 0

    def ends(self) -> list[tuple[str, Endpoint, Endpoint]]:
        return [("client", self.client, self.node), ("node", self.node, self.client)]

    def step(self, seconds: float = 0.05, *, read: bool = True) -> None:
        self.now += seconds
        for name, end, _ in self.ends():
            for _, parts in end.take_outgoing(self.now):
                raw = b"".join(parts)
                for _ in range(2 if self.random.random() < self.doubling else 1):
                    if self.random.random() >= self.loss:
                        late = self.random.random() * self.delay
                        self._count += 1
                        self.wire.append((self.now + late, self._count, name, raw))
        self.wire.sort()
        while self.wire and self.wire[0][0] <= self.now:
            _, _, name, raw = self.wire.pop(0)
            receiver = self.node if name == "client" else self.client
            to = "node" if name == "client" else "client"
            for event in receiver.receive(raw, self.now):
                match event:
                    case Received(stream, data):
                        self.got.setdefault((to, stream), bytearray()).extend(data)
                        if read:
                            receiver.consumed(stream, len(data), self.now)
                    case Ended(stream):
                        self.ended.append((to, stream))
                        receiver.refuse(stream, self.now)
                    case Message(content):
                        self.messages.append((to, content))


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_doubled_or_reordered_on_a_bad_bus(seed: int) -> None:
    pair = Pair(seed, loss=0.2, doubling=0.2, delay=0.3)
    sent = {STDIN: pair.random.randbytes(400_000), STDOUT: pair.random.randbytes(400_000)}
    left = {stream: memoryview(data) for stream, data in sent.items()}
    numbers = iter(range(1000))
    for _ in range(4000):
        for stream, end in ((STDIN, pair.client), (STDOUT, pair.node)):
            if room := min(end.room(stream), pair.random.randrange(1, 20_000)):
                end.send(stream, left[stream][:room], pair.now)
                left[stream] = left[stream][room:]
                if not left[stream]:
                    end.end(stream, pair.now)
        if pair.random.random() < 0.1 and pair.node.message_room and len(pair.messages) < 20:
            pair.node.send_message({"number": next(numbers)}, pair.now)
        pair.step()
        if not any(left.values()) and pair.client.all_consumed and pair.node.all_consumed:
            break
    assert bytes(pair.got["node", STDIN]) == sent[STDIN]
    assert bytes(pair.got["client", STDOUT]) == sent[STDOUT]
    assert sorted(pair.ended) == [("client", STDOUT), ("node", STDIN)]
    told = [content["number"] for _, content in pair.messages]
    assert told
    assert told == list(range(len(told)))


def test_an_unread_stream_holds_its_sender_at_one_window_and_nobody_else() -> None:
    pair = Pair()
    pair.step()
    while room := pair.node.room(STDOUT):
        pair.node.send(STDOUT, memoryview(bytes(room)), pair.now)
        pair.step(read=False)
    assert len(pair.got["client", STDOUT]) == WINDOW
    pair.client.send(STDIN, memoryview(b"x"), pair.now)
    pair.node.send_message({"still": "here"}, pair.now)
    pair.step()
    assert pair.got["node", STDIN] == b"x"
    assert pair.messages == [("client", {"still": "here"})]
    pair.client.consumed(STDOUT, WINDOW, pair.now)
    pair.step()
    pair.step()
    assert pair.node.room(STDOUT) == WINDOW


def test_small_pieces_are_bounded_by_number() -> None:
    pair = Pair()
    count = 0
    while pair.node.room(STDOUT):
        pair.node.send(STDOUT, memoryview(b"x"), pair.now)
        count += 1
    assert count == 1024


def test_the_node_says_nothing_before_it_has_heard_its_client() -> None:
    pair = Pair()
    pair.node.send(STDOUT, memoryview(b"early"), 0.0)
    assert pair.node.take_outgoing(100.0) == []
    pair.step(3.0)
    pair.step()
    assert pair.got["client", STDOUT] == b"early"


def test_another_client_goes_on_where_the_first_had_consumed() -> None:
    pair = Pair()
    pair.step(3.0)
    pair.node.send(STDOUT, memoryview(b"seen"), pair.now)
    pair.step()
    pair.step(0.2)
    pair.node.send(STDOUT, memoryview(b"unseen"), pair.now)
    pair.node.take_outgoing(pair.now)  # lost with the first client
    stale = pair.client
    positions = pair.node.next_epoch()
    assert positions[STDOUT] == 4
    pair.client = Endpoint(client=True, epoch=2, window=WINDOW, chunk=5000, now=pair.now)
    for stream, start in positions.items():
        pair.client.open(stream, start)
    pair.got.clear()
    pair.step(3.0)
    pair.step()
    assert pair.got["client", STDOUT] == b"unseen"
    for _, parts in stale.take_outgoing(pair.now + 10):
        raw = b"".join(parts)
        assert list(pair.node.receive(raw, pair.now)) == []


def test_a_refused_stream_ends_its_sender() -> None:
    pair = Pair()
    pair.step(3.0)
    pair.node.refuse(STDIN, pair.now)
    pair.client.send(STDIN, memoryview(b"unwanted"), pair.now)
    for _ in range(5):
        pair.step()
    assert not pair.client.is_sending(STDIN)
    assert pair.client.all_consumed
    assert ("node", STDIN) not in pair.got


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01" * 10,
        bytes(16),
        b"\x09" + bytes(15),
        data(1, STDOUT, 0, b""),
        data(1, STDOUT, 0, b"x")[:1] + b"\xff" + bytes(20),
        data(1, STDOUT, frames.ALL - 1, b"xy"),
        frames.encode_state(1, [(STDIN, 1, 2)], from_client=True),
        frames.encode_state(1, [], from_client=True) + b"x",
        frames.encode_bye(0, "x", "y")[:-3],
    ],
)
def test_what_is_no_frame_is_refused(raw: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode(raw)


def test_a_peer_cannot_claim_to_have_received_what_was_not_sent() -> None:
    pair = Pair()
    claim = frames.encode_state(1, [(STDOUT, 10, 10)], from_client=True)
    with pytest.raises(FrameError):
        list(pair.node.receive(claim, 0.0))


def test_a_peer_cannot_send_more_than_the_window() -> None:
    pair = Pair()
    flood = data(1, STDIN, 0, bytes(3 * WINDOW))
    with pytest.raises(FrameError):
        list(pair.node.receive(flood, 0.0))
