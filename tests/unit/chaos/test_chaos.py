"""The chaos run itself: its plan follows from the seed, and its ledger overlooks nothing."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from chaos import plan
from chaos.ledger import Answer, Ledger, answer, gaps
from chaos.proxy import Proxy

OK = Answer(True, "ok", "d1", 0)
REFUSED = Answer(False, "not_found", "d2")


def event(
    number: int, kind: str = "pod.created", command_id: str | None = None, **data: Any
) -> dict[str, Any]:
    return {"sequence": str(number), "type": f"vcnode.{kind}", "commandid": command_id, "data": data}


def done(number: int, command_id: str, code: str = "ok", **data: Any) -> dict[str, Any]:
    return event(number, "command.done", command_id, ok=code == "ok", code=code, **data)


def ledger(verb: str, *answers: Answer, durable: int = 0) -> Ledger:
    made = Ledger()
    entry = made.add("c-1", verb, "p0", "t1")
    entry.answers.extend(answers)
    entry.durable = durable
    return made


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan.make(7, 60, 3) == plan.make(7, 60, 3)
    assert plan.make(7, 60, 3) != plan.make(8, 60, 3)
    long = plan.make(1, 900, 3)
    assert {act.kind for act in long.acts} == set(plan.ACTS)
    assert {send.verb for send in long.sends} == set(plan.VERBS)
    assert {copy.way for send in long.sends for copy in send.copies} == {"rpc", "cmd"}


def test_all_is_well() -> None:
    assert ledger("container.exec", OK, OK).judge([event(1)], ["t1"]) == []
    events = [event(1, "pod.started", "c-1"), done(2, "c-1")]
    assert ledger("pod.run", OK, durable=1).judge(events, []) == []


def test_gaps_doubles_and_disorder_of_events_are_found() -> None:
    assert gaps([event(1), event(2)]) == []
    assert "missing: [2]" in gaps([event(1), event(3)])[0]
    assert "twice: [2]" in gaps([event(1), event(2), event(2)])[0]
    assert gaps([event(2), event(1)]) == ["events are not in order"]


def test_what_is_lost_is_found() -> None:
    assert "without its effect" in ledger("container.exec", OK).judge([], [])[0]
    assert "without pod.started" in ledger("pod.start", OK).judge([], [])[0]
    assert "1 durable copies have 0 outcomes" in ledger("pod.stop", durable=1).judge([], [])[0]
    silent = ledger("pod.stop")
    silent.entries["c-1"].given_up = 1
    assert "no outcome is known" in silent.judge([], [])[0]


def test_what_is_done_twice_is_found() -> None:
    assert "carried out 2 times" in ledger("container.exec", OK).judge([], ["t1", "t1"])[0]
    assert "of no command" in ledger("container.exec", OK).judge([], ["t1", "t9"])[0]
    twice = [event(1, "pod.started", "c-1"), event(2, "pod.started", "c-1")]
    assert "started its pod 2 times" in ledger("pod.run", OK).judge(twice, [])[0]
    assert (
        "durable copies have 2 outcomes"
        in ledger("pod.stop", durable=1).judge([done(1, "c-1"), done(2, "c-1")], [])[0]
    )


def test_answers_that_disagree_are_found() -> None:
    assert "in different ways" in ledger("pod.stop", OK, REFUSED).judge([], [])[0]
    assert "disagree" in ledger("pod.stop", OK, durable=1).judge([done(1, "c-1", "not_found")], [])[0]
    assert "has had its effect" in ledger("container.exec", REFUSED).judge([], ["t1"])[0]


def test_replies_are_read() -> None:
    assert answer({"exit_code": 3}, b"x").exit_code == 3
    error = {"code": "aborted", "message": "m", "retryable": True}
    assert (answer(error, b"x").ok, answer(error, b"x").code) == (False, "aborted")


async def test_the_proxy_forwards_until_it_is_cut() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy(server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert proxy.cut() == 1
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""
        writer.transport.abort()
