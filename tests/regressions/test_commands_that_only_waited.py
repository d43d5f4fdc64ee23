"""A durable command that only waited for its turn when the node agent ended was rejected as one that ends it.

Deliveries were counted before a command had one of the places in which commands run. After as many ends of
the agent as a command may cause, those behind a full house were refused although nothing had ever been done
for them; and so were commands that an orderly stop had undone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.handlers.fakes import NOW
from vcnode.bus import commands
from vcnode.bus.commands import MAX_DELIVERIES, MAX_RUNNING, DurableCommands
from vcnode.pods.received import Received
from vcnode.pods.store import Store

BEHIND = f"m{MAX_RUNNING}"


class Endless:
    """A dispatcher whose commands never end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.full = asyncio.Event()

    def take_slot(self, verb: str) -> Any:
        return SimpleNamespace(free=lambda: None)

    async def dispatch(self, verb: str, headers: dict[str, str], body: bytes, way: str) -> Any:
        self.begun.append(headers["name"])
        if len(self.begun) == MAX_RUNNING:
            self.full.set()
        await asyncio.Event().wait()


class Killed(Received):
    """As left behind by SIGKILL: nothing is taken back."""

    async def give_back(self, message: str) -> None:
        pass


async def one_life(received: Received) -> list[str]:
    """Let a node agent hold one command more than it runs at once, and end it; returns what was begun."""
    dispatcher: Any = Endless()
    connection: Any = SimpleNamespace(on_change=lambda tell: None)
    settings: Any = None
    queue = DurableCommands(
        connection, dispatcher, received, node_name="n1", subjects=settings, settings=settings
    )
    names = [f"m{number}" for number in range(MAX_RUNNING + 1)]
    held = [commands._Held(name, "pod.stop", {"name": name}, b"{}", "reply") for name in names]
    tasks = [asyncio.create_task(queue._finish(one)) for one in held]
    async with asyncio.timeout(20):
        await dispatcher.full.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return list(dispatcher.begun)


async def deliveries(store: Store) -> dict[str, int]:
    return {str(name): int(count) for name, count in await store.read(_counts)}


def _counts(connection: Any) -> list[tuple[str, int]]:
    return list(connection.execute("SELECT message, deliveries FROM received"))


@pytest.mark.parametrize("kind", [Killed, Received])
async def test_what_only_waited_is_not_counted(kind: type[Received], tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "node.db", node_name="n1", clock=lambda: NOW)
    received = kind(store, max_entries=100, max_age_s=9e5, mock=True)
    try:
        for _ in range(MAX_DELIVERIES):
            assert BEHIND not in await one_life(received)
        counted = await deliveries(store)
    finally:
        await store.close()
    assert counted.get(BEHIND, 0) == 0
    # What ran when the agent was killed has that against it; what an orderly stop has undone has not.
    assert counted["m0"] == (MAX_DELIVERIES if kind is Killed else 0)
