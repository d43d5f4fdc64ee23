"""Connections and HTTP requests of probes, on real sockets; and what a request may say of probes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vcnode.guest.agent import probes
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.loop import Loop
from vcnode.guest.agent.params import Params

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LIMIT_S = 5.0


def outcome(host: str, port: int, request: bytes = b"", *, give_up_s: float | None = None) -> str | None:
    """What an attempt says; "given up" when it said nothing before that."""
    loop = Loop()
    found: list[str | None] = []

    def done(why: str | None) -> None:
        found.append(why)
        loop.stop()

    def begin() -> None:
        close = probes.connect(loop, probes.Connect(host, port, request), done)
        if give_up_s is not None:
            loop.call_later(give_up_s, close)
            loop.call_later(give_up_s, loop.stop)

    loop.call_later(0, begin)
    loop.call_later(LIMIT_S, loop.stop)
    loop.run()
    assert loop._callbacks == {}
    loop.close()
    return found[0] if found else "given up"


@contextlib.contextmanager
def server(*answers: bytes, family: int = socket.AF_INET) -> Iterator[int]:
    """A server that sends *answers* to the first client, after its request, and hangs up."""
    with socket.create_server(
        ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family
    ) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                if answers:
                    client.recv(4096)
                for answer in answers:
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(LIMIT_S)


def test_a_connection_that_comes_about_is_a_success() -> None:
    with server() as port:
        assert outcome("127.0.0.1", port) is None
    with server(family=socket.AF_INET6) as port:
        assert outcome("::1", port) is None


def test_a_port_where_nobody_listens_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert outcome("127.0.0.1", port) == "Connection refused"
    assert outcome("no address", 80) == "Invalid argument"


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((b"HTTP/1.1 200 OK\r\n\r\n",), None),
        ((b"HTTP/1.0 399 X\r\n",), None),
        ((b"HT", b"TP/1.1 2", b"04 No Content\r\n"), None),
        ((b"HTTP/1.1 200 " + b"x" * 100_000,), None),
        ((b"HTTP/1.1 500 Oops\r\n",), "HTTP status 500"),
        ((b"HTTP/1.1 404\r\n",), "HTTP status 404"),
        ((b"HTTP/1.1 199 X\r\n",), "HTTP status 199"),
        ((b"SSH-2.0-x\r\n",), "no HTTP answer"),
        ((b"\xff" * 4096,), "no HTTP answer"),
        ((b"HTTP/1.1 2000000000000000 X\r\n",), "HTTP status 200"),
        ((b"",), "no HTTP answer"),
    ],
)
def test_an_answer_counts_by_its_status(answers: tuple[bytes, ...], why: str | None) -> None:
    with server(*answers) as port:
        found = outcome("127.0.0.1", port, GET)
    # A server that hangs up on unread bytes resets the connection, perhaps before the answer is read.
    assert found == why or (len(answers[0]) > 64 and found == "Connection reset by peer")


def test_a_server_that_says_nothing_is_given_up_silently() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert outcome("127.0.0.1", listener.getsockname()[1], GET, give_up_s=0.05) == "given up"


PROBE: dict[str, Any] = {
    "initial_delay_ms": 0, "period_ms": 1000, "timeout_ms": 500,
    "success_threshold": 1, "failure_threshold": 3,
}  # fmt: skip


def test_probes_of_a_request_are_understood() -> None:
    found = probes.parse(
        Params(
            {
                "startup": {**PROBE, "exec": {"args": ["true"]}},
                "readiness": {**PROBE, "http": {"host": "::1", "port": 80, "request": "GET /"}},
                "liveness": None,
            }
        )
    )
    assert sorted(found) == ["readiness", "startup"]
    assert found["startup"].action.args == (b"true",)
    assert found["readiness"].action.address == ("::1", 80)
    assert (found["startup"].period_s, found["startup"].timeout_s) == (1, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"other": PROBE},
        {"startup": PROBE},
        {"startup": {**PROBE, "exec": {"args": []}}},
        {"startup": {**PROBE, "exec": {"args": ["a"]}, "tcp": {"host": "::1", "port": 1}}},
        {"startup": {**PROBE, "tcp": {"host": "::1", "port": 0}}},
        {"startup": {**PROBE, "tcp": {"host": "::1", "port": 1, "x": 1}}},
        {"startup": {**PROBE, "exec": {"args": ["a"]}, "period_ms": 0}},
        {"startup": {"exec": {"args": ["a"]}}},
    ],
    ids=str,
)
def test_anything_else_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Failure):
        probes.parse(Params(wrong))
