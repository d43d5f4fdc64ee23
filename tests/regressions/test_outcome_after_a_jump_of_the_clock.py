"""A jump of the host's clock made all that is kept old at once.

A durable command that ran meanwhile lost its receipt, and with it its outcome; a command that was sent again
ran twice; and events that JetStream had lost could not be published again.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vcnode.models.events import EventKind
from vcnode.pods import journal, outbox, received
from vcnode.pods.journal import Journal
from vcnode.pods.outbox import Outbox
from vcnode.pods.received import Received
from vcnode.pods.store import Store
from vcnode.pods.stored import Stored

pytestmark = pytest.mark.invented_events

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JUMP = timedelta(days=4000)
KEPT_S = 3600
OK = Stored(ok=True, body=b"{}")


class World:
    """A store whose clock can be set, and whose time passes when the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.now = NOW

    async def open(self) -> Store:
        return await Store.open(
            self.path / "node.db", node_name="n1", clock=lambda: self.now, ticks=lambda: self.seconds
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for module in (journal, outbox, received):
        monkeypatch.setattr(module, "PRUNE_EVERY", 1)
    return World(tmp_path)


async def test_a_command_that_runs_keeps_its_outcome_when_the_clock_jumps(world: World) -> None:
    store = await world.open()
    table = Received(store, max_entries=100, max_age_s=KEPT_S, mock=True)
    await table.receive("long")
    world.now += JUMP
    await table.receive("short")
    await table.conclude("short", EventKind.COMMAND_DONE, "c-short", {})
    assert (await table.receive("long")).deliveries == 2
    await table.conclude("long", EventKind.COMMAND_DONE, "c-long", {})
    await table.conclude("long", EventKind.COMMAND_DONE, "c-long", {})
    assert store.sequence == 2
    assert (await table.receive("long")).outcome == EventKind.COMMAND_DONE
    await store.close()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_command_sent_again_gets_its_reply_when_the_clock_has_jumped(
    world: World, restarted: bool
) -> None:
    store = await world.open()
    commands = Journal(store, max_entries=100, max_age_s=KEPT_S, max_unpublished=100)

    async def run(name: str) -> Stored | None:
        found = await commands.begin(name, "pod.create", "d")
        if found is None:
            await commands.finish(name, OK)
        return found

    assert await run("first") is None
    world.now += JUMP
    if restarted:
        await store.close()
        world.seconds = 7.0  # another boot
        store = await world.open()
        commands = Journal(store, max_entries=100, max_age_s=KEPT_S, max_unpublished=100)
        await commands.fail_unfinished()
    assert await run("second") is None
    assert await run("first") == OK
    world.seconds += KEPT_S + 1
    assert await run("third") is None  # what comes after prunes: now it is old
    assert await run("first") is None
    await store.close()


async def test_events_that_jetstream_lost_come_again_when_the_clock_has_jumped(world: World) -> None:
    store = await world.open()
    events = Outbox(store, retention_s=KEPT_S)
    for _ in range(2):
        await store.write(lambda tx: tx.emit(EventKind.NODE_STARTED, "node", {}, time=world.now))
    await events.mark_published(1)
    world.now += JUMP
    await events.mark_published(2)
    await events.prune()
    assert await events.rewind(0, within_s=60) == 2
    await events.mark_published(2)
    world.seconds += 61
    assert await events.rewind(0, within_s=60) == 0
    world.seconds += KEPT_S
    await events.prune()
    assert await events.oldest() == 3
    await store.close()


async def test_an_event_of_an_earlier_command_of_the_same_id_proves_nothing(world: World) -> None:
    """The journal forgets ids by count, and the outbox keeps their events longer."""
    store = await world.open()
    commands = Journal(store, max_entries=1, max_age_s=KEPT_S, max_unpublished=100)
    for name in ("again", "other"):
        assert await commands.begin(name, "pod.delete", "d") is None
        await store.write(
            lambda tx, name=name: tx.emit(  # type: ignore[misc]
                EventKind.POD_DELETED, "p1", {"existed": True}, time=world.now, command_id=name
            )
        )
        await commands.finish(name, OK)
    assert await commands.begin("again", "pod.delete", "d") is None
    await commands.fail_unfinished()
    found = await commands.begin("again", "pod.delete", "d")
    assert found is not None
    assert not found.ok
    await store.close()
