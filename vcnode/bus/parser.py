"""nats-py's parser, sparing with copies of long messages."""

from __future__ import annotations

from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, Parser

LONG_BYTES = 64 * 1024
"""From here on it is worth it."""
_LINE_BYTES = 4096
_CRLF = b"\r\n"


class FrugalParser(Parser):
    """As its base, which copies all that was read four times; here a long payload is copied once.

    A long payload without headers is put together from what was read, all else goes through the base, which
    never gets more than one line or payload at once while a lot comes in.
    """

    def reset(self) -> None:
        """Begin anew, for a new connection."""
        super().reset()
        self._pieces: list[memoryview] = []
        self._missing = 0
        """Bytes that are missing of the payload in `_pieces`."""
        self._skip = 0
        """Bytes of the CRLF behind it that have not come."""

    async def parse(self, data: bytes = b"") -> None:
        """See `Parser.parse`."""
        if not (self._missing or self._skip) and len(data) < LONG_BYTES:
            await super().parse(data)
            return
        rest = memoryview(data)
        while rest:
            if self._missing:
                rest = await self._gather(rest)
            elif self._skip:
                count = min(self._skip, len(rest))
                self._skip -= count
                rest = rest[count:]
            elif self.state == AWAITING_MSG_PAYLOAD and self.needed >= LONG_BYTES and not self.header_needed:
                held = memoryview(bytes(self.buf))
                self.buf.clear()
                self._missing, self._skip = self.needed, len(_CRLF)
                self._skip -= len(await self._gather(held))
            else:
                size = self._next_size(rest)
                await super().parse(rest[:size])  # type: ignore[arg-type]  # it only copies it
                rest = rest[size:]

    def _next_size(self, rest: memoryview) -> int:
        """How much of *rest* the base is to see: one line, or what is missing of a payload."""
        if self.state != AWAITING_CONTROL_LINE:
            return self.needed + len(_CRLF) - len(self.buf)
        end = bytes(rest[:_LINE_BYTES]).find(_CRLF)
        return len(rest) if end < 0 else end + len(_CRLF)

    async def _gather(self, rest: memoryview) -> memoryview:
        """Add to the payload, and give it on when it is whole; returns what comes after it."""
        piece, rest = rest[: self._missing], rest[self._missing :]
        self._pieces.append(piece)
        self._missing -= len(piece)
        if not self._missing:
            payload, self._pieces = b"".join(self._pieces), []
            self.state = AWAITING_CONTROL_LINE
            message = self.msg_arg
            await self.nc._process_msg(message["sid"], message["subject"], message["reply"], payload, None)
        return rest
