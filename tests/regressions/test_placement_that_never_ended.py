"""Each round of a placement doubled the time for which the next one waits for bids.

Nodes that are full for now answer at once, so there were some dozens of rounds within the patience; when the
last of the promised room was taken, and nodes had nothing more to say, the next round waited for hours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vcnode.client import fleet as fleets
from vcnode.client.fleet import BID_WAIT_S, Fleet
from vcnode.errors import ResourceExhaustedError
from vcnode.models.fleet import Bid
from vcnode.models.pod import PodSpec
from vcnode.models.subjects import Subjects

PATIENCE_S = 0.2


class FullFleet:
    """Stands for a connection to nodes whose room is promised to others; notes how long it may take."""

    def __init__(self) -> None:
        self.limits: list[float] = []

    @contextlib.contextmanager
    def poll(self, _body: bytes) -> Iterator[FullFleet]:
        yield self

    async def ask(self, _subjects: Sequence[str]) -> None:
        pass

    async def collect(self, *, timeout_s: float, **_: Any) -> list[Any]:
        self.limits.append(timeout_s)
        bid = Bid(node="n1", epoch=1, able=False, held_s=30.0)
        return [SimpleNamespace(data=bid.model_dump_json().encode(), headers=None)]


async def test_no_round_waits_for_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "ASK_AGAIN_S", (0.001, 0.002))
    full = FullFleet()
    fleet = Fleet(SimpleNamespace(_requester=full, _subjects=Subjects("vcnode")))  # type: ignore[arg-type]

    async def one() -> int:
        return 1

    monkeypatch.setattr(fleet, "_size", one)
    with pytest.raises(ResourceExhaustedError):
        await fleet.place(PodSpec(id="web"), patience_s=PATIENCE_S)
    assert len(full.limits) > 5  # or it proves nothing
    assert max(full.limits) == max(BID_WAIT_S, PATIENCE_S)
