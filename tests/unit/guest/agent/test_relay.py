from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from vcnode.guest.agent.relay import Relay

HEAD, TAIL = b"head of 16 bytes", b"tail"


@pytest.fixture
def port() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A port, as far as a socket is one, and the host's end of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


def carry(relay: Relay, port: tuple[socket.socket, socket.socket]) -> bytes:
    """Push until the frame is out, reading at the other end whenever the port is full."""
    found = b""
    while not relay.push(port[0].fileno()):
        found += port[1].recv(1 << 20)
    while True:
        try:
            found += port[1].recv(1 << 20)
        except BlockingIOError:
            return found


def test_a_frame_arrives_whole_and_leaves_what_follows_in_the_pipe(
    relay: Relay, port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    content = bytes(range(256)) * 200
    os.write(pipe[1], content)
    relay.begin(pipe[0], 50_001, HEAD, TAIL)

    assert carry(relay, port) == HEAD + content[:50_001] + TAIL
    assert not relay.busy
    assert os.read(pipe[0], 10_000) == content[50_001:]


def test_a_pipe_of_many_small_pieces_goes_through_in_several_turns(
    relay: Relay, port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    """More pieces than our pipe has places for; each splice(2) of one byte is a piece of its own."""
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    small = os.pipe2(os.O_NONBLOCK)
    content = bytes(i & 255 for i in range(200))
    for byte in content:
        os.write(small[1], bytes([byte]))
        os.splice(small[0], pipe[1], 1)
    for fd in small:
        os.close(fd)
    relay.begin(pipe[0], len(content), HEAD, TAIL)

    assert carry(relay, port) == HEAD + content + TAIL


def test_a_dropped_frame_is_not_in_the_way_of_the_next(
    relay: Relay, port: tuple[socket.socket, socket.socket], pipe: tuple[int, int]
) -> None:
    os.write(pipe[1], b"oldnew")
    relay.begin(pipe[0], 3, HEAD, TAIL)
    relay.drop()
    assert not relay.busy
    relay.begin(pipe[0], 3, HEAD, TAIL)

    assert carry(relay, port) == HEAD + b"new" + TAIL
