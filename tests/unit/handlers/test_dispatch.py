"""Dispatch: whatever comes in, exactly one reply goes out, and nothing runs twice."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.handlers.fakes import NOW, Gate, World
from vcnode.aio import Tasks
from vcnode.errors import (
    AbortedError,
    AgentError,
    NotFoundError,
    ResourceExhaustedError,
    StorageError,
    UnavailableError,
)
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.outcome import Outcome, oversized
from vcnode.models import wire
from vcnode.pods.journal import Journal
from vcnode.pods.store import Store

CREATE = b'{"pod": {"id": "p1"}}'


def error_of(outcome: Outcome) -> wire.ErrorReply:
    assert not outcome.ok
    assert outcome.headers[wire.SERVICE_ERROR_CODE] == str(outcome.number)
    assert outcome.headers[wire.SERVICE_ERROR]
    reply = wire.ErrorReply.model_validate_json(outcome.body)
    assert reply.code == outcome.code
    assert reply.error_id
    return reply


async def begin(tasks: Tasks, dispatcher: Dispatcher, *arguments: Any) -> asyncio.Future[Outcome]:
    """Dispatch in the background; the future gets the outcome."""
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        future.set_result(await dispatcher.dispatch(*arguments))

    tasks.spawn(run(), name="dispatch")
    return future


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    async with Tasks() as owner:
        yield owner


@asynccontextmanager
async def real_journal(path: Path) -> AsyncIterator[Journal]:
    store = await Store.open(path / "node.db", node_name="n1", clock=lambda: NOW)
    try:
        yield Journal(store, max_entries=100, max_age_s=1000, max_unpublished=100)
    finally:
        await store.close()


async def test_a_command_is_carried_out_and_its_reply_kept() -> None:
    world = World()
    outcome = await world.dispatcher.dispatch("pod.create", {wire.COMMAND_ID: "c-1"}, CREATE)
    assert outcome.ok
    assert json.loads(outcome.body)["pod_id"] == "p1"
    assert outcome.headers == {wire.COMMAND_ID: "c-1"}
    assert world.journal.stored["c-1"].body == outcome.body
    assert world.counter.done == [("pod.create", "ok")]


async def test_a_command_without_an_id_gets_one_that_is_in_the_reply() -> None:
    world = World()
    first = await world.dispatcher.dispatch("pod.create", {}, CREATE)
    second = await world.dispatcher.dispatch("pod.create", {}, CREATE)
    assert first.headers[wire.COMMAND_ID] in world.journal.stored
    assert first.headers[wire.COMMAND_ID] != second.headers[wire.COMMAND_ID]
    assert world.pods.count("create") == 2


async def test_reads_are_not_journalled() -> None:
    world = World()
    outcome = await world.dispatcher.dispatch("pod.status", {wire.COMMAND_ID: "c-1"}, b'{"pod_id": "p1"}')
    assert outcome.ok
    assert outcome.headers[wire.COMMAND_ID] == "c-1"
    assert not world.journal.begun


async def test_headers_reach_the_service_whatever_their_case() -> None:
    world = World()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    deadline = (NOW + timedelta(seconds=9)).isoformat()
    headers = {
        "vcnode-command-id": "c-1",
        "VCNODE-DEADLINE": deadline,
        wire.EXPECTED_REVISION: "7",
        "Traceparent": trace,
    }
    before = asyncio.get_running_loop().time()
    await world.dispatcher.dispatch("pod.start", headers, b'{"pod_id": "p1"}')
    call = world.pods.last_call
    assert call is not None
    assert (call.command_id, call.verb, call.expected_revision) == ("c-1", "pod.start", 7)
    assert call.traceparent == trace
    assert call.deadline is not None
    assert 8.5 < call.deadline - before < 9.5


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({wire.COMMAND_ID: "a b"}, wire.COMMAND_ID),
        ({wire.COMMAND_ID: ""}, wire.COMMAND_ID),
        ({wire.COMMAND_ID: "x" * 129}, wire.COMMAND_ID),
        ({wire.COMMAND_ID: "x\n"}, None),
        ({wire.DEADLINE: "tomorrow"}, wire.DEADLINE),
        ({wire.DEADLINE: "2031-05-06T07:08:09"}, wire.DEADLINE),
        ({wire.DEADLINE: "2031-02-31T07:08:09Z"}, wire.DEADLINE),
        ({wire.DEADLINE: "2031-W01-1T07:08:09Z"}, wire.DEADLINE),
        ({wire.EXPECTED_REVISION: "0"}, wire.EXPECTED_REVISION),
        ({wire.EXPECTED_REVISION: "-1"}, wire.EXPECTED_REVISION),
        ({wire.EXPECTED_REVISION: "1e3"}, wire.EXPECTED_REVISION),
        ({wire.TRACEPARENT: "junk"}, None),
        ({wire.DEADLINE: "2031-05-06t07:08:10.123456789z"}, None),
        ({wire.DEADLINE: "2031-05-06T09:08:10+02:00"}, None),
    ],
)
async def test_a_bad_header_is_named(headers: dict[str, str], field: str | None) -> None:
    world = World()
    outcome = await world.dispatcher.dispatch("pod.create", headers, CREATE)
    if field is None:
        assert outcome.ok
        return
    reply = error_of(outcome)
    assert reply.code == "invalid_argument"
    assert reply.details["violations"][0]["field"] == field
    assert outcome.headers[wire.COMMAND_ID]
    assert not world.pods.calls


async def test_a_passed_deadline_is_answered_at_once_without_effect() -> None:
    world = World()
    headers = {wire.DEADLINE: (NOW - timedelta(seconds=1)).isoformat(), wire.COMMAND_ID: "c-1"}
    reply = error_of(await world.dispatcher.dispatch("pod.create", headers, CREATE))
    assert reply.code == "deadline_exceeded"
    assert reply.details["begun"] is False
    assert not world.pods.calls
    assert not world.journal.begun


async def test_a_command_is_cancelled_and_undone_at_its_deadline() -> None:
    world = World()
    world.pods.gates["create"] = Gate()
    headers = {wire.DEADLINE: (NOW + timedelta(milliseconds=20)).isoformat(), wire.COMMAND_ID: "c-1"}
    reply = error_of(await world.dispatcher.dispatch("pod.create", headers, CREATE))
    assert reply.code == "deadline_exceeded"
    assert world.pods.undone == ["create"]
    assert not world.journal.stored["c-1"].ok


@pytest.mark.parametrize("verb", ["pod.create", "pod.status", "node.ping"])
async def test_a_body_beyond_the_bound_is_refused(verb: str) -> None:
    world = World(max_request_bytes=1024)
    reply = error_of(await world.dispatcher.dispatch(verb, {}, b" " * 1025))
    assert reply.code == "invalid_argument"
    assert reply.details["limit_bytes"] == 1024


async def test_an_unknown_verb_is_refused() -> None:
    reply = error_of(await World().dispatcher.dispatch("pod.explode", {}, b""))
    assert reply.code == "invalid_argument"
    assert "pod.explode" in reply.message


async def test_the_same_id_gets_the_stored_reply(tmp_path: Path) -> None:
    async with real_journal(tmp_path) as journal:
        world = World(journal=journal)
        headers = {wire.COMMAND_ID: "c-1"}
        first = await world.dispatcher.dispatch("pod.create", headers, CREATE)
        again = await world.dispatcher.dispatch("pod.create", headers, b' { "pod" : {"id":"p1"} } ')
    async with real_journal(tmp_path) as journal:  # and after a restart
        restarted = World(journal=journal)
        later = await restarted.dispatcher.dispatch("pod.create", headers, CREATE)
    assert again.body == later.body == first.body
    assert again.headers[wire.DUPLICATE] == later.headers[wire.DUPLICATE] == "true"
    assert wire.DUPLICATE not in first.headers
    assert world.pods.count("create") == 1
    assert restarted.pods.count("create") == 0


async def test_a_stored_error_is_replied_as_an_error_again(tmp_path: Path) -> None:
    async with real_journal(tmp_path) as journal:
        world = World(journal=journal)
        world.pods.errors["start"] = NotFoundError("There is no pod p1.", pod_id="p1")
        headers = {wire.COMMAND_ID: "c-1"}
        first = await world.dispatcher.dispatch("pod.start", headers, b'{"pod_id": "p1"}')
        again = await world.dispatcher.dispatch("pod.start", headers, b'{"pod_id": "p1"}')
    assert error_of(first) == error_of(again)
    assert again.headers[wire.SERVICE_ERROR] == "There is no pod p1."
    assert again.headers[wire.DUPLICATE] == "true"
    assert world.pods.count("start") == 1


@pytest.mark.parametrize(("verb", "body"), [("pod.create", b'{"pod": {"id": "p2"}}'), ("pod.run", CREATE)])
async def test_the_same_id_with_something_else_is_refused(tmp_path: Path, verb: str, body: bytes) -> None:
    async with real_journal(tmp_path) as journal:
        world = World(journal=journal)
        headers = {wire.COMMAND_ID: "c-1"}
        await world.dispatcher.dispatch("pod.create", headers, CREATE)
        reply = error_of(await world.dispatcher.dispatch(verb, headers, body))
    assert reply.code == "already_exists"
    assert len(world.pods.calls) == 1


async def test_a_duplicate_of_a_running_command_waits_for_its_reply(tasks: Tasks) -> None:
    world = World()
    gate = world.pods.gates["create"] = Gate()
    headers = {wire.COMMAND_ID: "c-1"}
    first = await begin(tasks, world.dispatcher, "pod.create", headers, CREATE)
    await gate.arrived.wait()
    second = await begin(tasks, world.dispatcher, "pod.create", headers, CREATE)
    other = await world.dispatcher.dispatch("pod.create", headers, b'{"pod": {"id": "p2"}}')
    assert not first.done()
    assert not second.done()
    gate.open()
    assert (await second).body == (await first).body
    assert (await second).headers[wire.DUPLICATE] == "true"
    assert error_of(other).code == "already_exists"
    assert world.pods.count("create") == 1


async def test_a_joined_command_whose_deadline_passes_leaves_the_first_alone(tasks: Tasks) -> None:
    world = World()
    gate = world.pods.gates["create"] = Gate()
    first = await begin(tasks, world.dispatcher, "pod.create", {wire.COMMAND_ID: "c-1"}, CREATE)
    await gate.arrived.wait()
    soon = (NOW + timedelta(milliseconds=20)).isoformat()
    second = await world.dispatcher.dispatch(
        "pod.create", {wire.COMMAND_ID: "c-1", wire.DEADLINE: soon}, CREATE
    )
    assert error_of(second).code == "deadline_exceeded"
    gate.open()
    assert (await first).ok


@pytest.mark.parametrize("error", [AbortedError("Busy."), ResourceExhaustedError("Full.")])
async def test_what_had_no_effect_may_be_tried_again_with_the_same_id(error: Exception) -> None:
    world = World()
    world.pods.errors["create"] = error
    headers = {wire.COMMAND_ID: "c-1"}
    reply = error_of(await world.dispatcher.dispatch("pod.create", headers, CREATE))
    assert reply.retryable
    world.pods.errors.clear()
    again = await world.dispatcher.dispatch("pod.create", headers, CREATE)
    assert again.ok
    assert wire.DUPLICATE not in again.headers


async def test_an_exec_that_was_given_up_is_not_run_again() -> None:
    world = World()
    world.pods.errors["exec"] = UnavailableError("The session was lost.")
    headers = {wire.COMMAND_ID: "c-1"}
    body = b'{"pod_id": "p1", "container_id": "c1", "cmd": {"args": ["reboot"]}}'
    reply = error_of(await world.dispatcher.dispatch("container.exec", headers, body))
    assert not reply.retryable
    again = await world.dispatcher.dispatch("container.exec", headers, body)
    assert again.headers[wire.DUPLICATE] == "true"
    assert world.pods.count("exec") == 1


async def test_an_unexpected_error_tells_the_caller_an_id_and_the_log_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.pods.errors["create"] = KeyError("secret-path")
    with caplog.at_level(logging.ERROR):
        outcome = await world.dispatcher.dispatch("pod.create", {}, CREATE)
    reply = error_of(outcome)
    assert reply.code == "internal"
    assert b"secret" not in outcome.body
    assert "secret" not in outcome.headers[wire.SERVICE_ERROR]
    [record] = [r for r in caplog.records if getattr(r, "error_id", None) == reply.error_id]
    assert "secret-path" in str(record.exc_info)


async def test_a_drivers_message_is_safe_and_reaches_the_caller() -> None:
    world = World()
    world.pods.errors["start"] = AgentError("The guest agent of pod p1 did not answer.")
    reply = error_of(await world.dispatcher.dispatch("pod.start", {}, b'{"pod_id": "p1"}'))
    assert (reply.code, reply.message) == ("internal", "The guest agent of pod p1 did not answer.")


async def test_details_that_are_not_json_do_not_break_the_reply() -> None:
    world = World()
    world.pods.errors["start"] = NotFoundError("No.", where=Path("/x"), when=NOW)
    reply = error_of(await world.dispatcher.dispatch("pod.start", {}, b'{"pod_id": "p1"}'))
    assert reply.details["where"] == "/x"


async def test_a_long_message_of_many_lines_is_one_short_header() -> None:
    world = World()
    world.pods.errors["start"] = NotFoundError("No\r\nsuch: thing " + "x" * 2000)
    outcome = await world.dispatcher.dispatch("pod.start", {}, b'{"pod_id": "p1"}')
    header = outcome.headers[wire.SERVICE_ERROR]
    assert header.startswith("No such: thing x")
    assert len(header) == 512


async def test_a_cancelled_command_is_undone_and_answered(tasks: Tasks) -> None:
    world = World()
    gate = world.pods.gates["create"] = Gate()
    future = await begin(tasks, world.dispatcher, "pod.create", {wire.COMMAND_ID: "c-1"}, CREATE)
    await gate.arrived.wait()
    await tasks.close()
    reply = error_of(await future)
    assert reply.code == "unavailable"
    assert reply.retryable
    assert world.pods.undone == ["create"]
    assert not world.journal.begun


async def test_a_command_cancelled_while_the_journal_writes_leaves_no_entry(tasks: Tasks) -> None:
    world = World()
    gate = world.journal.begin_gate = Gate()
    future = await begin(tasks, world.dispatcher, "pod.create", {wire.COMMAND_ID: "c-1"}, CREATE)
    await gate.arrived.wait()

    async def end() -> None:
        await tasks.close()

    closing = asyncio.ensure_future(end())
    await asyncio.sleep(0)
    gate.open()
    await closing
    assert error_of(await future).code == "unavailable"
    assert not world.journal.begun
    assert not world.pods.calls


async def test_a_journal_that_cannot_begin_stops_the_command() -> None:
    world = World()

    async def begin(command_id: str, verb: str, digest: str, audit: object) -> None:
        raise StorageError("The node's database failed; nothing was changed.")

    world.journal.begin = begin
    reply = error_of(await world.dispatcher.dispatch("pod.create", {}, CREATE))
    assert reply.code == "internal"
    assert not world.pods.calls


@pytest.fixture
def unkept(monkeypatch: pytest.MonkeyPatch, tasks: Tasks) -> World:
    """A world whose journal takes no last word, for now."""
    monkeypatch.setattr("vcnode.handlers.unkept.RETRY_FIRST_S", 0.001)
    monkeypatch.setattr("vcnode.handlers.unkept.RETRY_MAX_S", 0.001)
    world = World(tasks=tasks)
    world.journal.error = StorageError("The node's database failed; nothing was changed.")
    return world


async def test_a_reply_that_the_journal_does_not_take_is_given_and_kept_until_it_does(
    unkept: World, tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch, headers = unkept.dispatcher.dispatch, {wire.COMMAND_ID: "c-1"}
    first = await dispatch("pod.create", headers, CREATE)
    assert first.ok
    assert "c-1 could not be kept" in caplog.text
    again = await dispatch("pod.create", headers, CREATE)
    assert (again.body, again.headers[wire.DUPLICATE]) == (first.body, "true")
    other = error_of(await dispatch("pod.start", headers, b'{"pod_id": "p1"}'))
    assert other.code == "already_exists"
    unkept.journal.error = None
    assert await tasks.join(timeout_s=10)
    assert unkept.journal.stored["c-1"].body == first.body
    assert (await dispatch("pod.create", headers, CREATE)).headers[wire.DUPLICATE] == "true"
    assert unkept.pods.count("create") == 1


async def test_a_command_that_the_journal_does_not_forget_is_not_begun_again_before_it_has(
    unkept: World, tasks: Tasks
) -> None:
    dispatch, headers = unkept.dispatcher.dispatch, {wire.COMMAND_ID: "c-1"}
    unkept.pods.errors["create"] = UnavailableError("Not now.")
    assert error_of(await dispatch("pod.create", headers, CREATE)).message == "Not now."
    del unkept.pods.errors["create"]
    assert error_of(await dispatch("pod.create", headers, CREATE)).code == "unavailable"
    unkept.journal.error = None
    assert await tasks.join(timeout_s=10)
    assert (await dispatch("pod.create", headers, CREATE)).ok


async def test_a_command_that_the_journal_took_too_late_does_not_stand_there_for_ever(
    unkept: World, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcnode.handlers.dispatch.JOURNAL_TIMEOUT_S", 0.01)
    dispatch, headers = unkept.dispatcher.dispatch, {wire.COMMAND_ID: "c-1"}
    unkept.journal.begin_gate = Gate()
    assert error_of(await dispatch("pod.create", headers, CREATE)).code == "unavailable"
    unkept.journal.begun["c-1"] = ("pod.create", "written after all")
    unkept.journal.begin_gate = None
    assert error_of(await dispatch("pod.create", headers, CREATE)).code == "unavailable"
    unkept.journal.error = None
    assert await tasks.join(timeout_s=10)
    assert not unkept.journal.begun
    assert (await dispatch("pod.create", headers, CREATE)).ok
    assert unkept.pods.count("create") == 1


async def test_a_node_whose_journal_takes_nothing_begins_no_more_than_it_can_remember(
    unkept: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcnode.handlers.unkept.MAX_UNKEPT", 2)
    codes = [(await unkept.dispatcher.dispatch("pod.create", {}, CREATE)).code for _ in range(3)]
    assert codes == ["ok", "ok", "resource_exhausted"]


async def test_a_draining_node_refuses_changes_and_answers_reads() -> None:
    world = World()
    world.dispatcher.drain()
    reply = error_of(await world.dispatcher.dispatch("pod.create", {}, CREATE))
    assert (reply.code, reply.retryable) == ("unavailable", True)
    info = await world.dispatcher.dispatch("node.info", {}, b"")
    assert json.loads(info.body)["state"] == "draining"


async def test_lanes_are_bounded_each_on_its_own() -> None:
    dispatcher = World(max_concurrent=2).dispatcher
    slots = [dispatcher.take_slot("container.exec"), dispatcher.take_slot("pod.run")]
    with pytest.raises(ResourceExhaustedError) as caught:
        dispatcher.take_slot("pod.create")
    assert caught.value.details == {"limit": 2, "lane": "work"}
    for verb in ("pod.status", "node.ping", "pod.stop", "container.kill"):
        dispatcher.take_slot(verb).free()
    slots[0].free()
    slots[0].free()  # harmless
    dispatcher.take_slot("pod.create")
    with pytest.raises(ResourceExhaustedError):
        dispatcher.take_slot("pod.create")


async def test_a_refusal_carries_the_callers_id() -> None:
    world = World()
    error = ResourceExhaustedError("Full.")
    outcome = world.dispatcher.refuse("pod.create", {wire.COMMAND_ID: "c-9"}, error)
    assert error_of(outcome).code == "resource_exhausted"
    assert outcome.headers[wire.COMMAND_ID] == "c-9"
    made = world.dispatcher.refuse("pod.create", {wire.COMMAND_ID: "not good"}, error)
    assert made.headers[wire.COMMAND_ID].startswith("c-")


async def test_a_reply_too_large_to_send_becomes_an_error_that_says_so() -> None:
    world = World()
    outcome = await world.dispatcher.dispatch("pod.list", {wire.COMMAND_ID: "c-1"}, b"")
    replaced = oversized("pod.list", outcome, limit_bytes=3)
    reply = error_of(replaced)
    assert (reply.code, reply.retryable) == ("resource_exhausted", False)
    assert replaced.headers[wire.COMMAND_ID] == "c-1"
    assert len(replaced.body) < 1024


async def test_the_clock_of_the_node_is_named_with_a_passed_deadline() -> None:
    world = World(clock=lambda: datetime(2040, 1, 1, tzinfo=UTC))
    headers = {wire.DEADLINE: "2039-12-31T23:59:59Z"}
    reply = error_of(await world.dispatcher.dispatch("pod.create", headers, CREATE))
    assert reply.details["now"] == "2040-01-01T00:00:00+00:00"
