"""BULK frames: a lot of data without checksums and copies, and what half of one does."""

from __future__ import annotations

import pytest

from tests.unit.guest.test_protocol import SESSION, connected, content_of, pump, with_stream
from vcnode.guest.protocol import (
    BULK,
    DATA,
    HELLO,
    MARKER,
    MAX_BULK_TO_GUEST,
    MAX_BULK_TO_HOST,
    MAX_PAYLOAD,
    EofReceived,
    Guest,
    Host,
    LocalError,
    ProtocolError,
    SessionEnded,
    SessionStarted,
    encode_frame,
    encode_object,
)
from vcnode.guest.wire import around_bulk

WINDOW = 1 << 20
EVERY_BYTE = bytes(range(256)) * 2048  # 512 KiB


@pytest.mark.parametrize("to_guest", [True, False], ids=["to the guest", "to the host"])
def test_a_lot_goes_in_bulk_and_comes_as_it_was(to_guest: bool) -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=to_guest)
    sender: Host | Guest = host if to_guest else guest
    target: Host | Guest = guest if to_guest else host
    assert sender.send_data(stream, EVERY_BYTE) == len(EVERY_BYTE)
    sender.send_data(stream, b"little")
    sender.send_eof(stream)
    raw = sender.data_to_send()

    assert raw[0] == BULK
    events = [event for at in range(0, len(raw), 5000) for event in target.receive_data(raw[at : at + 5000])]
    assert content_of(events) == EVERY_BYTE + b"little"
    assert isinstance(events[-1], EofReceived)
    assert sender.bulk_room(stream) == 0  # it is finished


def test_a_peer_that_does_not_know_bulk_gets_frames_with_checksums() -> None:
    guest = Guest({"agent_version": "1", "boot_id": "", "kernel": "6"})
    hello = {"version": 1, "session": SESSION, "window": WINDOW}
    list(guest.receive_data(MARKER + encode_frame(HELLO, 0, encode_object(hello))))
    guest.data_to_send()
    guest.open_sender(1)
    guest.send_data(1, EVERY_BYTE)

    assert guest.data_to_send()[0] == DATA
    assert guest.bulk_room(1) == 0


def test_a_frame_sent_by_its_parts_is_one() -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=False)
    assert guest.bulk_room(stream) == MAX_BULK_TO_HOST
    head, tail = guest.begin_bulk(stream, 5)

    assert content_of(list(host.receive_data(head + b"pages" + tail))) == b"pages"
    assert guest.credit(stream) == WINDOW - 5
    with pytest.raises(LocalError):
        guest.begin_bulk(stream, MAX_BULK_TO_HOST + 1)


@pytest.mark.parametrize("size", [MAX_PAYLOAD, MAX_BULK_TO_GUEST])
def test_half_a_frame_is_never_given_on_and_hides_no_sync(size: int) -> None:
    """The host is killed in the middle; the zeros of the next one's sync complete the frame.

    A long frame swallows the first sync, which is short, and not the second.
    """
    host, guest = connected(MAX_BULK_TO_GUEST, MAX_BULK_TO_GUEST)
    stream = with_stream(host, guest, to_guest=True)
    host.send_data(stream, bytes(size))
    half = host.data_to_send()[:10_000]
    successor = Host("ab" * 16)
    successor.send_sync()
    events = list(guest.receive_data(half + successor.data_to_send()))
    if size > MAX_PAYLOAD:
        assert events == []
        successor.send_sync()
        events = pump(successor, guest)

    kinds = [type(event) for event in events]
    assert kinds[:2] == [SessionEnded, SessionStarted]
    assert kinds[-1] is SessionStarted
    assert content_of(events) == b""
    assert isinstance(pump(guest, successor)[0], SessionStarted)


def test_the_guest_takes_no_frame_longer_than_it_said() -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=True)
    head, _ = around_bulk(stream, MAX_BULK_TO_GUEST + 1)

    assert [type(event) for event in guest.receive_data(head)] == [SessionEnded]


@pytest.mark.parametrize("size", [100, 4096, 100_000, 600_000])
def test_what_was_received_may_be_written_over_once_the_guest_has_kept_it(size: int) -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=True)
    host.send_data(stream, EVERY_BYTE)
    host.send_data(stream, b"little")
    raw = host.data_to_send()
    space = bytearray(size)
    content = bytearray()
    for at in range(0, len(raw), size):
        piece = raw[at : at + size]
        space[: len(piece)] = piece
        content += content_of(guest.receive_data(memoryview(space)[: len(piece)]))
        guest.keep()
        space[:] = bytes(size)

    assert content == EVERY_BYTE + b"little"
    assert not guest.holds_views


@pytest.mark.parametrize("size", [1, 100, 70_000])
def test_the_host_takes_a_frame_in_place(size: int) -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=False)
    guest.send_data(stream, EVERY_BYTE[:100_000] if size == 1 else EVERY_BYTE)
    guest.send_data(stream, b"little")
    raw = memoryview(guest.data_to_send())
    content, in_place = bytearray(), 0
    while raw:
        space = host.bulk_space()
        count = min(size, len(raw) if space is None else len(space))
        if space is None:
            content += content_of(host.receive_data(bytes(raw[:count])))
        else:
            space[:count] = raw[:count]
            in_place += count
            content += content_of(host.bulk_received(count))
        raw = raw[count:]

    assert content == (EVERY_BYTE[:100_000] if size == 1 else EVERY_BYTE) + b"little"
    assert in_place > len(content) - 2 * size - 100


def test_a_frame_with_a_wrong_end_costs_the_guest_its_session() -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=False)
    head, _ = guest.begin_bulk(stream, 5)

    with pytest.raises(ProtocolError, match="checksum"):
        list(host.receive_data(head + b"pages" + b"oops"))
