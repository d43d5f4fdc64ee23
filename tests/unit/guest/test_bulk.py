"""BULK frames: a lot of data without checksums and copies, and what half of one does."""

from __future__ import annotations

import pytest

from tests.unit.guest.test_protocol import SESSION, connected, pump, with_stream
from vcnode.guest.protocol import (
    BULK,
    DATA,
    HELLO,
    MARKER,
    MAX_BULK,
    MAX_PAYLOAD,
    DataReceived,
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

WINDOW = 1 << 20
EVERY_BYTE = bytes(range(256)) * 2048  # 512 KiB


def received(events: list[object]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, DataReceived))


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
    assert received(events) == EVERY_BYTE + b"little"
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
    assert guest.bulk_room(stream) == MAX_BULK
    head, tail = guest.begin_bulk(stream, 5)

    assert received(list(host.receive_data(head + b"pages" + tail))) == b"pages"
    assert guest.credit(stream) == WINDOW - 5
    with pytest.raises(LocalError):
        guest.begin_bulk(stream, MAX_BULK + 1)


def test_half_a_frame_is_never_given_on_and_hides_no_sync() -> None:
    """The host is killed in the middle; the zeros of the next one's sync complete the frame."""
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=True)
    host.send_data(stream, EVERY_BYTE[:MAX_PAYLOAD])
    half = host.data_to_send()[:10_000]
    successor = Host("ab" * 16)
    successor.send_sync()
    events = list(guest.receive_data(half + successor.data_to_send()))

    assert [type(event) for event in events] == [SessionEnded, SessionStarted]
    assert isinstance(pump(guest, successor)[0], SessionStarted)


def test_the_guest_takes_no_frame_longer_than_the_zeros_of_a_sync() -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=True)
    long = Host(SESSION)
    long.established, long.peer_bulk = True, MAX_BULK
    long._senders[stream] = MAX_BULK
    long.send_data(stream, bytes(MAX_PAYLOAD + 1))

    assert [type(event) for event in pump(long, guest)] == [SessionEnded]


def test_a_frame_with_a_wrong_end_costs_the_guest_its_session() -> None:
    host, guest = connected(WINDOW, WINDOW)
    stream = with_stream(host, guest, to_guest=False)
    head, _ = guest.begin_bulk(stream, 5)

    with pytest.raises(ProtocolError, match="checksum"):
        list(host.receive_data(head + b"pages" + b"oops"))
