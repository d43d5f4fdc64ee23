"""A rebuilt database had forgotten that its node was cordoned, and its labels."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.unit.pods.world import Clock
from vcnode.pods.standing import Standing
from vcnode.pods.store import Store

CLOCK = Clock()


async def open_both(path: Path) -> tuple[Store, Standing]:
    store = await Store.open(path / "node.db", node_name="n1", clock=CLOCK)
    return store, await Standing.open(store, labels={}, taints=(), mock=True)


async def test_a_rebuild_at_start_keeps_labels_and_cordon(tmp_path: Path) -> None:
    store, standing = await open_both(tmp_path)
    await standing.cordon("a reason")
    await standing.label({"zone": "a"}, ())
    await store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute(
            "INSERT INTO pods (pod_id, state, revision, record) VALUES ('p', 'ready', 1, '{}')"
        )
    connection.close()
    store, standing = await open_both(tmp_path)
    assert store.rebuilt is not None
    assert (standing.status().state, standing.status().labels) == ("cordoned", {"zone": "a"})
    await store.close()


async def test_what_a_rebuild_could_not_read_is_kept_again_by_who_knows_it(tmp_path: Path) -> None:
    store, standing = await open_both(tmp_path)
    await standing.cordon("a reason")
    await store.write(lambda tx: tx.execute("DELETE FROM meta WHERE key = 'standing'").rowcount)
    await standing.keep()
    await store.close()
    store, standing = await open_both(tmp_path)
    assert standing.status().state == "cordoned"
    await store.close()
