"""Events from the outbox to a reader: in order, without gaps, through the loss of the server."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import StreamConfig

from tests.integration.nats_node import WAIT_S, NatsNode, running
from tests.support.nats import NatsServer
from tests.unit.handlers.fakes import NOW
from vcnode.client import Client, EventStream
from vcnode.errors import InvalidArgumentError, UnavailableError
from vcnode.models.events import Event, EventKind
from vcnode.pods.outbox import Outbox
from vcnode.pods.store import Tx

pytestmark = [pytest.mark.nats, pytest.mark.invented_events]

StartNats = Any


async def take(events: EventStream, count: int) -> list[Event]:
    found: list[Event] = []
    async with asyncio.timeout(WAIT_S):
        while len(found) < count:
            found.append(await anext(events))
    return found


def sequences(events: list[Event]) -> list[int]:
    return [int(event.sequence) for event in events]


async def everything(client: Client, **filters: Any) -> list[Event]:
    """What the stream holds now."""
    async with client.events(since="all", follow=False, **filters) as events:
        return [event async for event in events]


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    async with await Client.connect(nats_server.url) as connected:
        yield connected


async def test_events_are_cloudevents_on_their_subjects(nats_server: NatsServer, tmp_path: Path) -> None:
    watcher = await nats.connect(nats_server.url)
    sub = await watcher.subscribe("vcnode.evt.>")
    await watcher.flush()
    async with running(nats_server.url, tmp_path) as node:
        await node.emit(EventKind.POD_STARTED, "p1", state="running", reason=None)
        await node.emit(EventKind.CONTAINER_EXITED, "p1/c1", exit_code=3)
        await node.emit(EventKind.NODE_STARTED, "n1")
        await node.emit(EventKind.IMAGE_IMPORTED, "image/team/app:1.2")
        messages = [await sub.next_msg(timeout=WAIT_S) for _ in range(4)]
    assert [msg.subject for msg in messages] == [
        "vcnode.evt.n1.pod.started.p1",
        "vcnode.evt.n1.container.exited.p1.c1",
        "vcnode.evt.n1.node.started",
        "vcnode.evt.n1.image.imported",
    ]
    first = json.loads(messages[0].data)
    headers = messages[0].headers
    assert headers is not None
    assert headers["Content-Type"] == "application/cloudevents+json"
    assert first["specversion"] == "1.0"
    assert (first["type"], first["source"], first["id"]) == ("vcnode.pod.started", "/vcnode/n1", "n1-1")
    assert first["data"] == {"state": "running", "reason": None}
    assert "commandid" not in first  # CloudEvents knows no null attributes
    await watcher.close()


async def test_events_before_the_first_connection_arrive_in_order(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    await nats_server.kill()
    async with running(nats_server.url, tmp_path, wait=False) as node:
        await node.emit_many(150)  # more than one window
        await nats_server.start()
        await node.all_published()
    assert sequences(await everything(client)) == list(range(1, 151))


async def test_events_during_an_outage_arrive_once_and_in_order(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        async with client.events(since="all") as events:
            await node.emit()
            assert sequences(await take(events, 1)) == [1]
            for _ in range(3):
                down = node.connection.changed
                await nats_server.kill()
                await asyncio.wait_for(down.wait(), WAIT_S)
                for _ in range(5):
                    await node.emit()
                await nats_server.start()
                await node.emit()
                await node.connected()
            assert sequences(await take(events, 18)) == list(range(2, 20))
            assert events.missed == 0
        await node.all_published()
        assert sequences(await everything(client)) == list(range(1, 20))
        assert node.observer.states == [True, False, True, False, True, False, True]
        await client.node("n1").node_ping()


async def test_a_kill_under_load_loses_and_doubles_nothing(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        for round_ in range(3):
            await node.emit_many(100)
            await nats_server.kill()
            await node.emit_many(20 * round_)
            await nats_server.start()
        await node.all_published()
        total = node.store.sequence
    found = sequences(await everything(client))
    assert found == list(range(1, total + 1))


async def test_an_acknowledgement_that_was_lost_is_found_in_the_stream(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    """As after an outage longer than JetStream remembers message ids."""
    async with running(nats_server.url, tmp_path) as node:
        for _ in range(5):
            await node.emit()
        await node.all_published()

        def unmark(tx: Any) -> None:
            tx.execute("UPDATE outbox SET published_at = NULL WHERE sequence > 2")
            tx.unpublished_count = 3

        await node.store.write(unmark)
    published: list[int] = []
    async with running(nats_server.url, tmp_path, events=False) as node:
        await node.publisher.flush(timeout_s=WAIT_S)
        published.append(node.observer.published)
        assert not await Outbox(node.store, retention_s=1e6).unpublished(1)
    assert published == [0]
    assert sequences(await everything(client)) == [1, 2, 3, 4, 5]


async def test_what_an_older_copy_of_the_store_lacks_is_published_again(
    start_nats: StartNats, tmp_path: Path, short_dir: Path
) -> None:
    server = await start_nats(directory=short_dir / "old")
    store, copy = short_dir / "old" / "jetstream", short_dir / "copy"
    async with running(server.url, tmp_path) as node:
        for _ in range(3):
            await node.emit()
        await node.all_published()
        down = node.connection.changed
        await server.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)
        shutil.copytree(store, copy)
        await server.start()
        await node.connected()
        for _ in range(4):
            await node.emit()
        await node.all_published()
        down = node.connection.changed
        await server.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)
        shutil.rmtree(store)
        shutil.copytree(copy, store)
        await server.start()
        await node.emit()
        await node.connected()
        async with await Client.connect(server.url) as client, client.events(since="all") as events:
            found = await take(events, 8)
    assert sequences(found) == list(range(1, 9))
    assert {event.time for event in found} == {NOW}


async def test_events_that_are_kept_no_more_are_not_missed_by_those_that_are(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    admin = await nats.connect(nats_server.url)
    async with running(nats_server.url, tmp_path) as node:
        for _ in range(4):
            await node.emit()
        await node.all_published()
        await node.store.write(lambda tx: tx.execute("DELETE FROM outbox WHERE sequence < 4") and None)
        for lost in (3, 4):
            await admin.jetstream().delete_msg("vcnode-events", lost)
    await nats_server.kill()  # or it would still remember the ids of the events that it lost
    await nats_server.start()
    async with running(nats_server.url, tmp_path) as node:
        await node.emit()
        await node.all_published()
    assert sequences(await everything(client)) == [1, 2, 4, 5]
    await admin.close()


async def test_a_new_state_directory_goes_on_after_the_events_of_the_old_one(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    for attempt in ("first", "second"):
        async with running(nats_server.url, tmp_path / attempt) as node:
            time = NOW + timedelta(hours=1 if attempt == "second" else 0)
            await node.store.write(
                lambda tx, time=time: tx.emit(EventKind.POD_CREATED, "p1", {}, time=time)  # type: ignore[misc]
            )
            await node.all_published()
    assert [event.id for event in await everything(client)] == ["n1-1", "n1-2"]


async def test_an_older_copy_of_the_database_goes_on_after_what_the_stream_has_seen(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    """Three events are in the copy, one of them not yet published then; two more came after it."""

    async def emit(node: NatsNode, count: int, hours: int) -> None:
        for _ in range(count):
            await node.store.write(
                lambda tx: tx.emit(EventKind.POD_CREATED, "p1", {}, time=NOW + timedelta(hours=hours))
            )

    (tmp_path / "restored").mkdir()
    async with running(nats_server.url, tmp_path) as node:
        await emit(node, 2, hours=0)
        await node.all_published()
    async with running(nats_server.url, tmp_path, events=False) as node:
        await emit(node, 1, hours=1)
    shutil.copy(tmp_path / "n1.db", tmp_path / "restored")
    async with running(nats_server.url, tmp_path) as node:
        await emit(node, 2, hours=2)
        await node.all_published()

    async with running(nats_server.url, tmp_path / "restored") as node:
        await emit(node, 2, hours=3)
        await node.all_published()
        assert node.store.sequence == 7

    events = await everything(client)
    assert sequences(events) == [1, 2, 3, 4, 5, 6, 7]
    assert [(event.time - NOW).total_seconds() / 3600 for event in events] == [0, 0, 1, 2, 2, 3, 3]


async def test_without_jetstream_events_wait(start_nats: StartNats, tmp_path: Path) -> None:
    server = await start_nats(jetstream=False)
    async with running(server.url, tmp_path) as node, await Client.connect(server.url) as client:
        await node.emit()
        assert not await node.publisher.flush(timeout_s=WAIT_S)
        assert node.store.unpublished_count == 1
        await client.node("n1").node_ping()  # commands do not care
        async with client.events(since="all", follow=False) as events:
            assert events.live_only
            assert [event async for event in events] == []


async def test_a_stream_that_exists_is_not_changed(nats_server: NatsServer, tmp_path: Path) -> None:
    admin = await nats.connect(nats_server.url)
    js = admin.jetstream()
    await js.add_stream(name="vcnode-events", subjects=["vcnode.evt.>"], max_msgs=7, max_age=3600)
    before = (await js.stream_info("vcnode-events")).config
    async with running(nats_server.url, tmp_path) as node:
        await node.emit()
        await node.all_published()
    assert (await js.stream_info("vcnode-events")).config == before
    await admin.close()


async def test_a_stream_deleted_meanwhile_is_made_and_filled_again(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    admin = await nats.connect(nats_server.url)
    async with running(nats_server.url, tmp_path) as node:
        await node.emit()
        await node.all_published()
        await admin.jetstream().delete_stream("vcnode-events")
        await node.emit()
        await node.all_published()
    assert (await admin.jetstream().stream_info("vcnode-events")).state.messages == 2
    await admin.close()


async def test_an_event_too_large_for_nats_holds_nothing_up(start_nats: StartNats, tmp_path: Path) -> None:
    server = await start_nats(config="max_payload: 32768")
    async with running(server.url, tmp_path) as node, await Client.connect(server.url) as client:
        await node.emit(big="x" * 100_000)
        await node.emit(small=1)
        await node.all_published()
        big, small = await everything(client)
        assert big.data["oversized_bytes"] > 100_000
        assert small.data == {"small": 1}
        assert node.observer.states == [True]


async def test_published_events_are_counted(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path, events=False) as node:
        await node.emit_many(70)
        assert await node.publisher.flush(timeout_s=WAIT_S)
        assert node.observer.published == 70


async def fill(node: NatsNode) -> None:
    await node.emit(EventKind.POD_STARTED, "p1")
    await node.emit(EventKind.CONTAINER_STARTED, "p1/c1")
    await node.emit(EventKind.CONTAINER_EXITED, "p1/c1")
    await node.emit(EventKind.POD_STARTED, "p2")
    await node.emit(EventKind.POD_STOPPED, "p1")
    await node.emit(EventKind.NODE_STARTED, "n1")
    await node.all_published()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"node": "n1"}, [1, 2, 3, 4, 5, 6]),
        ({"node": "n2"}, []),
        ({"pods": ["p1"]}, [1, 2, 3, 5]),
        ({"pods": ["p1", "p2"], "kinds": ["pod.started"]}, [1, 4]),
        ({"kinds": ["pod.started", "node.started"]}, [1, 4, 6]),
        ({"kinds": ["pod.*", "pod.started"]}, [1, 4, 5]),
        ({"kinds": ["container.*"]}, [2, 3]),
        ({"pods": ["p1"], "kinds": ["container.exited", "pod.stopped"]}, [3, 5]),
    ],
)
async def test_readers_get_what_they_asked_for(
    nats_server: NatsServer, client: Client, tmp_path: Path, filters: dict[str, Any], expected: list[int]
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        await fill(node)
        assert sequences(await everything(client, **filters)) == expected


@pytest.mark.parametrize("filters", [{"kinds": ["pod.exploded"]}, {"pods": ["*"]}, {"node": "a.b"}])
async def test_a_filter_that_can_match_nothing_is_refused(client: Client, filters: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        client.events(**filters)


async def test_reading_goes_on_where_it_stopped(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        await fill(node)
        async with client.events(since="all") as events:
            assert sequences(await take(events, 2)) == [1, 2]
            position = events.position
        assert position is not None
        async with client.events(since=position + 1, follow=False) as events:
            assert sequences([event async for event in events]) == [3, 4, 5, 6]
        async with client.events(since="now") as events:
            await node.emit()
            assert sequences(await take(events, 1)) == [7]


async def test_a_slow_reader_misses_nothing(
    nats_server: NatsServer, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcnode.client.events.QUEUE_SIZE", 4)
    count = 400
    async with running(nats_server.url, tmp_path) as node, client.events(since="all") as events:
        await node.emit_many(count)
        await node.all_published()
        assert sequences(await take(events, count)) == list(range(1, count + 1))
        assert events.missed == 0


async def test_a_reader_that_came_before_the_stream_sees_it_live(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    async with client.events() as events:
        assert events.live_only
        async with running(nats_server.url, tmp_path) as node:
            await node.emit()
            assert sequences(await take(events, 1)) == [1]
            down = node.connection.changed
            await nats_server.kill()
            await asyncio.wait_for(down.wait(), WAIT_S)
            await node.emit()
            await nats_server.start()
            await node.emit()
            assert sequences(await take(events, 2)) == [2, 3]
        assert not events.live_only


async def test_junk_on_an_event_subject_is_skipped(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    other = await nats.connect(nats_server.url)
    async with running(nats_server.url, tmp_path) as node:
        await node.emit()
        await node.all_published()
        for junk in (b"", b"junk", b'{"sequence": "x"}', b"\xff"):
            await other.jetstream().publish("vcnode.evt.n1.pod.created.p1", junk)
        await node.emit()
        await node.all_published()
        assert sequences(await everything(client)) == [1, 2]
    await other.close()


async def test_a_reader_is_told_that_the_client_was_closed(nats_server: NatsServer, tmp_path: Path) -> None:
    client = await Client.connect(nats_server.url)
    async with running(nats_server.url, tmp_path), client.events() as events:
        await client.close()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(anext(events), WAIT_S)


async def test_gaps_are_counted(nats_server: NatsServer, client: Client, tmp_path: Path) -> None:
    admin = await nats.connect(nats_server.url)
    async with running(nats_server.url, tmp_path) as node:
        await fill(node)
        await admin.jetstream().delete_msg("vcnode-events", 3)
        await admin.jetstream().delete_msg("vcnode-events", 4)
        async with client.events(since="all", follow=False) as events:
            assert sequences([event async for event in events]) == [1, 2, 5, 6]
            assert events.missed == 2
    await admin.close()


async def test_an_hour_without_nats_is_made_up_for_though_it_has_forgotten_the_ids(
    nats_server: NatsServer, client: Client, tmp_path: Path
) -> None:
    """Two acknowledgements were lost with the server; it remembers ids for less than it is away."""
    window_s, count = 0.2, 500
    admin = await nats.connect(nats_server.url)
    config = StreamConfig(name="vcnode-events", subjects=["vcnode.evt.>"], duplicate_window=window_s)
    await admin.jetstream().add_stream(config)
    await admin.close()
    async with running(nats_server.url, tmp_path) as node:
        for _ in range(5):
            await node.emit()
        await node.all_published()
        down, began = node.connection.changed, asyncio.get_running_loop().time()
        await nats_server.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)

        def an_hour(tx: Tx) -> None:
            tx.execute("UPDATE outbox SET published_at = NULL WHERE sequence > 3")
            tx.unpublished_count += 2
            for number in range(count):
                time = NOW + timedelta(hours=1) * (number + 1) / count
                tx.emit(EventKind.POD_CREATED, "p1", {"number": number}, time=time)

        await node.store.write(an_hour)
        await asyncio.sleep(max(0.0, began + 2 * window_s - asyncio.get_running_loop().time()))
        await nats_server.start()
        await node.all_published()
    found = await everything(client)
    assert sequences(found) == list(range(1, 6 + count))
    assert [event.time for event in found[:5]] == [NOW] * 5
    assert found[5].time == NOW + timedelta(hours=1) / count
    assert found[-1].time == NOW + timedelta(hours=1)
