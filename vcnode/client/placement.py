"""Which nodes to ask, and which bid to take. Pure, but for the dice."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from vcnode.models.fleet import Bid
from vcnode.models.subjects import PARTS, SHARES

HOLD_S = 2.0
"""Seconds for which nodes that bid keep what the pod needs: the best is asked within milliseconds."""
ASKED = 12
"""Nodes that one round of bids is meant to reach; more would cost more and find little better."""


def rounds(fleet_size: int, dice: random.Random) -> Iterator[tuple[str, ...] | None]:
    """Shares of the fleet to ask, one round after the other; None is everybody.

    In a small fleet all are asked at once. In a large one so many shares that about `ASKED` nodes hear it,
    then four times as many others, and so on, and in the end all others: what one placement
    costs does not grow with the fleet, unless few nodes can take the pod. Where one share is more than twice
    `ASKED`, parts of shares are asked.

    Args:
        fleet_size: About how many nodes there are.
        dice: Picks the shares.
    """
    if fleet_size <= 2 * ASKED:
        yield None
        return
    order = [str(share) for share in range(SHARES)]
    if fleet_size > 2 * ASKED * SHARES:
        order = [f"{share}.{part}" for share in order for part in range(PARTS)]
    dice.shuffle(order)
    at, width = 0, max(1, round(ASKED * len(order) / fleet_size))
    while at + width < len(order):
        yield tuple(order[at : at + width])
        at, width = at + width, width * 4
    # Thousands of subjects cost more than to ask some nodes twice.
    yield tuple(order[at:]) if len(order) == SHARES else None


def best_first(bids: Iterable[Bid], dice: random.Random) -> Sequence[Bid]:
    """Bids of nodes that can, the best first; equals in any order, or all schedulers would pick the same."""
    able = [bid for bid in bids if bid.able]
    dice.shuffle(able)
    return sorted(able, key=lambda bid: -bid.score)
