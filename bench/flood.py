"""A load of requests over a raw socket: so light that what answers is the bottleneck, not what asks."""

from __future__ import annotations

import socket
import time

TIMEOUT_S = 60.0


def flood(port: int, subject: str, body: bytes, *, in_flight: int, count: int) -> float:
    """Send *count* requests, *in_flight* at any time; returns seconds from the first to the last reply.

    Raises:
        RuntimeError: A reply was an error (NATS ADR-32), or nobody listens.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = _Reader(sock)
        reader.line()  # INFO
        inbox = "_INBOX.flood"
        sock.sendall(
            b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\n'
            + f"SUB {inbox}.* 1\r\nPING\r\n".encode()
        )
        while reader.line() != b"PONG":
            pass
        request = f"PUB {subject} {inbox}.1 {len(body)}\r\n".encode() + body + b"\r\n"
        began = time.perf_counter()
        sent = min(in_flight, count)
        sock.sendall(request * sent)
        done = 0
        while done < count:
            replies = reader.replies()
            done += replies
            more = min(replies, count - sent)
            if more:
                sock.sendall(request * more)
                sent += more
        return time.perf_counter() - began


class _Reader:
    """The server's side of the connection. Source: NATS client protocol."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""

    def _more(self) -> None:
        chunk = self._sock.recv(1 << 18)
        if not chunk:
            raise RuntimeError("the NATS server hung up")
        self._data += chunk

    def line(self) -> bytes:
        """The next line."""
        while b"\r\n" not in self._data:
            self._more()
        line, self._data = self._data.split(b"\r\n", 1)
        return line

    def replies(self) -> int:
        """Wait for data; count the replies that are complete."""
        self._more()
        data, at, found = self._data, 0, 0
        while (end := data.find(b"\r\n", at)) >= 0:
            head = data[at:end].split(b" ")
            if head[0] not in (b"MSG", b"HMSG"):
                if head[0] == b"PING":
                    self._sock.sendall(b"PONG\r\n")
                at = end + 2
                continue
            stop = end + 2 + int(head[-1]) + 2
            if stop > len(data):
                break
            if head[0] == b"HMSG" and (
                b"Nats-Service-Error" in data[end:stop] or data.startswith(b"NATS/1.0 503", end + 2)
            ):
                raise RuntimeError(f"an error was replied: {data[end:stop][:400]!r}")
            found += 1
            at = stop
        self._data = data[at:]
        return found
