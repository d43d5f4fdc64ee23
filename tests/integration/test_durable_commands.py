"""Commands through the work queue: once, in order, and never silently gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import RetentionPolicy

from tests.integration.nats_node import WAIT_S, NatsNode, running
from tests.support.nats import NatsServer
from tests.unit.handlers.fakes import NOW, Gate
from vcnode.bus import commands as bus_commands
from vcnode.client import Client, EventStream
from vcnode.errors import InvalidArgumentError, NotFoundError, UnavailableError
from vcnode.models.commands import PodList, PodName
from vcnode.models.events import Event
from vcnode.models.wire import COMMAND_ID, DEADLINE

pytestmark = pytest.mark.nats


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    async with await Client.connect(nats_server.url) as connected:
        yield connected


@pytest.fixture
async def raw(nats_server: NatsServer) -> AsyncIterator[Any]:
    connection = await nats.connect(nats_server.url)
    yield connection
    await connection.close()


async def send(raw: Any, verb: str, body: dict[str, Any] | bytes, **headers: str) -> None:
    """Put a command into the queue."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    await raw.jetstream().publish(f"vcnode.cmd.n1.{verb}", data, headers=named or None)


async def outcomes(client: Client, count: int) -> list[Event]:
    """The first *count* outcomes that the stream of events holds or will hold."""
    found: list[Event] = []
    async with asyncio.timeout(WAIT_S), client.events(since="all", kinds=["command.*"]) as events:
        await _take(events, found, count)
    return found


async def _take(events: EventStream, found: list[Event], count: int) -> None:
    while len(found) < count:
        found.append(await anext(events))


async def waiting(raw: Any) -> int:
    """How many commands the queue holds."""
    info = await raw.jetstream().stream_info("vcnode-commands")
    return int(info.state.messages)


async def emptied(raw: Any) -> None:
    """Wait until the queue is empty: acknowledgements are on their way when the outcome is told."""
    async with asyncio.timeout(WAIT_S):
        while await waiting(raw):  # noqa: ASYNC110 -- JetStream has no event for it
            await asyncio.sleep(0.01)


async def set_up(url: str, directory: Path) -> None:
    """Have streams made, by a node that goes away again."""
    async with running(url, directory, commands=True) as node:
        await node.emit()
        await node.all_published()
        admin = await nats.connect(url)
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await admin.jetstream().consumer_info("vcnode-commands", "n1")
                    break
                except nats.js.errors.NotFoundError:
                    await asyncio.sleep(0.01)
        await admin.close()


async def test_commands_sent_while_the_node_is_away_run_in_order_when_it_returns(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    await set_up(nats_server.url, tmp_path)
    await send(raw, "pod.create", {"pod": {"id": "p1"}}, Vcnode_Command_Id="a")
    await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="b")
    await send(raw, "pod.stop", {"pod_id": "p1"}, Vcnode_Command_Id="c")
    async with running(nats_server.url, tmp_path, commands=True) as node:
        done = await outcomes(client, 3)
        await emptied(raw)
        assert [name for name, _ in node.pods.calls] == ["create", "start", "stop"]
    assert [event.kind for event in done] == ["command.done"] * 3
    assert [event.commandid for event in done] == ["a", "b", "c"]
    assert [event.data["verb"] for event in done] == ["pod.create", "pod.start", "pod.stop"]
    assert done[1].data["reply"]["state"] == "running"
    assert done[0].subject == "command/a"
    assert not any(event.data["duplicate"] for event in done)
    info = await raw.jetstream().stream_info("vcnode-commands")
    assert info.config.retention == RetentionPolicy.WORK_QUEUE


async def test_a_command_id_is_carried_out_once_over_both_ways(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path, commands=True) as node:
        await client.node("n1").pod_start("p1", command_id="same")
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="same")
        (done,) = await outcomes(client, 1)
        assert (done.data["duplicate"], done.data["reply"]["state"]) == (True, "running")
        assert node.pods.count("start") == 1


