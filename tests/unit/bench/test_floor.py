"""The parts of the floors that can be tried without a VM."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.bare import _cpio_entry, _entries, bare_initrd, shell_needs
from bench.crowd import cpu_seconds, pss_mib
from bench.flood import flood

END = _cpio_entry("TRAILER!!!", 0, b"", 0)


def test_an_initrd_keeps_what_is_wanted_and_gets_the_other_init(tmp_path: Path) -> None:
    names = ("init", "usr", "usr/bin/busybox", "usr/bin/python3", "usr/lib/modules/a.ko", "usr/lib/x.so")
    archive = b"".join(_cpio_entry(name, 0o100755, name.encode(), 1) for name in names)
    (tmp_path / "initrd").write_bytes(archive + END)
    bare_initrd(tmp_path / "initrd", b"new", tmp_path / "out", keep=shell_needs)
    entries = dict(_entries((tmp_path / "out").read_bytes()))
    assert list(entries) == ["usr", "usr/bin/busybox", "usr/lib/modules/a.ko", "init"]
    assert b"new" in entries["init"]
    assert b"usr/bin/busybox" in entries["usr/bin/busybox"][110:]


def test_a_process_has_memory_and_has_used_cpu() -> None:
    assert pss_mib(os.getpid()) > 1
    assert cpu_seconds(os.getpid()) > 0


@pytest.fixture
def answering() -> Callable[[bytes], int]:
    """A server that answers every request with the given bytes; gives its port."""

    def start(answer: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            connection, _ = listener.accept()
            with listener, connection:
                connection.sendall(b"INFO {}\r\n")
                seen = b""
                while b"PING\r\n" not in seen:
                    seen += connection.recv(65536)
                connection.sendall(b"PONG\r\nPING\r\n")
                while chunk := connection.recv(65536):
                    reply = answer * chunk.count(b"PUB ")
                    connection.sendall(reply[:7])  # cut anywhere
                    connection.sendall(reply[7:])

        threading.Thread(target=serve, daemon=True).start()
        return int(listener.getsockname()[1])

    return start


def test_a_flood_counts_replies_wherever_they_are_cut(answering: Callable[[bytes], int]) -> None:
    port = answering(b"HMSG _INBOX.flood.1 1 12 14\r\nNATS/1.0\r\n\r\n{}\r\n")
    assert flood(port, "s", b"{}", in_flight=4, count=50) > 0


def test_a_flood_that_is_answered_with_an_error_fails(answering: Callable[[bytes], int]) -> None:
    port = answering(b"HMSG _INBOX.flood.1 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n")
    with pytest.raises(RuntimeError, match="503"):
        flood(port, "s", b"{}", in_flight=1, count=1)
