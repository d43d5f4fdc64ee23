"""Processes of the native driver: streams, credit, the end, and starts that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.drivers.agent.guests import LIMIT_S, RefusalError, ScriptedGuest, session_with
from tests.unit.guest.test_protocol import content_of
from vcnode.drivers.agent.native.process import NativeProcess
from vcnode.drivers.agent.native.session import NativeSession
from vcnode.drivers.base import ProcessExit
from vcnode.errors import AgentError, DeadlineExceededError, InvalidArgumentError, NotFoundError
from vcnode.guest import protocol
from vcnode.guest.protocol import DATA, EofReceived, ResetReceived, encode_frame
from vcnode.models.vm import GuestProcess

WINDOW = protocol.DEFAULT_WINDOW
PROCESS = GuestProcess(args=("x",))


@pytest.fixture
def guest(short_dir: Path) -> ScriptedGuest:
    guest = ScriptedGuest(short_dir / "agent.sock")
    guest.run_processes()
    return guest


async def start(session: NativeSession) -> NativeProcess:
    return await session.execute(PROCESS, container_id="c", timeout_s=LIMIT_S)


async def collect(process: NativeProcess) -> dict[str, bytes]:
    """All that it writes."""
    found = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(LIMIT_S):
        async for name, data in process.output():
            found[name] += data
    return found


def stdin_of(guest: ScriptedGuest) -> bytes:
    """What the guest got so far."""
    return content_of(guest.events)


async def test_output_and_exit_code_arrive(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        streams = guest.streams[0]
        guest.core.send_data(streams["stdout"], bytes(range(256)) * 300)
        guest.core.send_data(streams["stderr"], b"oops")
        guest.end_process(1, 3)

        assert await collect(process) == {"stdout": bytes(range(256)) * 300, "stderr": b"oops"}
        assert await process.wait() == ProcessExit(3)
        assert not session._by_id
        assert not session._by_stream


async def test_process_that_ended_before_the_reply_is_as_good(guest: ScriptedGuest) -> None:
    """Output, reply, EOF and exit may come in one piece."""

    def execute(params: dict[str, dict[str, int]]) -> dict[str, int]:
        result = guest._execute(params)
        guest.core.send_data(params["streams"]["stderr"], b"not found")
        return dict(result)

    guest.methods["execute"] = execute
    async with session_with(guest) as session:
        starting = asyncio.ensure_future(start(session))
        await guest.until(lambda: guest.streams)
        guest.end_process(1, 127)
        process = await starting
        assert await process.wait() == ProcessExit(127)
        assert (await collect(process))["stderr"] == b"not found"


async def test_stdin_waits_for_credit_and_loses_nothing(guest: ScriptedGuest) -> None:
    sent = bytes(range(256)) * (2 * WINDOW // 256)
    async with session_with(guest) as session:
        process = await start(session)
        writing = asyncio.ensure_future(process.write_stdin(sent))
        await guest.until(lambda: len(stdin_of(guest)) == WINDOW)
        assert not writing.done()
        guest.greedy = True
        guest.core.consumed(guest.streams[0]["stdin"], WINDOW)
        guest.flush()
        await asyncio.wait_for(writing, LIMIT_S)
        await process.close_stdin()
        await process.close_stdin()
        await guest.until(lambda: isinstance(guest.events[-1], EofReceived))
        assert stdin_of(guest) == sent


async def test_writes_at_the_same_time_do_not_mix(guest: ScriptedGuest) -> None:
    guest.greedy = True
    async with session_with(guest) as session:
        process = await start(session)
        writes = [asyncio.ensure_future(process.write_stdin(bytes([n]) * 100_000)) for n in (1, 2, 3, 4)]
        ending = asyncio.ensure_future(process.close_stdin())
        await asyncio.wait_for(asyncio.gather(*writes, ending), LIMIT_S)
        await guest.until(lambda: isinstance(guest.events[-1], EofReceived))
        assert stdin_of(guest) == b"".join(bytes([n]) * 100_000 for n in (1, 2, 3, 4))


async def test_stdin_after_the_end_is_dropped(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        blocked = asyncio.ensure_future(process.write_stdin(bytes(2 * WINDOW)))
        await guest.until(lambda: len(stdin_of(guest)) == WINDOW)
        guest.end_process(1, 0)
        await asyncio.wait_for(blocked, LIMIT_S)
        await process.write_stdin(b"more")
        await process.close_stdin()


async def test_stdin_that_the_process_closed_is_dropped_while_it_goes_on(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        guest.core.send_reset(guest.streams[0]["stdin"])
        await session.ping(timeout_s=LIMIT_S)
        await process.write_stdin(bytes(2 * WINDOW))
        guest.end_process(1, 0)
        assert await process.wait() == ProcessExit(0)


async def test_unread_output_stops_its_process_and_no_other(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        slow, quick = await start(session), await start(session)
        assert guest.core.send_data(guest.streams[0]["stdout"], bytes(2 * WINDOW)) == WINDOW
        for _ in range(4):
            chunk = bytes(WINDOW // 2)
            assert guest.core.send_data(guest.streams[1]["stdout"], chunk) == len(chunk)
            guest.flush()
            got = 0
            async for _, data in quick.output():
                got += len(data)
                if got == len(chunk):
                    break
            await session.ping(timeout_s=LIMIT_S)
        assert guest.core.credit(guest.streams[0]["stdout"]) == 0

        name, data = await anext(slow.output())
        assert (name, data) == ("stdout", bytes(WINDOW))
        await session.ping(timeout_s=LIMIT_S)
        assert guest.core.credit(guest.streams[0]["stdout"]) == WINDOW


async def test_more_output_than_credit_costs_the_session(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        for _ in range(WINDOW // 32768 + 1):
            guest.send_raw(encode_frame(DATA, guest.streams[0]["stdout"], bytes(32768)))
        with pytest.raises(AgentError, match="lost"):
            await process.wait()


async def test_output_in_single_bytes_is_not_kept_in_single_pieces(guest: ScriptedGuest) -> None:
    """Each piece has a price that the guest does not pay."""
    async with session_with(guest) as session:
        process = await start(session)
        for _ in range(2000):
            for name in ("stdout", "stderr"):
                guest.core.send_data(guest.streams[0][name], b"x")
        guest.flush()
        await session.ping(timeout_s=LIMIT_S)
        held = {name: [len(piece) for piece in pieces] for name, pieces in process._unread.items()}
        assert held == {"stdout": [2000], "stderr": [2000]}


async def test_exit_ends_the_output_even_of_a_guest_that_sends_no_eof(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        guest.core.send_event("process_exited", {"process_id": 1, "exit_code": 0})
        guest.flush()
        assert await collect(process) == {"stdout": b"", "stderr": b""}


async def test_what_came_before_the_loss_can_still_be_read(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        guest.core.send_data(guest.streams[0]["stdout"], b"last words")
        guest.flush()
        await session.ping(timeout_s=LIMIT_S)
        guest.hang_up()
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)
        output = process.output()
        assert await anext(output) == ("stdout", b"last words")
        with pytest.raises(AgentError):
            await asyncio.wait_for(anext(output), LIMIT_S)


async def test_signal_is_sent_to_a_living_process_only(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        await process.signal(15)
        with pytest.raises(InvalidArgumentError):
            await process.signal(65)
        guest.end_process(1, 143)
        await process.wait()
        await process.signal(9)
        assert guest.named("signal_process") == [{"process_id": 1, "signal": 15}]


async def test_close_kills_and_refuses_the_rest(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        await process.close()
        await process.close()
        await guest.until(lambda: guest.named("signal_process"))
        await session.ping(timeout_s=LIMIT_S)
        assert guest.named("signal_process") == [{"process_id": 1, "signal": 9}]
        assert len([event for event in guest.events if isinstance(event, ResetReceived)]) == 2
        assert await collect(process) == {"stdout": b"", "stderr": b""}
        guest.core.send_event("process_exited", {"process_id": 1, "exit_code": 137})
        guest.flush()
        assert await process.wait() == ProcessExit(137)
        assert not session._by_id
        assert not session._by_stream


async def test_close_of_an_ended_process_sends_no_signal(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        process = await start(session)
        guest.end_process(1, 0)
        await process.wait()
        await process.close()
        await session.ping(timeout_s=LIMIT_S)
        assert guest.named("signal_process") == []


async def test_start_that_the_guest_refuses_leaves_nothing(guest: ScriptedGuest) -> None:
    def refuse(_: object) -> None:
        raise RefusalError("not_found", "No such container.")

    guest.methods["execute"] = refuse
    async with session_with(guest) as session:
        with pytest.raises(NotFoundError):
            await start(session)
        assert not session._by_stream
        assert not session._host._senders
        assert not session._host._receivers


async def test_start_cancelled_in_the_moment_of_its_reply_is_killed(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        starting = asyncio.ensure_future(start(session))
        on_start = session._on_start

        def and_cancel(running: NativeProcess, reply: protocol.ReplyReceived) -> None:
            on_start(running, reply)
            starting.cancel()

        session._on_start = and_cancel  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await starting
        await guest.until(lambda: guest.named("signal_process"))
        assert guest.named("signal_process") == [{"process_id": 1, "signal": 9}]


async def cancel(starting: asyncio.Future[NativeProcess]) -> None:
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def time_out(starting: asyncio.Future[NativeProcess]) -> None:
    with pytest.raises(DeadlineExceededError):
        await starting


@pytest.mark.parametrize("give_up", [cancel, time_out])
async def test_start_that_nobody_waits_for_is_killed_when_it_comes(
    guest: ScriptedGuest, give_up: Callable[[asyncio.Future[NativeProcess]], object]
) -> None:
    guest.methods["execute"] = lambda _: None
    async with session_with(guest) as session:
        limit_s = LIMIT_S if give_up is cancel else 0.05
        starting = asyncio.ensure_future(session.execute(PROCESS, container_id=None, timeout_s=limit_s))
        await guest.until(lambda: guest.requests)
        await give_up(starting)  # type: ignore[misc]
        request = guest.requests[0]
        result = guest._execute(request.params)
        guest.core.send_data(guest.streams[0]["stdout"], bytes(WINDOW))
        guest.core.send_reply(request, result)
        guest.flush()

        await guest.until(lambda: guest.named("signal_process"))
        assert guest.named("signal_process") == [{"process_id": 1, "signal": 9}]
        guest.end_process(1, 137)
        await session.ping(timeout_s=LIMIT_S)
        assert not session._by_id
        assert not session._by_stream
        assert not session._host._receivers


async def test_start_that_nobody_waits_for_and_that_failed_leaves_nothing(guest: ScriptedGuest) -> None:
    guest.methods["execute"] = lambda _: None
    async with session_with(guest) as session:
        starting = asyncio.ensure_future(start(session))
        await guest.until(lambda: guest.requests)
        await cancel(starting)
        guest.core.send_error(guest.requests[0], "internal", "No.")
        await session.ping(timeout_s=LIMIT_S)
        assert not session._by_stream
        assert not session._host._receivers


@pytest.mark.parametrize("process_id", [1, 0, "2", None], ids=str)
async def test_process_id_that_is_taken_or_none_costs_the_session(
    guest: ScriptedGuest, process_id: object
) -> None:
    async with session_with(guest) as session:
        first = await start(session)
        guest.methods["execute"] = lambda _: {"process_id": process_id}
        with pytest.raises(AgentError):
            await start(session)
        with pytest.raises(AgentError):
            await first.wait()
