"""vcnode.drivers.hypervisor.qemu.qmp: our words for everything that a QMP peer may do, on real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vcnode.drivers.hypervisor.qemu.qmp import CommandRefusedError, QmpSession
from vcnode.errors import HypervisorError

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}\r\n'
)

Reply = Callable[[dict[str, Any]], bytes | None]


def ok(message: dict[str, Any], value: object = None) -> bytes:
    return json.dumps({"return": value or {}, "id": message["id"]}).encode() + b"\r\n"


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream that has nothing between them."""
    buffer = ""
    while chunk := await reader.read(65_536):
        buffer += chunk.decode()
        while buffer:
            try:
                message, end = json.JSONDecoder().raw_decode(buffer)
            except json.JSONDecodeError:
                break
            buffer = buffer[end:]
            yield message


class Peer:
    """A scripted QEMU: greets, agrees to the capabilities, then does as ``reply`` says (None: hangs up)."""

    def __init__(self) -> None:
        self.greeting: bytes | None = GREETING
        self.reply: Reply = ok
        self.connections = 0
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        try:
            if self.greeting is not None:
                writer.write(self.greeting)
            async for message in messages(reader):
                negotiating = message["execute"] == "qmp_capabilities"
                answer = b'{"return": {}}\r\n' if negotiating else self.reply(message)
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    made = Peer()
    server = await asyncio.start_unix_server(made.serve, tmp_path / "qmp")
    yield made
    if made.writer is not None:
        made.writer.close()
    server.close()
    await server.wait_closed()


@pytest.fixture
def events() -> list[tuple[str, Any]]:
    return []


@pytest.fixture
async def session(tmp_path: Path, peer: Peer, events: list[tuple[str, Any]]) -> AsyncIterator[QmpSession]:
    made = QmpSession("vm-1", tmp_path / "qmp", lambda name, data: events.append((name, dict(data))))
    yield made
    await made.close()


async def test_a_command_gets_its_result(session: QmpSession, peer: Peer):
    peer.reply = lambda message: ok(message, {"status": message["arguments"]["x"]})
    assert await session.execute("query-status", {"x": "running"}, timeout_s=5) == {"status": "running"}


async def test_many_commands_at_once_share_one_connection(session: QmpSession, peer: Peer):
    peer.reply = lambda message: ok(message, {"n": message["arguments"]["n"]})
    results = await asyncio.gather(*(session.execute("x", {"n": n + 1}, timeout_s=5) for n in range(20)))
    assert [result["n"] for result in results] == list(range(1, 21))
    assert peer.connections == 1


async def test_a_refusal_carries_the_class_and_not_qemus_text(session: QmpSession, peer: Peer):
    error = {"class": "DeviceNotFound", "desc": "Device '/secret/path' not found"}
    peer.reply = lambda message: json.dumps({"error": error, "id": message["id"]}).encode() + b"\r\n"
    with pytest.raises(CommandRefusedError) as caught:
        await session.execute("device_del", timeout_s=5)
    assert (caught.value.command, caught.value.error_class) == ("device_del", "DeviceNotFound")
    assert "secret" not in caught.value.message


async def test_a_peer_that_never_answers_is_given_up(session: QmpSession, peer: Peer):
    peer.reply = lambda _: b""
    with pytest.raises(HypervisorError, match=r"did not answer x for VM vm-1 within 0\.05 s"):
        await session.execute("x", timeout_s=0.05)
    peer.reply = ok
    await session.execute("y", timeout_s=5)  # the session goes on


async def test_a_peer_that_never_greets_is_given_up(session: QmpSession, peer: Peer):
    peer.greeting = None
    with pytest.raises(HypervisorError, match="did not answer connect"):
        await session.connect(timeout_s=0.05)


@pytest.mark.parametrize("greeting", [b"not json\r\n", b'{"hello": 1}\r\n', b"[]\r\n", b"\xff\xfe\r\n"])
async def test_a_peer_that_is_no_qemu_cannot_be_reached(session: QmpSession, peer: Peer, greeting: bytes):
    peer.greeting = greeting
    with pytest.raises(HypervisorError, match="cannot be reached"):
        await session.connect(timeout_s=5)


@pytest.mark.parametrize(
    "answer",
    [None, b"not json\r\n", b'{"error": {"class": "GenericError", "desc": "who?"}}\r\n'],
    ids=["hang-up", "garbage", "parse-error"],
)
async def test_a_lost_session_fails_the_command_and_the_next_one_reconnects(
    session: QmpSession, peer: Peer, answer: bytes | None
):
    peer.reply = lambda _: answer
    with pytest.raises(HypervisorError, match="lost during x"):
        await session.execute("x", timeout_s=5)
    peer.reply = ok
    await session.execute("y", timeout_s=5)
    assert peer.connections == 2


async def test_a_malformed_error_is_not_believed(session: QmpSession, peer: Peer):
    peer.reply = lambda message: json.dumps({"error": 3, "id": message["id"]}).encode() + b"\r\n"
    with pytest.raises(HypervisorError):
        await session.execute("x", timeout_s=5)


async def test_nobody_there(tmp_path: Path):
    session = QmpSession("vm-1", tmp_path / "nothing", lambda *_: None)
    with pytest.raises(HypervisorError, match="cannot be reached"):
        await session.connect(timeout_s=5)
    await session.close()


async def test_events_are_heard_in_order_and_not_hoarded(
    session: QmpSession, peer: Peer, events: list[tuple[str, Any]]
):
    def reply(message: dict[str, Any]) -> bytes:
        lines = [{"event": "STOP", "timestamp": {}, "data": {"n": n}} for n in range(100)]
        lines.append({"event": "RESUME", "data": "no object"})  # not as QEMU sends it
        return b"".join(json.dumps(line).encode() + b"\r\n" for line in lines) + ok(message)

    peer.reply = reply
    await session.execute("stop", timeout_s=5)
    assert events == [("STOP", {"n": n}) for n in range(100)] + [("RESUME", {})]
    assert session._client is not None
    assert session._client.events.history == ()
    assert session._client.events.empty()


async def test_ended_waits_for_the_last_event(session: QmpSession, peer: Peer, events: list[tuple[str, Any]]):
    await session.connect(timeout_s=5)
    assert peer.writer is not None
    ending: Awaitable[None] = asyncio.ensure_future(session.ended(timeout_s=10))
    peer.writer.write(b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\r\n')
    peer.writer.close()
    await ending
    assert events == [("SHUTDOWN", {"reason": "guest-reset"})]


async def test_ended_is_bounded(session: QmpSession):
    await session.connect(timeout_s=5)
    await session.ended(timeout_s=0.01)


async def test_a_cancelled_connect_leaves_no_task(session: QmpSession, peer: Peer):
    peer.greeting = None
    before = asyncio.all_tasks()
    connecting = asyncio.ensure_future(session.connect(timeout_s=100))
    await asyncio.wait({connecting}, timeout=0.05)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await session.close()
    assert {task for task in asyncio.all_tasks() - before if "serve" not in repr(task)} == set()


async def test_close_is_idempotent_and_open_again_is_allowed(session: QmpSession, peer: Peer):
    await session.close()
    await session.connect(timeout_s=5)
    await session.close()
    await session.close()
    await session.execute("x", timeout_s=5)
    assert peer.connections == 2
