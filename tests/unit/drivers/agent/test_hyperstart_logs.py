"""What main processes have written, kept until somebody reads it."""

from __future__ import annotations

from vcnode.drivers.agent.hyperstart.logs import MAX_BATCH, MAX_KEPT_BYTES, MAX_RECORD_BYTES, Outputs
from vcnode.drivers.base import LogPosition, LogRecord


def taken(outputs: Outputs) -> list[LogRecord]:
    found: list[LogRecord] = []
    while batch := outputs.take():
        assert len(batch) <= MAX_BATCH
        found += batch
    return found


def test_long_output_is_cut_and_counted() -> None:
    outputs = Outputs()
    outputs.begin("c", 5, earlier=False)
    outputs.add("c", "stdout", bytes(MAX_RECORD_BYTES + 10))
    outputs.add("c", "stderr", b"e")
    outputs.end("c")
    assert [(r.kind, r.offset, len(r.data), r.instance) for r in taken(outputs)] == [
        ("stdout", 0, MAX_RECORD_BYTES, 5),
        ("stdout", MAX_RECORD_BYTES, 10, 5),
        ("stderr", MAX_RECORD_BYTES + 10, 1, 5),
        ("end", MAX_RECORD_BYTES + 11, 0, 5),
    ]
    assert outputs.take() == []


def test_what_nobody_reads_goes_oldest_first_and_leaves_a_gap() -> None:
    outputs = Outputs()
    outputs.begin("c", 5, earlier=False)
    for _ in range(100):
        outputs.add("c", "stdout", bytes(MAX_RECORD_BYTES))
    found = taken(outputs)
    assert sum(len(r.data) for r in found) <= MAX_KEPT_BYTES
    assert found[0].offset > 0
    assert found[-1].offset == 99 * MAX_RECORD_BYTES


def test_small_pieces_cost_more_than_their_bytes() -> None:
    outputs = Outputs()
    outputs.begin("c", 5, earlier=False)
    for _ in range(20_000):
        outputs.add("c", "stdout", b"x")
    assert len(taken(outputs)) < 10_000


def test_an_earlier_output_is_counted_on_once_and_no_other() -> None:
    outputs = Outputs()
    outputs.begin("old", 5, earlier=True)
    outputs.begin("new", 6, earlier=False)
    outputs.add("old", "stdout", b"abc")
    outputs.add("new", "stdout", b"abc")
    known = {"old": LogPosition(5, 40), "new": LogPosition(6, 40), "gone": LogPosition(7, 1)}
    outputs.resume(known)
    outputs.resume(known)
    outputs.add("old", "stdout", b"d")
    assert [(r.container_id, r.offset) for r in taken(outputs)] == [("old", 40), ("old", 43), ("new", 0)]


def test_of_a_deleted_container_nothing_more_is_kept() -> None:
    outputs = Outputs()
    outputs.begin("c", 5, earlier=False)
    outputs.add("c", "stdout", b"abc")
    outputs.forget("c")
    outputs.add("c", "stdout", b"late")
    assert [r.data for r in taken(outputs)] == [b"abc"]
