"""The parser that copies long messages once finds what nats-py's own finds, wherever the bytes are cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from vcnode.bus.parser import LONG_BYTES, FrugalParser

Message = tuple[int, bytes, bytes, bytes, bytes | None]


class Client:
    """Takes what a parser finds."""

    def __init__(self) -> None:
        self.found: list[Message | str] = []

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        assert type(data) is bytes
        self.found.append((sid, bytes(subject), bytes(reply), data, headers))

    async def _process_ping(self) -> None:
        self.found.append("ping")

    async def _process_pong(self) -> None:
        self.found.append("pong")

    async def _process_err(self, text: str) -> None:
        self.found.append(text)

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.found.append(repr(info))


def found_by(kind: type[Parser], pieces: list[bytes]) -> list[Message | str]:
    client = Client()

    async def parse() -> None:
        parser = kind(client)
        for piece in pieces:
            await parser.parse(piece)
        assert not parser.buf

    asyncio.run(parse())
    return client.found


def message(size: int, *, reply: bytes = b"", headers: bytes = b"") -> bytes:
    """A message with a payload that looks like the protocol where it is cut."""
    payload = (b"\r\nMSG a 1 5\r\nPING\r\n" * (size // 19 + 1))[:size]
    arguments = b"a.b 7 " + (reply + b" " if reply else b"")
    if headers:
        total = len(headers) + size
        return b"HMSG %s%d %d\r\n%s%s\r\n" % (arguments, len(headers), total, headers, payload)
    return b"MSG %s%d\r\n%s\r\n" % (arguments, size, payload)


WIRE = st.sampled_from(
    [
        message(0),
        message(10, reply=b"_INBOX.x"),
        message(10, headers=b"NATS/1.0\r\nk: v\r\n\r\n"),
        message(LONG_BYTES - 1),
        message(LONG_BYTES, reply=b"_INBOX.x"),
        message(3 * LONG_BYTES + 7),
        message(2 * LONG_BYTES, headers=b"NATS/1.0\r\n\r\n"),
        b"PING\r\n",
        b"PONG\r\n",
        b"+OK\r\n",
        b"-ERR 'Some Error'\r\n",
        b'INFO {"long": "' + b"x" * 10_000 + b'"}\r\n',
    ]
)


@given(wire=st.lists(WIRE, max_size=8).map(b"".join), data=st.data())
@settings(deadline=None, max_examples=60)
def test_it_finds_what_the_other_finds(wire: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]

    assert found_by(FrugalParser, pieces) == found_by(Parser, [wire])


@pytest.mark.parametrize("at_end", range(-4, 1))
def test_a_cut_near_the_end_of_a_long_payload(at_end: int) -> None:
    long = message(2 * LONG_BYTES)
    wire = long + message(3)
    at = len(long) + at_end

    assert found_by(FrugalParser, [wire[:at], wire[at:]]) == found_by(Parser, [wire])


def test_a_new_connection_begins_anew() -> None:
    client = Client()

    async def parse() -> None:
        parser = FrugalParser(client)
        await parser.parse(message(4 * LONG_BYTES)[: 2 * LONG_BYTES])
        parser.reset()
        await parser.parse(message(2))

    asyncio.run(parse())
    assert [entry[3] for entry in client.found if isinstance(entry, tuple)] == [b"\r\n"]
