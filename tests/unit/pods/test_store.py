"""The database: transactions, snapshots, and what goes wrong with disks."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import threading
from pathlib import Path

import pytest

from tests.unit.pods.world import Clock
from vcnode.errors import NotFoundError, ResourceExhaustedError, StorageError, UnavailableError
from vcnode.models.events import EventKind
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, HypervisorType, PodSpec, PodState, PodStatus
from vcnode.models.records import PodRecord
from vcnode.pods import salvage
from vcnode.pods import store as store_module
from vcnode.pods.journal import RESTARTED, Journal
from vcnode.pods.outbox import Outbox
from vcnode.pods.salvage import damaged_files
from vcnode.pods.statuses import pod_status
from vcnode.pods.store import Store, Tx
from vcnode.pods.stored import Stored

CLOCK = Clock()


async def open_store(path: Path, name: str = "n1") -> Store:
    return await Store.open(path / "state" / "node.db", node_name=name, clock=CLOCK)


def record(pod_id: str, **fields: object) -> PodRecord:
    return PodRecord(
        pod_id=pod_id,
        spec=PodSpec(id=pod_id),
        hypervisor_type=HypervisorType.MOCK,
        agent_type=AgentType.MOCK,
        network_model=NetworkModel.NOOP,
        state=PodState.READY,
        created_at=CLOCK(),
        **fields,  # type: ignore[arg-type]
    )


def emit(tx: Tx, name: str = "p") -> None:
    tx.emit(EventKind.POD_CREATED, name, {"x": 1}, time=CLOCK())


async def test_what_was_written_is_there_after_a_restart_in_the_order_of_creation(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    for name in ("b", "a", "c"):
        await store.write(lambda tx, name=name: tx.save_pod(record(name)))  # type: ignore[misc]
    changed = record("b", reason="é", revision=2)
    await store.write(lambda tx: tx.save_pod(changed))
    await store.write(lambda tx: tx.forget_pod("c"))
    before = dict(store.pods)
    await store.close()
    again = await open_store(tmp_path)
    assert list(again.pods) == ["b", "a"]
    assert dict(again.pods) == before
    assert again.pods["b"] == changed
    assert again.epoch == store.epoch + 1
    await again.close()


async def test_a_transaction_that_raises_changes_nothing_and_takes_no_other_down(tmp_path: Path) -> None:
    store = await open_store(tmp_path)

    def bad(tx: Tx) -> None:
        tx.save_pod(record("bad"))
        emit(tx)
        raise NotFoundError("No.")

    def good(name: str):
        def work(tx: Tx) -> str:
            tx.save_pod(record(name))
            emit(tx)
            return name

        return work

    # Together, so that they share one commit.
    results = await asyncio.gather(
        store.write(good("a")), store.write(bad), store.write(good("b")), return_exceptions=True
    )
    assert [type(r) for r in results] == [str, NotFoundError, str]
    assert list(store.pods) == ["a", "b"]
    assert store.sequence == store.unpublished_count == 2
    await store.close()


async def test_a_snapshot_does_not_change(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    snapshot = store.pods
    await store.write(lambda tx: tx.save_pod(record("a")))
    assert snapshot == {}
    assert list(store.pods) == ["a"]
    await store.close()


async def test_events_get_numbers_without_gaps_and_survive(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    outbox = Outbox(store, retention_s=1e9)
    await asyncio.gather(*(store.write(emit) for _ in range(50)))
    events = await outbox.unpublished(100)
    assert [e.sequence for e in events] == [str(n) for n in range(1, 51)]
    assert [e.id for e in events] == [f"n1-{n}" for n in range(1, 51)]
    assert {e.epoch for e in events} == {1}
    await store.close()
    store = await open_store(tmp_path)
    outbox = Outbox(store, retention_s=1e9)
    await store.write(emit)
    assert (outbox.last_sequence, outbox.unpublished_count) == (51, 51)
    (last,) = await outbox.since(50, 10)
    assert (last.sequence, last.epoch) == ("51", 2)
    await store.close()


async def test_a_cancelled_writer_waits_until_the_outcome_is_certain(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    gate = threading.Event()

    def slow(tx: Tx) -> None:
        gate.wait(10)
        tx.save_pod(record("a"))

    task = asyncio.ensure_future(store.write(slow))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(store.pods) == ["a"]
    await store.close()


async def test_a_disk_that_does_not_answer_is_an_error_and_what_comes_later_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)
    monkeypatch.setattr(store_module, "WRITE_LIMIT_S", 0.05)
    gate = threading.Event()

    def slow(tx: Tx) -> None:
        gate.wait(10)
        tx.save_pod(record("a"))

    with pytest.raises(StorageError, match="has not answered"):
        await store.write(slow)
    gate.set()
    monkeypatch.undo()
    await store.write(emit)
    assert list(store.pods) == ["a"]
    await store.close()


async def test_a_second_process_on_the_same_database_is_refused(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    with pytest.raises(StorageError, match="one node agent per state_dir"):
        await open_store(tmp_path)
    await store.write(emit)
    await store.close()


async def test_the_database_of_another_node_is_refused(tmp_path: Path) -> None:
    await (await open_store(tmp_path)).close()
    with pytest.raises(StorageError, match="belongs to node n1"):
        await open_store(tmp_path, "n2")
    await (await open_store(tmp_path)).close()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError) as caught:
        await open_store(tmp_path)
    assert caught.value.details == {"version": 99}


@pytest.mark.parametrize("damage", ["garbage", "torn", "record", "page"])
async def test_a_damaged_database_is_kept_aside_and_what_can_be_read_is_carried_over(
    tmp_path: Path, damage: str
) -> None:
    store = await open_store(tmp_path)
    identity = store.identity
    await store.write(lambda tx: [tx.save_pod(record(f"p{n}", reason="x" * 400)) for n in range(200)])
    await store.write(lambda tx: [emit(tx) for _ in range(5)])
    await store.close()
    raw = store.path.read_bytes()
    match damage:
        case "garbage":
            store.path.write_bytes(b"not a database" * 1000)
        case "torn":
            store.path.write_bytes(raw[: len(raw) // 2])
        case "page":
            store.path.write_bytes(raw[:8192] + b"\xff" * 4096 + raw[12288:])
        case "record":
            connection = sqlite3.connect(store.path)
            connection.execute("UPDATE pods SET record = '{}' WHERE pod_id = 'p7'")
            connection.commit()
            connection.close()
    damaged = store.path.read_bytes()

    store = await open_store(tmp_path)
    assert store.rebuilt is not None
    assert Path(store.rebuilt.kept_aside).read_bytes() == damaged
    assert damaged_files(store.path) == [Path(store.rebuilt.kept_aside)]
    assert (store.epoch, store.identity) == (2, identity)
    if damage == "record":
        assert (len(store.pods), store.sequence) == (199, 5)
        assert "p7" not in store.pods
    await store.write(lambda tx: tx.save_pod(record("new")))
    await store.close()
    store = await open_store(tmp_path)
    assert store.rebuilt is None
    assert "new" in store.pods
    await store.close()


async def test_a_rebuild_that_was_killed_is_finished_or_done_again(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.write(lambda tx: tx.save_pod(record("a")))
    await store.close()
    fresh = store.path.with_name("node.db.new")
    fresh.write_bytes(b"half of a database")  # killed while it was made
    store = await open_store(tmp_path)
    assert list(store.pods) == ["a"]
    assert not fresh.exists()
    await store.close()
    store.path.rename(fresh)  # killed when the damaged one had been moved away
    store = await open_store(tmp_path)
    assert list(store.pods) == ["a"]
    await store.close()


async def test_a_damaged_database_that_cannot_be_replaced_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store(tmp_path)
    await store.close()
    store.path.write_bytes(b"not a database" * 1000)

    def full(*args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(salvage, "_carry_over", full)
    with pytest.raises(StorageError):
        await open_store(tmp_path)
    assert store.path.read_bytes().startswith(b"not a database")
    assert damaged_files(store.path) == []


async def test_a_lost_database_changes_neither_who_the_node_is_nor_its_epochs(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.close()
    store = await open_store(tmp_path)
    identity = store.identity
    await store.close()
    store.path.unlink()
    store = await open_store(tmp_path)
    assert (store.epoch, store.identity) == (3, identity)
    await store.close()


async def test_events_that_wait_go_on_after_those_of_a_lost_database(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    outbox = Outbox(store, retention_s=1e9)
    for _ in range(3):
        await store.write(emit)
    (first, *_) = await outbox.unpublished(1)
    assert await outbox.continue_after(41, published={first.message_id}) == 2
    waiting = await outbox.unpublished(10)
    assert [(e.id, e.sequence) for e in waiting] == [("n1-42", "42"), ("n1-43", "43")]
    assert (store.unpublished_count, store.sequence) == (2, 43)
    await store.write(emit)
    assert store.sequence == 44
    assert await outbox.continue_after(41, published=()) == 0
    await store.close()


async def test_a_full_disk_refuses_and_changes_nothing_until_there_is_room(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.write(lambda tx: tx.save_pod(record("a")))
    (pages,) = await store.read(lambda c: c.execute("PRAGMA page_count").fetchone())
    await store.read(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    with pytest.raises(ResourceExhaustedError, match="full"):
        await store.write(lambda tx: tx.save_pod(record("b", reason="x" * 100_000)))
    assert list(store.pods) == ["a"]
    await store.read(lambda c: c.execute("PRAGMA max_page_count = 100000").fetchall())
    await store.write(lambda tx: tx.save_pod(record("b", reason="x" * 100_000)))
    assert list(store.pods) == ["a", "b"]
    await store.close()


async def test_a_state_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StorageError, match="cannot be made"):
        await open_store(tmp_path)


async def test_a_closed_store_is_unavailable_and_closing_again_is_harmless(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await store.close()
    await store.close()
    with pytest.raises(UnavailableError):
        await store.write(emit)
    with pytest.raises(UnavailableError):
        await store.read(lambda c: None)


# ---- outbox ------------------------------------------------------------------------------------------


async def test_waiting_for_an_event_ends_with_the_first_and_starts_again_when_all_are_published(
    tmp_path: Path,
) -> None:
    store = await open_store(tmp_path)
    outbox = Outbox(store, retention_s=1e9)
    waiting = asyncio.ensure_future(outbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    await store.write(emit)
    await waiting
    await store.write(emit)
    await outbox.mark_published(1)
    assert outbox.unpublished_count == 1
    await outbox.wait()
    await outbox.mark_published(2)
    await outbox.mark_published(2)
    assert outbox.unpublished_count == 0
    waiting = asyncio.ensure_future(outbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])
    await store.close()


async def test_unpublished_events_wait_for_ever_and_published_ones_for_the_retention(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    outbox = Outbox(store, retention_s=-1)
    for _ in range(3):
        await store.write(emit)
    await outbox.mark_published(2)
    await outbox.prune()
    assert [e.sequence for e in await outbox.since(0, 10)] == ["3"]
    assert [e.sequence for e in await outbox.unpublished(10)] == ["3"]
    await store.close()


# ---- journal -----------------------------------------------------------------------------------------


def journal_of(store: Store, **limits: float) -> Journal:
    bounds = {"max_entries": 100, "max_age_s": 1e9, "max_unpublished": 1000, **limits}
    return Journal(store, **bounds)  # type: ignore[arg-type]


async def test_a_command_seen_before_gets_its_reply_also_after_a_restart(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    journal = journal_of(store)
    ok = Stored(ok=True, body=b'{"a": "\xc3\xa9"}')
    bad = Stored(ok=False, body=b"{}", code="not_found", number=404)
    for name, reply in (("1", ok), ("2", bad)):
        assert await journal.begin(name, "pod.create", "d") is None
        await journal.finish(name, reply)
    await store.close()
    store = await open_store(tmp_path)
    journal = journal_of(store)
    assert await journal.begin("1", "pod.create", "d") == ok
    assert await journal.begin("2", "pod.create", "d") == bad
    await store.close()


@pytest.mark.parametrize(("verb", "digest"), [("pod.delete", "d"), ("pod.create", "other")])
async def test_a_command_id_is_for_one_command_only(tmp_path: Path, verb: str, digest: str) -> None:
    store = await open_store(tmp_path)
    journal = journal_of(store)
    await journal.begin("1", "pod.create", "d")
    with pytest.raises(Exception, match="was used for another pod"):
        await journal.begin("1", verb, digest)
    await store.close()


async def test_a_command_in_progress_is_aborted_and_a_forgotten_one_is_new(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    journal = journal_of(store)
    await journal.begin("1", "pod.create", "d")
    with pytest.raises(Exception, match="still in progress"):
        await journal.begin("1", "pod.create", "d")
    await journal.forget("1")
    assert await journal.begin("1", "pod.create", "d") is None
    await journal.finish("1", Stored(ok=True, body=b"1"))
    await journal.finish("1", Stored(ok=True, body=b"2"))
    await journal.forget("1")
    assert await journal.begin("1", "pod.create", "d") == Stored(ok=True, body=b"1")
    await store.close()


async def test_what_a_restart_interrupted_is_answered_as_failed(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    await journal_of(store).begin("1", "pod.run", "d")
    await store.close()
    store = await open_store(tmp_path)
    journal = journal_of(store)
    assert [e.command_id for e in await journal.unfinished()] == ["1"]
    assert [e.verb for e in await journal.fail_unfinished()] == ["pod.run"]
    assert await journal.unfinished() == []
    stored = await journal.begin("1", "pod.run", "d")
    assert stored is not None
    assert not stored.ok
    assert RESTARTED.encode() in stored.body
    await store.close()


async def test_what_a_restart_found_done_is_answered_as_done(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    status = pod_status(record("p1"), node="n1", mock=True).model_dump(mode="json")

    def deeds(tx: Tx) -> None:
        tx.save_pod(record("p1"))
        tx.emit(EventKind.POD_CREATED, "p1", status, time=CLOCK(), command_id="made")
        tx.emit(EventKind.POD_DELETED, "p2", {}, time=CLOCK(), command_id="gone")
        tx.emit(EventKind.POD_STARTING, "p1", status, time=CLOCK(), command_id="half")

    commands = {"made": "pod.create", "gone": "pod.delete", "half": "pod.start"}
    for command_id, verb in commands.items():
        await journal_of(store).begin(command_id, verb, "d")
    await store.write(deeds)
    journal = journal_of(store)
    await journal.fail_unfinished()
    made, gone, half = [await journal.begin(command_id, verb, "d") for command_id, verb in commands.items()]
    assert made is not None
    assert gone is not None
    assert half is not None
    assert (made.ok, PodStatus.model_validate_json(made.body).pod_id) == (True, "p1")
    assert (gone.ok, json.loads(gone.body)) == (True, {"pod_id": "p2", "existed": True})
    assert not half.ok
    details = json.loads(half.body)["details"]
    assert (details["events"], details["pods"]) == (["pod.starting"], {"p1": "ready"})
    await store.close()


async def test_with_too_many_unpublished_events_no_command_is_begun(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    journal = journal_of(store, max_unpublished=2)
    for _ in range(2):
        await store.write(emit)
    with pytest.raises(ResourceExhaustedError, match="JetStream"):
        await journal.begin("1", "pod.create", "d")
    await Outbox(store, retention_s=1).mark_published(1)
    assert await journal.begin("1", "pod.create", "d") is None
    await store.close()


@pytest.mark.parametrize(("limits", "kept"), [({"max_entries": 2}, ["3", "4"]), ({"max_age_s": -1e6}, [])])
async def test_the_journal_is_pruned_by_count_and_age_but_never_what_is_in_progress(
    tmp_path: Path, limits: dict[str, float], kept: list[str]
) -> None:
    store = await open_store(tmp_path)
    journal = journal_of(store, **limits)
    for name in "1234":
        await journal.begin(name, "pod.create", "d")
        await journal.finish(name, Stored(ok=True, body=b""))
    await journal.fail_unfinished()
    await journal.begin("5", "pod.create", "d")

    def ids(connection: sqlite3.Connection) -> list[str]:
        return [r[0] for r in connection.execute("SELECT command_id FROM journal ORDER BY rowid")]

    assert await store.read(ids) == [*kept, "5"]
    await store.close()


async def damaged_while_open(path: Path, *, overwrite: slice) -> Store:
    """A store whose file was overwritten below it, with nothing of it in the cache."""
    store = await open_store(path)
    await store.write(lambda tx: [tx.save_pod(record(f"p{n}", reason="x" * 400)) for n in range(200)])
    await store.write(lambda tx: [emit(tx) for _ in range(50)])
    # Not in memory any more: the next statement reads the file.
    await store.read(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    await store.read(lambda c: c.execute("PRAGMA shrink_memory").fetchall())
    content = bytearray(store.path.read_bytes())
    content[overwrite] = b"\xff" * len(content[overwrite])
    with store.path.open("r+b") as file:
        file.write(content)
    return store


@pytest.mark.parametrize("first", ["write", "read"])
@pytest.mark.parametrize("overwrite", [slice(None), slice(4096, None)], ids=["all", "all but the first page"])
async def test_damage_that_shows_while_the_node_runs_is_mended_and_loses_no_pod(
    tmp_path: Path, overwrite: slice, first: str
) -> None:
    store = await damaged_while_open(tmp_path, overwrite=overwrite)
    epoch, identity = store.epoch, store.identity
    meet = {
        "write": lambda: store.write(lambda tx: tx.save_pod(record("late"))),
        "read": lambda: store.read(lambda c: c.execute("SELECT count(record) FROM pods").fetchall()),
    }
    with pytest.raises(StorageError, match="nothing was changed; it is rebuilt"):
        await meet[first]()
    assert store.mended.is_set()
    assert store.rebuilt is not None
    assert list(store.pods) == [f"p{n}" for n in range(200)]
    assert (store.epoch, store.identity, store.sequence) == (epoch, identity, 50)
    await store.write(lambda tx: (tx.save_pod(record("late")), emit(tx)))
    await store.close()
    again = await open_store(tmp_path)
    assert again.rebuilt is None
    assert list(again.pods) == [*(f"p{n}" for n in range(200)), "late"]
    assert (again.epoch, again.identity, again.sequence) == (epoch + 1, identity, 51)
    await again.close()


async def test_a_rebuild_that_fails_is_tried_again_by_the_next_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await damaged_while_open(tmp_path, overwrite=slice(None))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(salvage, "_carry_over", full)
        with pytest.raises(StorageError, match="nothing was changed"):
            await store.write(lambda tx: tx.forget_pod("p0"))
        with pytest.raises(StorageError, match="cannot be rebuilt"):
            await store.write(lambda tx: tx.forget_pod("p0"))
        assert len(store.pods) == 200
        assert not store.mended.is_set()
    await store.write(lambda tx: tx.forget_pod("p0"))
    assert len(store.pods) == 199
    assert store.mended.is_set()
    await store.close()
