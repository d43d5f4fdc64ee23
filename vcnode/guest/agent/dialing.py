"""Connections to ports inside the pod, for the host."""

from __future__ import annotations

import errno
import os
import socket

from vcnode.guest.agent.execs import Input, Output
from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure
from vcnode.guest.agent.loop import OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.loop import Loop, Timer
    from vcnode.guest.agent.port import Port

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
CONNECT_S = 10.0


class Connection:
    """A TCP connection with a stream in each direction."""

    def __init__(self, loop: Loop, port: Port, up: int, down: int, sock: socket.socket) -> None:
        self._sock = sock
        self.input = Input(loop, port, up, os.dup(sock.fileno()), self._no_more)
        self.output = Output(loop, port, down, os.dup(sock.fileno()), lambda: None)

    def _no_more(self) -> None:
        """Tell the other side that no more comes."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it has gone already

    @property
    def is_open(self) -> bool:
        """Whether either direction is."""
        return self.input.is_open or self.output.is_open

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        self.input.close()
        self.output.close()
        self._sock.close()


class Dialer:
    """Opens connections, and moves their bytes."""

    def __init__(self, loop: Loop, port: Port) -> None:
        self._loop = loop
        self._port = port
        self._by_stream: dict[int, Connection] = {}
        self._waiting: set[_Attempt] = set()

    def connect(self, number: int, streams: tuple[int, int], done: Callable[[Failure | None], None]) -> None:
        """Connect to a port of the loopback interface; *done* is told whether that worked."""
        self._attempt(number, streams, done, list(_ADDRESSES))

    def _attempt(
        self,
        number: int,
        streams: tuple[int, int],
        done: Callable[[Failure | None], None],
        addresses: list[tuple[int, str]],
    ) -> None:
        family, address = addresses.pop(0)

        def ended(sock: socket.socket | None, code: int) -> None:
            self._waiting.discard(attempt)
            if sock is not None:
                self._open(sock, streams)
                done(None)
            elif addresses:
                self._attempt(number, streams, done, addresses)
            else:
                done(Failure(FAILED_PRECONDITION, f"Port {number} of the pod: {os.strerror(code)}."))

        attempt = _Attempt(self._loop, family, (address, number), ended)
        self._waiting.add(attempt)
        attempt.start()

    def _open(self, sock: socket.socket, streams: tuple[int, int]) -> None:
        up, down = streams
        self._port.open_stream(up, sending=False)
        self._port.open_stream(down, sending=True)
        connection = Connection(self._loop, self._port, up, down, sock)
        self._by_stream[up] = self._by_stream[down] = connection
        connection.output.resume()

    def _tidy(self, connection: Connection) -> None:
        if not connection.is_open:
            connection.close()
            for stream in (connection.input.stream, connection.output.stream):
                self._by_stream.pop(stream, None)

    # -- what the host sends: True when the stream is one of these -----------------------------------

    def data(self, stream: int, pieces: list[bytes | memoryview]) -> bool:
        """Bytes for a connection."""
        if (connection := self._by_stream.get(stream)) is None:
            return False
        connection.input.data(pieces)
        return True

    def eof(self, stream: int) -> bool:
        """The host sends no more."""
        if (connection := self._by_stream.get(stream)) is None:
            return False
        connection.input.eof()
        self._tidy(connection)
        return True

    def credit(self, stream: int) -> bool:
        """The host takes more."""
        if (connection := self._by_stream.get(stream)) is None:
            return False
        connection.output.resume()
        return True

    def reset(self, stream: int) -> bool:
        """The host wants no more."""
        if (connection := self._by_stream.get(stream)) is None:
            return False
        connection.output.finish()
        self._tidy(connection)
        return True

    def resume_all(self) -> None:
        """The queue to the host has room again."""
        for connection in list(self._by_stream.values()):
            connection.output.resume()
            self._tidy(connection)

    def end_session(self) -> None:
        """The session with the host is over."""
        for attempt in list(self._waiting):
            attempt.cancel()
        self._waiting.clear()
        for connection in set(self._by_stream.values()):
            connection.close()
        self._by_stream.clear()


class _Attempt:
    """One attempt to connect."""

    def __init__(
        self,
        loop: Loop,
        family: int,
        address: tuple[str, int],
        ended: Callable[[socket.socket | None, int], None],
    ) -> None:
        self._loop = loop
        self._ended = ended
        self._address = address
        self._family = family
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin; the outcome may come at once."""
        try:
            self._sock = sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as exc:
            self._ended(None, exc.errno or errno.EAFNOSUPPORT)
            return
        code = sock.connect_ex(self._address)
        if code == errno.EINPROGRESS:
            self._timer = self._loop.call_later(CONNECT_S, lambda: self._finish(errno.ETIMEDOUT))
            self._loop.watch(sock.fileno(), OUT, lambda _: self._look())
        else:
            self._finish(code)

    def _look(self) -> None:
        if self._sock is not None:
            self._finish(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _finish(self, code: int) -> None:
        sock = self._sock
        if sock is None:
            return
        self._release()
        if code:
            sock.close()
            self._ended(None, code)
        else:
            self._ended(sock, 0)

    def _release(self) -> None:
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock = None
        if self._timer is not None:
            self._timer.cancel()

    def cancel(self) -> None:
        """Give up, silently."""
        sock = self._sock
        self._release()
        if sock is not None:
            sock.close()
