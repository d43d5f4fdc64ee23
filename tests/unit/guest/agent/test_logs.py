"""Logs in the guest: rings that drop the oldest, and a feed that acknowledges by credit."""

from __future__ import annotations

import itertools
import os

import pytest

from vcnode.drivers.agent.native.logs import take_records
from vcnode.drivers.agent.native.messages import BadFieldError
from vcnode.drivers.base import LogRecord
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.logs import END, HEADER, LOG_BYTES, RECORD_COST, STDERR, STDOUT, Feed, Log, Pipe
from vcnode.guest.agent.loop import Loop


class Port:
    """Takes what is sent, as far as there is credit."""

    def __init__(self, window: int = 1 << 20) -> None:
        self.left = window
        self.sent = bytearray()

    def open_stream(self, stream: int, *, sending: bool) -> None:
        assert sending

    def credit(self, stream: int) -> int:
        return self.left

    room = credit

    def send_data(self, stream: int, data: bytes) -> None:
        assert len(data) <= self.left
        self.left -= len(data)
        self.sent += data

    def take(self) -> list[LogRecord]:
        """The whole records that came since the last call."""
        return take_records(self.sent)


def made(window: int = 1 << 20) -> tuple[Port, Feed, Log]:
    port = Port(window)
    feed = Feed(port)  # type: ignore[arg-type]
    return port, feed, Log("c1", feed)


def test_what_was_written_before_anybody_followed_is_sent_in_order() -> None:
    port, feed, log = made()
    log.add(STDOUT, b"one\n")
    log.add(STDERR, b"two\n")
    log.add(END, b"")
    feed.follow(1, [log], {})
    feed.push()
    assert [(r.container_id, r.kind, r.offset, r.data) for r in port.take()] == [
        ("c1", "stdout", 0, b"one\n"),
        ("c1", "stderr", 4, b"two\n"),
        ("c1", "end", 8, b""),
    ]
    log.add(STDOUT, b"three")
    assert [(r.offset, r.data) for r in port.take()] == [(8, b"three")]


def test_small_writes_become_one_record_and_large_ones_several() -> None:
    port, feed, log = made()
    for _ in range(10):
        log.add(STDOUT, b"x")
    log.add(STDERR, b"y" * 100_000)
    feed.follow(1, [log], {})
    feed.push()
    assert [len(r.data) for r in port.take()] == [10, 32768, 32768, 32768, 1696]


def test_a_full_ring_drops_the_oldest_and_the_offsets_tell() -> None:
    port, feed, log = made()
    for number in range(100):
        log.add(STDOUT if number % 2 else STDERR, bytes([number]) * 10_000)
    feed.follow(1, [log], {})
    feed.push()
    records = port.take()
    assert sum(len(r.data) + RECORD_COST for r in records) <= LOG_BYTES
    assert records[0].offset > 0
    assert records[-1].offset + len(records[-1].data) == 1_000_000
    assert all(a.offset + len(a.data) == b.offset for a, b in itertools.pairwise(records))


def test_a_new_session_gets_what_the_host_has_not_kept() -> None:
    port, feed, log = made()
    log.add(STDOUT, b"kept\n")
    feed.follow(1, [log], {})
    feed.push()
    (first,) = port.take()
    log.add(STDERR, b"lost on the way\n")
    feed.end_session()
    log.add(END, b"")
    port.sent.clear()
    feed.follow(1, [log], {"c1": (first.instance, 5)})
    feed.push()
    assert [(r.offset, r.data) for r in port.take()] == [(5, b"lost on the way\n"), (21, b"")]
    feed.end_session()
    feed.follow(2, [log], {"c1": (first.instance + 1, 5)})
    feed.push()
    assert [r.offset for r in port.take()] == [5, 21]  # what is before it was asked for once, and is gone


def test_credit_acknowledges() -> None:
    port, feed, log = made(window=100_000)
    log.add(STDOUT, b"a" * 30_000)
    log.add(STDERR, b"b" * 30_000)
    feed.follow(1, [log], {})
    feed.push()
    port.left += 40_000
    feed.credit(1)
    feed.end_session()
    port.sent.clear()
    port.left = 100_000
    feed.follow(1, [log], {})
    feed.push()
    assert [r.kind for r in port.take()] == ["stderr"]


def test_without_credit_nothing_is_sent_and_logs_take_turns() -> None:
    port, feed, log = made(window=10)
    other = Log("c2", feed)
    for target in (log, other):
        for kind in (STDOUT, STDERR):
            target.add(kind, b"x" * 20)
    feed.follow(1, [log, other], {})
    feed.push()
    assert len(port.sent) == 10
    with pytest.raises(Failure):
        feed.follow(2, [log], {})
    port.left = 10_000
    feed.credit(1)
    assert [r.container_id for r in port.take()] == ["c1", "c2", "c1", "c2"]
    feed.forget(log)


def test_a_flood_is_read_at_a_bounded_pace_and_drained_at_its_end() -> None:
    _, _, log = made()
    loop = Loop()
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    pipe = Pipe(loop, read_end, log, STDOUT)
    os.write(write_end, b"first")
    pipe._on_ready(0)
    os.write(write_end, b"second")
    pipe._on_ready(0)
    os.write(write_end, b"third")
    os.close(write_end)
    assert log.end_offset == 11
    pipe.drain()
    assert log.end_offset == 16
    loop.call_later(0.02, loop.stop)
    loop.run()
    loop.close()


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(9, 2, 0, 1, 1, 0, 1) + b"c1x",
        HEADER.pack(1, 2, 7, 1, 1, 0, 1) + b"c1x",
        HEADER.pack(1, 2, 0, 0, 1, 0, 1) + b"c1",
        HEADER.pack(3, 2, 0, 1, 1, 0, 1) + b"c1x",
        HEADER.pack(1, 2, 0, 40_000, 1, 0, 1),
        HEADER.pack(1, 2, 0, 1, 1, 1 << 63, 1) + b"c1x",
        HEADER.pack(1, 3, 0, 1, 1, 0, 1) + b"../x",
        HEADER.pack(1, 0, 0, 1, 1, 0, 1) + b"x",
    ],
)
def test_what_no_agent_would_send_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFieldError):
        take_records(bytearray(frame))


def test_half_a_record_waits_for_its_rest() -> None:
    frame = HEADER.pack(1, 2, 0, 3, 1, 0, 1) + b"c1abc"
    unread = bytearray()
    for byte in frame[:-1]:
        unread.append(byte)
        assert take_records(unread) == []
    unread += frame[-1:] + frame
    assert [r.data for r in take_records(unread)] == [b"abc", b"abc"]
    assert not unread
