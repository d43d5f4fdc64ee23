"""Which nodes are asked, which bid is taken, and what becomes of replicas. Pure."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from tests.unit.handlers.fakes import pod_status
from vcnode.client.placement import ASKED, best_first, rounds
from vcnode.client.replicas import Copy, Delete, Place, Wait, decide, fence_of
from vcnode.errors import InvalidArgumentError
from vcnode.models.fleet import Bid
from vcnode.models.pod import OnDisconnect, PodSpec, PodState
from vcnode.models.subjects import PARTS, SHARES, shares_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_small_fleet_is_asked_at_once() -> None:
    assert list(rounds(3, random.Random(1))) == [None]


@pytest.mark.parametrize("size", [100, 1000, 5000, 100_000])
def test_a_large_fleet_is_asked_by_shares_that_do_not_repeat(size: int) -> None:
    asked = [shares for shares in rounds(size, random.Random(1)) if shares is not None]
    flat = [share for shares in asked for share in shares]
    assert len(set(flat)) == len(flat)
    whole = SHARES if size <= 5000 else SHARES * PARTS
    assert ASKED / 2 <= len(asked[0]) * size / whole <= 2 * ASKED  # however large the fleet
    # In the end everybody has been asked.
    assert (len(flat) == SHARES) == (size <= 5000)
    assert (list(rounds(size, random.Random(1)))[-1] is None) == (size > 5000)


def test_names_fall_into_all_shares() -> None:
    shares, parts = Counter[str](), Counter[str]()
    for number in range(100 * SHARES):
        share, part = shares_of(f"node-{number}")
        assert part.rpartition(".")[0] == share
        shares[share] += 1
        parts[part] += 1
    assert (len(shares), min(shares.values()) > 50, max(shares.values()) < 160) == (SHARES, True, True)
    # Of 25,600 names thrown into 8,192 parts, 1 - e^-3.125 of those get one: 95.6 %.
    assert len(parts) > 0.94 * SHARES * PARTS


def test_the_best_bid_comes_first_and_equals_are_mixed() -> None:
    bids = [Bid(node=f"n{i}", epoch=1, able=True, score=0.5 if i < 8 else 0.9) for i in range(9)]
    bids.append(Bid(node="no", epoch=1, able=False))
    orders = {tuple(bid.node for bid in best_first(bids, random.Random(seed))) for seed in range(20)}
    assert {order[0] for order in orders} == {"n8"}
    assert len({order[1] for order in orders}) > 3
    assert all("no" not in order for order in orders)


def copy(
    index: int, node: str, state: PodState = PodState.RUNNING, *, lost: float | None = None, age_s: float = 0
) -> Copy:
    status = pod_status(f"web-{index}", state=state)
    created_at = NOW - timedelta(seconds=age_s)
    return Copy(index, node, status.model_copy(update={"created_at": created_at}), lost)


HERE, OLD, DEAD = copy(0, "a"), copy(0, "b", age_s=60), copy(0, "c", PodState.FAILED)


@pytest.mark.parametrize(
    ("copies", "count", "fence_s", "expected"),
    [
        pytest.param([], 2, None, [Place(0), Place(1)], id="nothing runs"),
        pytest.param([HERE], 1, None, [], id="all is well"),
        pytest.param([HERE], 0, None, [Delete(HERE)], id="too many"),
        pytest.param([OLD, HERE], 1, None, [Delete(OLD)], id="two of one: the newer stays"),
        pytest.param([DEAD], 1, None, [Delete(DEAD), Place(0)], id="one has failed"),
        pytest.param([DEAD, HERE], 1, None, [Delete(DEAD)], id="one has failed and is replaced"),
        pytest.param([copy(0, "a", lost=1)], 1, None, [Place(0)], id="lost: replaced at once"),
        pytest.param([copy(0, "a", lost=1)], 1, 30.0, [Wait(0, 29.0)], id="lost: must have stopped first"),
        pytest.param([copy(0, "a", lost=31)], 1, 30.0, [Place(0)], id="lost long enough"),
        pytest.param([copy(0, "a", PodState.STOPPED, lost=1)], 1, 30.0, [Place(0)], id="had stopped before"),
        pytest.param([copy(0, "a", lost=1), HERE], 1, 30.0, [], id="lost and replaced"),
        pytest.param([copy(5, "a", lost=1)], 1, None, [Place(0)], id="what is out of reach is left alone"),
    ],
)
def test_what_replicas_need_next(
    copies: list[Copy], count: int, fence_s: float | None, expected: list[object]
) -> None:
    assert decide(copies, count, fence_s=fence_s) == expected


STOP, PAUSE = OnDisconnect(action="stop", after_s=60), OnDisconnect(action="pause", after_s=60)


@pytest.mark.parametrize(
    ("rule", "fence_s", "expected"),
    [
        (OnDisconnect(), None, None),
        (OnDisconnect(), 5.0, 5.0),
        (STOP, None, 100.0),
        (STOP, 100.0, 100.0),
        (STOP, 600.0, 600.0),
        (PAUSE, None, 90.0),
    ],
)
def test_a_fence_outlasts_what_on_disconnect_takes(
    rule: OnDisconnect, fence_s: float | None, expected: float | None
) -> None:
    assert fence_of(PodSpec(on_disconnect=rule), fence_s) == expected


@pytest.mark.parametrize(
    ("rule", "fence_s", "message"), [(STOP, 99.0, "at least 100"), (PAUSE, 600.0, "use 'stop'")]
)
def test_a_fence_that_would_not_hold_is_refused(rule: OnDisconnect, fence_s: float, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        fence_of(PodSpec(on_disconnect=rule), fence_s)
