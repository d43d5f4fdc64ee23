"""Opening a session: guests that are late, silent, foreign, or noisy."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest

from tests.unit.drivers.agent.guests import IDENTITY, LIMIT_S, VM_ID, FakeVm, ScriptedGuest, session_with
from vcnode.drivers.agent.native import NativeAgent, link
from vcnode.errors import AgentError
from vcnode.guest import protocol
from vcnode.guest.protocol import HELLO, MARKER, encode_frame, encode_object


@pytest.fixture
def guest(short_dir: Path) -> ScriptedGuest:
    return ScriptedGuest(short_dir / "agent.sock")


async def fails_to_connect(guest: ScriptedGuest, *, timeout_s: float = LIMIT_S) -> str:
    """Connect, which must fail and leave no connection; returns the message of the error."""
    with pytest.raises(AgentError) as caught:
        await NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=timeout_s)
    if guest.connected.is_set():
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)
    return caught.value.message


def answer(guest: ScriptedGuest, **fields: object) -> None:
    """Send a hello with *fields*, whatever the host has said."""
    hello = {"version": 1, "session": "0" * 32, "window": 1000, **IDENTITY, **fields}
    guest.send_raw(MARKER + encode_frame(HELLO, 0, encode_object(hello)))


async def test_session_tells_what_the_guest_said_of_itself(guest: ScriptedGuest) -> None:
    guest.core.identity["kernel"] = "6.1\x1b[31m" + "x" * 200
    async with session_with(guest) as session:
        assert session.info.agent_version == "1.2"
        assert session.info.kernel.startswith("6.1 [31m")
        assert len(session.info.kernel) <= 129
        await session.ping(timeout_s=LIMIT_S)


async def test_socket_that_appears_later_is_waited_for(guest: ScriptedGuest) -> None:
    connecting = asyncio.ensure_future(NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=LIMIT_S))
    await asyncio.sleep(0)
    async with guest:
        session = await connecting
        await session.close()


async def test_socket_that_never_appears_is_an_agent_error(short_dir: Path) -> None:
    with pytest.raises(AgentError, match=VM_ID):
        await NativeAgent().connect(FakeVm(short_dir / "none").as_vm, timeout_s=0.05)


async def test_path_that_is_no_socket_is_an_agent_error(short_dir: Path) -> None:
    (short_dir / ("x" * 120)).touch()
    with pytest.raises(AgentError, match="cannot be reached"):
        await NativeAgent().connect(FakeVm(short_dir / ("x" * 120)).as_vm, timeout_s=LIMIT_S)


async def test_silent_guest_is_an_agent_error_at_the_deadline(guest: ScriptedGuest) -> None:
    guest.deaf = True
    async with guest:
        assert "did not answer" in await fails_to_connect(guest, timeout_s=0.1)


async def test_cancelled_connect_leaves_no_connection(guest: ScriptedGuest) -> None:
    guest.deaf = True
    async with guest:
        connecting = asyncio.ensure_future(NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=LIMIT_S))
        await guest.until(lambda: guest.received_bytes)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)


async def test_sync_that_was_lost_is_repeated(guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcnode.drivers.agent.native.agent._SYNC_INTERVAL_S", 0.01)
    sync_bytes = len(protocol.SYNC_ZEROS) + 100
    guest.deaf = True
    async with guest:
        connecting = asyncio.ensure_future(NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=LIMIT_S))
        await guest.until(lambda: guest.received_bytes > sync_bytes)
        guest.deaf = False
        session = await connecting
        await session.close()


async def test_guest_of_another_version_is_named(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.deaf = True
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 32)
    async with guest:
        connecting = asyncio.ensure_future(fails_to_connect(guest))
        await guest.until(lambda: guest.received_bytes)
        answer(guest, version=7)
        assert "version 7" in await connecting


async def test_hello_of_another_session_is_not_taken(guest: ScriptedGuest) -> None:
    guest.deaf = True
    async with guest:
        connecting = asyncio.ensure_future(fails_to_connect(guest, timeout_s=0.2))
        await guest.until(lambda: guest.received_bytes)
        answer(guest, session="f" * 32)
        assert "did not answer" in await connecting


async def test_port_that_closes_before_the_hello_is_an_agent_error_at_once(guest: ScriptedGuest) -> None:
    guest.deaf = True
    async with guest:
        connecting = asyncio.ensure_future(fails_to_connect(guest))
        await guest.until(lambda: guest.received_bytes)
        guest.send_raw(MARKER + b"\x01\x00")
        guest.hang_up()
        assert "closed" in await connecting


async def test_endless_noise_before_the_hello_is_cut_off(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "MAX_BEFORE_HELLO", 1 << 20)
    guest.deaf = True
    async with guest:
        connecting = asyncio.ensure_future(fails_to_connect(guest))
        await guest.until(lambda: guest.received_bytes)
        guest.send_raw(b"noise" * (1 << 18))
        assert "too much" in await connecting
