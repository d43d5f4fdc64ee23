"""A durable command whose receipt was pruned while it ran, by a clock that jumped ahead, had no outcome."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vcnode.models.events import EventKind
from vcnode.pods import received
from vcnode.pods.received import Received
from vcnode.pods.store import Store

pytestmark = pytest.mark.invented_events

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def test_a_command_that_runs_keeps_its_outcome_when_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received, "PRUNE_EVERY", 1)
    store = await Store.open(tmp_path / "node.db", node_name="n1", clock=lambda: NOW)
    table = Received(store, max_entries=100, max_age_s=3600, mock=True)
    await table.receive("long")
    store.clock = lambda: NOW + timedelta(days=1)
    await table.receive("short")
    await table.conclude("short", EventKind.COMMAND_DONE, "c-short", {})
    await table.conclude("long", EventKind.COMMAND_DONE, "c-long", {})
    await table.conclude("long", EventKind.COMMAND_DONE, "c-long", {})
    assert store.sequence == 2
    assert (await table.receive("long")).outcome == EventKind.COMMAND_DONE
    await store.close()
