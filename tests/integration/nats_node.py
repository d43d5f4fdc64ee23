"""A node's NATS side without pods behind it: real server, real connection, real database, fake pods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.unit.handlers.fakes import NOW, World
from vcnode.aio import Tasks
from vcnode.bus.commands import DurableCommands
from vcnode.bus.connection import Connection
from vcnode.bus.events import EventPublisher
from vcnode.bus.service import CommandService
from vcnode.models.events import EventKind
from vcnode.models.subjects import Subjects
from vcnode.pods.journal import Journal
from vcnode.pods.outbox import Outbox
from vcnode.pods.received import Received
from vcnode.pods.store import Store, Tx
from vcnode.settings import NatsSettings

WAIT_S = 20.0
"""Longest wait for something that must happen."""


class Observer:
    """Notes what the bus reports."""

    def __init__(self) -> None:
        self.states: list[bool] = []
        self.published = 0

    def nats_connected(self, connected: bool) -> None:
        self.states.append(connected)

    def events_published(self, count: int) -> None:
        self.published += count


class NatsNode:
    """What `running` gives."""

    def __init__(
        self,
        world: World,
        store: Store,
        connection: Connection,
        service: CommandService,
        publisher: EventPublisher,
        observer: Observer,
        tasks: Tasks,
        subjects: Subjects,
        durable: DurableCommands,
    ) -> None:
        self.world = world
        self.pods = world.pods
        self.store = store
        self.connection = connection
        self.service = service
        self.publisher = publisher
        self.observer = observer
        self.tasks = tasks
        self.subjects = subjects
        self.durable = durable

    async def emit(self, kind: EventKind = EventKind.POD_CREATED, subject: str = "p1", **data: object) -> int:
        """Put an event into the outbox; returns its sequence."""
        event = await self.store.write(lambda tx: tx.emit(kind, subject, dict(data), time=NOW))
        return int(event.sequence)

    async def emit_many(self, count: int) -> None:
        """Put so many events into the outbox at once."""

        def emit(tx: Tx) -> None:
            for number in range(count):
                tx.emit(EventKind.POD_CREATED, "p1", {"number": number, "ballast": "x" * 200}, time=NOW)

        await self.store.write(emit)

    async def all_published(self) -> None:
        """Wait until the outbox is empty."""
        async with asyncio.timeout(WAIT_S):
            while self.store.unpublished_count:  # noqa: ASYNC110 -- the store tells when it fills, not when it is empty
                await asyncio.sleep(0.01)

    async def connected(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.connection.wait_connected()


@asynccontextmanager
async def running(
    settings: NatsSettings | str,
    directory: Path,
    *,
    name: str = "n1",
    max_concurrent: int = 64,
    wait: bool = True,
    events: bool = True,
    commands: bool = False,
) -> AsyncIterator[NatsNode]:
    """Run a node's NATS side on the server of *settings*, with its database in *directory*."""
    nats = NatsSettings(url=settings) if isinstance(settings, str) else settings
    subjects = Subjects(nats.prefix)
    observer = Observer()
    store = await Store.open(directory / f"{name}.db", node_name=name, clock=lambda: NOW)
    try:
        journal = Journal(store, max_entries=10_000, max_age_s=1e6, max_unpublished=10_000)
        world = World(journal=journal, max_concurrent=max_concurrent, max_request_bytes=2**20, node_name=name)
        async with Tasks() as tasks:
            connection = Connection(nats, name=f"vcnode-{name}", tasks=tasks, observer=observer)
            service = CommandService(connection, world.dispatcher, node_name=name, subjects=subjects)
            publisher = EventPublisher(
                connection,
                Outbox(store, retention_s=1e6),
                node_name=name,
                subjects=subjects,
                settings=nats,
                observer=observer,
            )
            durable = DurableCommands(
                connection,
                world.dispatcher,
                Received(store, max_entries=10_000, max_age_s=1e6, mock=True),
                node_name=name,
                subjects=subjects,
                settings=nats,
            )
            connection.start()
            if commands:
                tasks.spawn(durable.run(), name="durable-commands")
            if events:
                tasks.spawn(publisher.run(), name="events")
            node = NatsNode(world, store, connection, service, publisher, observer, tasks, subjects, durable)
            try:
                if wait:
                    await node.connected()
                yield node
            finally:
                await durable.close()
                await service.close()
                await connection.close()
    finally:
        await store.close()
