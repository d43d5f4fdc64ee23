"""A session of the native driver: calls, answers, events, and guests that break the rules."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.drivers.agent.guests import LIMIT_S, FakeVm, RefusalError, ScriptedGuest, session_with
from vcnode.drivers.agent import events as events_module
from vcnode.drivers.agent.native import NativeAgent
from vcnode.drivers.agent.native import session as session_module
from vcnode.drivers.agent.native.session import NativeSession
from vcnode.drivers.base import ContainerExited, GuestEvent, SessionLost
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.guest.protocol import DEFAULT_WINDOW, EVENT, REPLY, ReplyReceived, encode_frame
from vcnode.models.network import DnsConfig, Endpoint, Route
from vcnode.models.vm import ContainerRoot, GuestConfig, GuestContainer, GuestProcess

CONTAINER = GuestContainer(
    container_id="c1",
    root=ContainerRoot(shared_name="c1"),
    hostname="h",
    process=GuestProcess(args=("true",)),
)


@pytest.fixture
def guest(short_dir: Path) -> ScriptedGuest:
    return ScriptedGuest(short_dir / "agent.sock")


async def all_events(session: NativeSession) -> list[GuestEvent]:
    """Every event until the last."""
    async with asyncio.timeout(LIMIT_S):
        return [event async for event in session.events()]


async def is_lost(session: NativeSession, because: str = "") -> None:
    """Check that the session is lost, that it said so last, and that calls fail at once."""
    last = (await all_events(session))[-1]
    assert isinstance(last, SessionLost)
    assert because in last.reason
    with pytest.raises(AgentError, match="lost"):
        await session.ping(timeout_s=LIMIT_S)


async def test_answers_find_their_calls_in_any_order(guest: ScriptedGuest) -> None:
    guest.methods |= dict.fromkeys(("start_container", "ping"), lambda _: None)
    async with session_with(guest) as session:
        first = asyncio.ensure_future(session.start_container("a", timeout_s=LIMIT_S))
        second = asyncio.ensure_future(session.start_container("b", timeout_s=LIMIT_S))
        await guest.until(lambda: len(guest.requests) == 2)
        for pid, request in zip((12, 11), reversed(guest.requests), strict=True):
            guest.core.send_reply(request, {"pid": pid, "more": "is ignored"})
        guest.flush()
        assert (await first, await second) == (11, 12)


ENDPOINT = Endpoint(
    id="vm-1-0",
    name="eth0",
    mac="02:00:00:00:00:01",
    addresses=("10.0.0.2/24",),
    routes=(Route(destination="0.0.0.0/0", gateway="10.0.0.1"),),
    mtu=1400,
)


async def test_params_are_those_of_the_contract(guest: ScriptedGuest) -> None:
    guest.methods |= dict.fromkeys(
        ("configure", "create_container", "signal_container", "delete_container", "shutdown"), lambda _: {}
    )
    async with session_with(guest) as session:
        config = GuestConfig(
            hostname="h",
            time_ns=5,
            entropy=b"\0\1",
            machine_id="0" * 32,
            endpoints=(ENDPOINT,),
            dns=DnsConfig(servers=("10.0.0.53",), hosts={"db": "10.0.0.9"}),
        )
        await session.configure(config, timeout_s=LIMIT_S)
        await session.create_container(CONTAINER, timeout_s=LIMIT_S)
        await session.signal_container("c1", 15, everyone=True, timeout_s=LIMIT_S)
        await session.delete_container("c1", timeout_s=LIMIT_S)
        await session.shutdown(timeout_s=LIMIT_S)
    by_method = {request.method: request.params for request in guest.requests}
    assert by_method["configure"] == {
        "hostname": "h",
        "time_ns": 5,
        "entropy": "AAE=",
        "machine_id": "0" * 32,
        "interfaces": [
            {
                "name": "eth0",
                "mac": "02:00:00:00:00:01",
                "addresses": ["10.0.0.2/24"],
                "mtu": 1400,
                "routes": [
                    {"destination": "0.0.0.0/0", "gateway": "10.0.0.1", "on_link": False, "metric": None}
                ],
            }
        ],
        "dns": {"servers": ["10.0.0.53"], "search": [], "options": [], "hosts": [["db", "10.0.0.9"]]},
    }
    created = by_method["create_container"]
    assert set(created) == {
        *("container_id", "root", "readonly", "hostname", "process", "resources"),
        *("stop_signal", "stop_timeout_ms"),
    }
    assert created["root"] == {"shared_name": "c1"}
    assert set(created["process"]) == {
        *("args", "envs", "workdir", "user", "group", "supplementary_groups"),
        *("rlimits", "no_new_privileges", "capabilities"),
    }
    assert set(created["resources"]) == {
        *("cpu_quota_us", "cpu_period_us", "cpu_shares", "mem_limit_mib", "pids_limit"),
    }
    assert by_method["signal_container"] == {"container_id": "c1", "signal": 15, "everyone": True}
    assert by_method["delete_container"] == {"container_id": "c1"}
    assert by_method["shutdown"] == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("invalid_argument", InvalidArgumentError),
        ("not_found", NotFoundError),
        ("already_exists", AlreadyExistsError),
        ("failed_precondition", FailedPreconditionError),
        ("not_implemented", UnsupportedError),
        ("internal", AgentError),
        ("aborted", AgentError),
        ("", AgentError),
        ("no such code", AgentError),
    ],
)
async def test_errors_of_the_guest_are_mapped_by_code(
    guest: ScriptedGuest, code: str, expected: type[VcnodeError]
) -> None:
    def refuse(_: dict[str, Any]) -> None:
        raise RefusalError(code, "Bad\nthing\x1b[2J " + "x" * 5000)

    guest.methods["ping"] = refuse
    async with session_with(guest) as session:
        with pytest.raises(expected) as caught:
            await session.ping(timeout_s=LIMIT_S)
        assert type(caught.value) is expected
        assert "Bad thing [2J" in caught.value.message
        assert len(caught.value.message) < 600


async def test_unanswered_call_ends_at_its_deadline_and_its_late_answer_is_dropped(
    guest: ScriptedGuest,
) -> None:
    guest.methods["configure"] = lambda _: None
    config = GuestConfig(hostname="h", time_ns=5, entropy=b"", machine_id="")
    async with session_with(guest) as session:
        with pytest.raises(DeadlineExceededError):
            await session.configure(config, timeout_s=0.05)
        guest.core.send_reply(guest.requests[0], {})
        await session.ping(timeout_s=LIMIT_S)


async def test_guest_that_answers_nothing_any_more_loses_the_session(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcnode.guest.protocol.MAX_REQUESTS", 3)
    guest.methods["ping"] = lambda _: None
    async with session_with(guest) as session:
        for _ in range(3):
            with pytest.raises(DeadlineExceededError):
                await session.ping(timeout_s=0.01)
        with pytest.raises(AgentError):
            await session.ping(timeout_s=LIMIT_S)
        await is_lost(session, "too many requests")


async def test_request_that_is_too_large_is_the_callers_fault(guest: ScriptedGuest) -> None:
    process = GuestProcess(args=("x" * 2_000_000,))
    async with session_with(guest) as session:
        with pytest.raises(InvalidArgumentError, match="too large"):
            await session.execute(process, container_id=None, timeout_s=LIMIT_S)
        await session.ping(timeout_s=LIMIT_S)
        assert not session._by_stream


async def test_guest_that_does_not_read_holds_up_its_callers_only_and_no_memory(short_dir: Path) -> None:
    """The socket fills up; then calls wait until their deadline instead of piling up."""
    async with ScriptedGuest(short_dir / "agent.sock") as guest:
        session = await NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=LIMIT_S)
        assert isinstance(session, NativeSession)
        assert guest._writer is not None
        guest._writer.transport.pause_reading()  # type: ignore[attr-defined]
        config = GuestConfig(hostname="x" * 900_000, time_ns=5, entropy=b"", machine_id="")
        for _ in range(10):
            with pytest.raises(DeadlineExceededError):
                await session.configure(config, timeout_s=0.02)
        assert session.link._transport is not None
        assert session.link._transport.get_write_buffer_size() < 2_000_000
        await session.close()


# -- guests that break the rules -------------------------------------------------------------------


def raw(data: bytes) -> Callable[[ScriptedGuest], None]:
    return lambda guest: guest.send_raw(data)


def event(text: str) -> Callable[[ScriptedGuest], None]:
    return raw(encode_frame(EVENT, 0, text.encode()))


BREACHES: dict[str, Callable[[ScriptedGuest], None]] = {
    "garbage": raw(b"\xde\xad\xbe\xef" * 100),
    "zeros": raw(bytes(100)),
    "half a frame, then the end": lambda guest: (guest.send_raw(b"\x04\0\0\0"), guest.hang_up()),  # type: ignore[func-returns-value]
    "hang-up": lambda guest: guest.hang_up(),
    "reply to nothing": raw(encode_frame(REPLY, 0, b'{"id": 999, "result": {}}')),
    "no JSON": raw(encode_frame(EVENT, 0, b"{]")),
    "deep JSON": raw(encode_frame(EVENT, 0, b"[" * 20_000)),
    "event without a name": event("{}"),
    "exit of a container without a name": event(
        '{"event": "container_exited", "exit_code": 0, "oom_killed": false}'
    ),
    "exit of a container with a bad name": event(
        '{"event": "container_exited", "container_id": "../x", "exit_code": 0, "oom_killed": false}'
    ),
    "exit code out of range": event(
        '{"event": "container_exited", "container_id": "c", "exit_code": 256, "oom_killed": false}'
    ),
    "exit code that is no number": event(
        '{"event": "container_exited", "container_id": "c", "exit_code": true, "oom_killed": false}'
    ),
    "oom_killed that is no boolean": event(
        '{"event": "container_exited", "container_id": "c", "exit_code": 1, "oom_killed": 1}'
    ),
    "exit of a process with a bad id": event(
        '{"event": "process_exited", "process_id": "1", "exit_code": 0}'
    ),
    "data on a stream nobody opened": raw(encode_frame(5, 9, b"x")),
}


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES.keys())
async def test_breach_costs_the_session_and_wakes_everybody(
    guest: ScriptedGuest, breach: Callable[[ScriptedGuest], None]
) -> None:
    guest.run_processes()
    async with session_with(guest) as session:
        process = await session.execute(GuestProcess(args=("x",)), container_id=None, timeout_s=LIMIT_S)
        guest.methods["ping"] = lambda _: None
        waiting = [
            asyncio.ensure_future(session.ping(timeout_s=LIMIT_S)),
            asyncio.ensure_future(process.wait()),
            asyncio.ensure_future(anext(process.output())),
            asyncio.ensure_future(process.write_stdin(bytes(DEFAULT_WINDOW + 1))),
        ]
        await guest.until(lambda: guest.named("ping"))
        breach(guest)

        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), LIMIT_S)
        assert [type(outcome) for outcome in outcomes] == [AgentError] * 4
        await is_lost(session)
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)


@pytest.mark.parametrize(
    ("method", "call", "result"),
    [
        ("start_container", lambda s: s.start_container("c", timeout_s=LIMIT_S), {}),
        ("start_container", lambda s: s.start_container("c", timeout_s=LIMIT_S), {"pid": 0}),
        ("start_container", lambda s: s.start_container("c", timeout_s=LIMIT_S), {"pid": 1 << 40}),
        ("list_containers", lambda s: s.list_containers(timeout_s=LIMIT_S), {}),
        ("list_containers", lambda s: s.list_containers(timeout_s=LIMIT_S), {"containers": [5]}),
        ("list_containers", lambda s: s.list_containers(timeout_s=LIMIT_S), {"containers": [{}] * 2000}),
        (
            "list_containers",
            lambda s: s.list_containers(timeout_s=LIMIT_S),
            {"containers": [{"container_id": "c", "state": "stopped", "oom_killed": False}]},
        ),
        (
            "list_containers",
            lambda s: s.list_containers(timeout_s=LIMIT_S),
            {"containers": [{"container_id": "c", "state": "created", "oom_killed": False}] * 2},
        ),
        (
            "list_containers",
            lambda s: s.list_containers(timeout_s=LIMIT_S),
            {"containers": [{"container_id": "c", "state": ["running"], "oom_killed": False}]},
        ),
        (
            "list_containers",
            lambda s: s.list_containers(timeout_s=LIMIT_S),
            {
                "containers": [
                    {
                        "container_id": "c",
                        "state": "stopped",
                        "exit_code": 0,
                        "oom_killed": False,
                        "finished_at_ns": 1 << 68,
                    }
                ]
            },
        ),
    ],
)
async def test_result_with_bad_fields_costs_the_session(
    guest: ScriptedGuest, method: str, call: Callable[[NativeSession], Any], result: dict[str, Any]
) -> None:
    guest.methods[method] = lambda _: result
    async with session_with(guest) as session:
        with pytest.raises(AgentError):
            await call(session)
        await is_lost(session, "bad")


async def test_list_containers_reads_what_the_guest_says(guest: ScriptedGuest) -> None:
    guest.methods["list_containers"] = lambda _: {
        "containers": [
            {"container_id": "a", "state": "created", "pid": None, "oom_killed": False},
            {"container_id": "b", "state": "running", "pid": 7, "exit_code": None, "oom_killed": False},
            {
                **{"container_id": "c", "state": "stopped", "pid": None, "exit_code": 137},
                **{"oom_killed": True, "finished_at_ns": 1_700_000_000_500_000_000},
            },
        ]
    }
    async with session_with(guest) as session:
        created, running, stopped = await session.list_containers(timeout_s=LIMIT_S)
    assert (created.state, running.pid, stopped.exit_code, stopped.oom_killed) == ("created", 7, 137, True)
    assert stopped.finished_at is not None
    assert stopped.finished_at.isoformat() == "2023-11-14T22:13:20.500000+00:00"


async def test_events_come_in_order_and_unknown_ones_are_ignored(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        for number in range(3):
            fields = {
                "container_id": f"c{number}",
                "exit_code": number,
                "oom_killed": False,
                "finished_at_ns": 5,
            }
            guest.core.send_event("container_exited", fields)
            guest.core.send_event("of_a_later_version", {"anything": []})
        guest.flush()
        await session.ping(timeout_s=LIMIT_S)
        await session.close()
        assert await all_events(session) == [ContainerExited(f"c{n}", n, oom_killed=False) for n in range(3)]


@pytest.mark.parametrize(
    ("name", "bound"),
    [("container_exited", events_module.MAX_EVENTS), ("nonsense", session_module.MAX_STRAYS)],
)
async def test_flood_of_events_costs_the_session_and_bounded_memory(
    guest: ScriptedGuest, name: str, bound: int
) -> None:
    async with session_with(guest) as session:
        for _ in range(bound + 100):
            guest.core.send_event(name, {"container_id": "c", "exit_code": 0, "oom_killed": False})
        guest.flush()
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)
        assert len(await all_events(session)) <= events_module.MAX_EVENTS + 1
        await is_lost_after_reading(session)


async def is_lost_after_reading(session: NativeSession) -> None:
    with pytest.raises(AgentError, match="lost"):
        await session.ping(timeout_s=LIMIT_S)


# -- the end of a session --------------------------------------------------------------------------


async def test_close_ends_everything_without_an_event_and_can_be_repeated(guest: ScriptedGuest) -> None:
    guest.run_processes()
    async with session_with(guest) as session:
        process = await session.execute(GuestProcess(args=("x",)), container_id=None, timeout_s=LIMIT_S)
        guest.methods["ping"] = lambda _: None
        pending = asyncio.ensure_future(session.ping(timeout_s=LIMIT_S))
        await guest.until(lambda: guest.named("ping"))

        await session.close()
        await session.close()

        with pytest.raises(AgentError, match="closed"):
            await pending
        with pytest.raises(AgentError, match="closed"):
            await process.wait()
        assert await all_events(session) == []
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT_S)


# -- creations that nobody waits for any more ------------------------------------------------------


async def give_up_creating(guest: ScriptedGuest, session: NativeSession) -> None:
    guest.methods["create_container"] = lambda _: None
    creating = asyncio.ensure_future(session.create_container(CONTAINER, timeout_s=LIMIT_S))
    await guest.until(lambda: guest.named("create_container"))
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating


async def test_container_of_a_cancelled_creation_is_deleted_before_all_else(
    guest: ScriptedGuest,
) -> None:
    guest.methods["delete_container"] = lambda _: None
    guest.methods["start_container"] = lambda _: {"pid": 5}
    async with session_with(guest) as session:
        await give_up_creating(guest, session)
        starting = asyncio.ensure_future(session.start_container("c1", timeout_s=LIMIT_S))
        await session.start_container("other", timeout_s=LIMIT_S)
        guest.core.send_reply(guest.requests[0], {})
        guest.flush()
        await guest.until(lambda: guest.named("delete_container"))
        await session.ping(timeout_s=LIMIT_S)
        assert guest.named("start_container") == [{"container_id": "other"}]

        guest.core.send_reply(next(r for r in guest.requests if r.method == "delete_container"), {})
        guest.flush()
        await starting
        assert guest.named("delete_container") == [{"container_id": "c1"}]
        assert not session._settling


async def test_cancelled_creation_that_the_guest_refused_deletes_nothing(guest: ScriptedGuest) -> None:
    """The id may belong to an older container."""
    async with session_with(guest) as session:
        await give_up_creating(guest, session)
        guest.core.send_error(guest.requests[0], "already_exists", "It exists.")
        await session.ping(timeout_s=LIMIT_S)
        assert guest.named("delete_container") == []
        assert not session._settling


async def test_creation_cancelled_in_the_moment_of_its_reply_is_deleted(guest: ScriptedGuest) -> None:
    guest.methods |= dict.fromkeys(("create_container", "delete_container"), lambda _: {})
    async with session_with(guest) as session:
        creating = asyncio.ensure_future(session.create_container(CONTAINER, timeout_s=LIMIT_S))
        on_reply = session._on_reply

        def and_cancel(request_id: int, reply: ReplyReceived) -> None:
            on_reply(request_id, reply)
            creating.cancel()

        session._on_reply = and_cancel  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await creating
        await session.delete_container("c1", timeout_s=LIMIT_S)
        assert len(guest.named("delete_container")) == 2
        assert not session._settling


async def test_call_that_waits_for_a_cancelled_creation_ends_with_the_session(guest: ScriptedGuest) -> None:
    async with session_with(guest) as session:
        await give_up_creating(guest, session)
        deleting = asyncio.ensure_future(session.delete_container("c1", timeout_s=LIMIT_S))
        await session.ping(timeout_s=LIMIT_S)
        guest.send_raw(os.urandom(1000) + bytes(1000))
        with pytest.raises(AgentError):
            await deleting
