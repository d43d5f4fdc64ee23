"""Sequence numbers: what is missing, and what was seen before."""

from __future__ import annotations

from datetime import datetime, timedelta

from tests.unit.handlers.fakes import NOW
from vcnode.client.events import Sequences
from vcnode.models.events import Event


def event(sequence: int, *, node: str = "n1", time: datetime | None = None) -> Event:
    return Event(
        id=f"{node}-{sequence}",
        source=f"/vcnode/{node}",
        type="vcnode.pod.created",
        subject="p1",
        time=time or NOW + timedelta(seconds=sequence),
        sequence=str(sequence),
        epoch=1,
        data={},
    )


def test_consecutive_events_are_complete() -> None:
    seen = Sequences()
    assert [seen.note(event(n)) for n in (5, 6, 7)] == [0, 0, 0]


def test_missing_events_are_counted_per_node() -> None:
    seen = Sequences()
    assert [seen.note(event(1)), seen.note(event(9, node="n2")), seen.note(event(4))] == [0, 0, 2]
    assert seen.note(event(10, node="n2")) == 0


def test_events_seen_before_are_told() -> None:
    seen = Sequences()
    seen.note(event(1))
    seen.note(event(2))
    assert seen.note(event(1)) is None
    assert seen.note(event(2)) is None
    assert seen.note(event(3)) == 0


def test_a_node_that_began_anew_is_followed() -> None:
    seen = Sequences()
    seen.note(event(100))
    later = NOW + timedelta(days=1)
    assert seen.note(event(1, time=later)) == 0
    assert seen.note(event(2, time=later + timedelta(seconds=1))) == 0