async def set_up_done(raw: Any) -> None:
    """Wait until the queue exists."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await waiting(raw)
                return
            except nats.js.errors.NotFoundError:
                await asyncio.sleep(0.01)


async def test_what_can_never_be_carried_out_is_rejected_and_blocks_nothing(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    await set_up(nats_server.url, tmp_path)
    await send(raw, "pod.start", b"\xff junk")
    await send(raw, "pod.explode", {})
    await send(raw, "pod.start.now.please", {"pod_id": "p1"})
    await send(raw, "pod.list", {})
    await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="*")
    await send(raw, "pod.start", {"pod_id": "p1", "colour": "red"})
    await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="good")
    async with running(nats_server.url, tmp_path, commands=True) as node:
        found = await outcomes(client, 7)
        await emptied(raw)
        assert node.pods.count("start") == 1
    kinds = sorted(event.kind for event in found)
    assert kinds == ["command.done"] + ["command.rejected"] * 6
    rejected = [event for event in found if event.kind == "command.rejected"]
    assert {event.data["error"]["code"] for event in rejected} == {"invalid_argument"}


async def test_a_command_whose_deadline_passed_meanwhile_expires(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    await set_up(nats_server.url, tmp_path)
    late = {DEADLINE: (NOW - timedelta(seconds=1)).isoformat(), COMMAND_ID: "late"}
    await raw.jetstream().publish("vcnode.cmd.n1.pod.start", b'{"pod_id": "p1"}', headers=late)
    async with running(nats_server.url, tmp_path, commands=True) as node:
        (event,) = await outcomes(client, 1)
        assert (event.kind, event.commandid) == ("command.expired", "late")
        assert node.pods.calls == []


async def test_a_failure_is_an_outcome(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path, commands=True) as node:
        node.pods.errors["start"] = NotFoundError("There is no pod p1.")
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"})
        (event,) = await outcomes(client, 1)
    assert (event.kind, event.data["ok"], event.data["code"]) == ("command.done", False, "not_found")


async def test_a_failure_that_may_pass_is_tried_again(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_commands, "ATTEMPT_FIRST_S", 0.01)
    async with running(nats_server.url, tmp_path, commands=True) as node:
        node.pods.errors["start"] = UnavailableError("The driver is away.")
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"})
        (event,) = await outcomes(client, 1)
        assert node.pods.count("start") == bus_commands.MAX_ATTEMPTS
    assert (event.data["code"], event.data["ok"]) == ("unavailable", False)


async def test_commands_about_different_pods_do_not_wait_for_each_other(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path, commands=True) as node:
        gate = node.pods.gates["start"] = Gate()
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="slow")
        await send(raw, "pod.stop", {"pod_id": "p1"}, Vcnode_Command_Id="behind")
        await asyncio.wait_for(gate.arrived.wait(), WAIT_S)
        await send(raw, "pod.stop", {"pod_id": "p2"}, Vcnode_Command_Id="quick")
        assert [event.commandid for event in await outcomes(client, 1)] == ["quick"]
        gate.open()
        assert [event.commandid for event in await outcomes(client, 3)] == ["quick", "slow", "behind"]


async def test_a_command_that_takes_longer_than_an_acknowledgement_is_not_delivered_again(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_commands, "ACK_WAIT_S", 0.6)
    async with running(nats_server.url, tmp_path, commands=True) as node:
        gate = node.pods.gates["start"] = Gate()
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="slow")
        await asyncio.wait_for(gate.arrived.wait(), WAIT_S)
        await asyncio.sleep(2.0)  # it is time that would have it delivered again
        info = await raw.jetstream().consumer_info("vcnode-commands", "n1")
        assert (info.num_ack_pending, info.num_redelivered) == (1, 0)
        gate.open()
        (done,) = await outcomes(client, 1)
        assert done.data["deliveries"] == 1
        assert node.pods.count("start") == 1


async def test_a_command_in_progress_survives_the_loss_of_the_server(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    """JetStream delivers it again after the reconnect; it is recognised, and runs once."""
    async with running(nats_server.url, tmp_path, commands=True) as node:
        gate = node.pods.gates["start"] = Gate()
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="a")
        await asyncio.wait_for(gate.arrived.wait(), WAIT_S)
        down = node.connection.changed
        await nats_server.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)
        gate.open()
        await nats_server.start()
        await node.connected()
        (event,) = await outcomes(client, 1)
        await emptied(raw)
        assert (event.commandid, event.data["deliveries"]) == ("a", 1)
        assert node.pods.count("start") == 1
        await send(raw, "pod.stop", {"pod_id": "p1"}, Vcnode_Command_Id="b")
        assert [event.commandid for event in await outcomes(client, 2)] == ["a", "b"]


async def test_a_command_that_the_stopping_node_gives_up_runs_after_the_next_start(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path, commands=True) as node:
        gate = node.pods.gates["start"] = Gate()
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="a")
        await asyncio.wait_for(gate.arrived.wait(), WAIT_S)
        assert not await node.durable.drain(timeout_s=0)
        assert node.pods.undone == ["start"]
    async with running(nats_server.url, tmp_path, commands=True) as node:
        (event,) = await outcomes(client, 1)
        assert (event.data["ok"], event.data["deliveries"], event.data["duplicate"]) == (True, 1, False)
        assert node.pods.count("start") == 1


async def test_an_outcome_is_told_once_though_its_acknowledgement_was_lost(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_commands, "_ACK", bus_commands._IN_PROGRESS)  # an acknowledgement that is none
    async with running(nats_server.url, tmp_path, commands=True) as node:
        await set_up_done(raw)
        await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="a")
        await outcomes(client, 1)
        await node.all_published()
        assert await waiting(raw) == 1
    monkeypatch.undo()
    async with running(nats_server.url, tmp_path, commands=True) as node:
        await emptied(raw)
        assert node.pods.calls == []
        await send(raw, "pod.stop", {"pod_id": "p1"}, Vcnode_Command_Id="b")
        assert [event.commandid for event in await outcomes(client, 2)] == ["a", "b"]


async def test_a_command_that_takes_the_node_down_again_and_again_is_rejected(
    nats_server: NatsServer, client: Client, raw: Any, tmp_path: Path
) -> None:
    await set_up(nats_server.url, tmp_path)
    await send(raw, "pod.start", {"pod_id": "p1"}, Vcnode_Command_Id="poison")
    await send(raw, "pod.stop", {"pod_id": "p1"}, Vcnode_Command_Id="next")
    message = await raw.jetstream().get_msg("vcnode-commands", 1)
    async with running(nats_server.url, tmp_path) as node:
        await crash_with(node, bus_commands.MAX_DELIVERIES, message.seq, raw)
    async with running(nats_server.url, tmp_path, commands=True) as node:
        first, second = await outcomes(client, 2)
        assert node.pods.count("start") == 0
    assert (first.kind, first.commandid) == ("command.rejected", "poison")
    assert (second.kind, second.commandid) == ("command.done", "next")


async def crash_with(node: NatsNode, times: int, sequence: int, raw: Any) -> None:
    """Leave behind what a node leaves that received a message so often and ended each time before it did."""
    sub = await raw.jetstream().pull_subscribe_bind(consumer="n1", stream="vcnode-commands")
    (msg,) = await sub.fetch(1, timeout=WAIT_S)
    assert msg.metadata.sequence.stream == sequence
    name = bus_commands.name_of(msg)
    await node.store.write(
        lambda tx: (
            tx.execute("INSERT INTO received VALUES (?, ?, NULL, ?)", (name, times, NOW.timestamp())) and None
        )
    )


async def test_a_queue_that_exists_is_not_changed(nats_server: NatsServer, raw: Any, tmp_path: Path) -> None:
    js = raw.jetstream()
    await js.add_stream(
        name="vcnode-commands", subjects=["vcnode.cmd.>"], retention=RetentionPolicy.WORK_QUEUE, max_msgs=7
    )
    before = (await js.stream_info("vcnode-commands")).config
    await set_up(nats_server.url, tmp_path)
    assert (await js.stream_info("vcnode-commands")).config == before


async def test_the_client_puts_commands_into_the_queue(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    target = client.node("n1")
    with pytest.raises(UnavailableError) as caught:
        await target.enqueue("pod.start", PodName(pod_id="p1"), command_id="early")
    assert caught.value.details["command_id"] == "early"
    with pytest.raises(InvalidArgumentError):
        await target.enqueue("pod.list", PodList())
    await set_up(nats_server.url, tmp_path)
    command_id = await target.enqueue("pod.start", PodName(pod_id="p1"), deadline_s=1e9)
    async with running(nats_server.url, tmp_path, commands=True):
        (event,) = await outcomes(client, 1)
    assert (event.kind, event.commandid) == ("command.done", command_id)
