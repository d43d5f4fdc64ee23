"""When a node counts as lost, and for how long, as the changes of the bucket tell it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from vcnode.client.bucket import Begin, Change, Gone, Heard, Put, Ready
from vcnode.client.requests import Requester
from vcnode.client.view import ELECTION_S, FleetView
from vcnode.models.node import Amount, NodeLease
from vcnode.models.subjects import Subjects

NOTHING = Amount(vcpu_count=0, mem_mib=0, pods=0)
LEASE_S = 30.0


class World:
    """A view whose clock and bucket are the test's."""

    def __init__(self) -> None:
        self.now = 1000.0
        # Nothing is asked: changes are given by hand.
        self.view = FleetView(cast(Requester, None), Subjects(), clock=lambda: self.now)
        self.kinds: list[str] = []
        self.view._listeners.add(lambda change: self.kinds.append(change.kind))

    def take(self, *changes: Change, after_s: float = 0.0) -> None:
        self.now += after_s
        for change in changes:
            self.view._on_node(change)

    def renew(self, node: str, *, after_s: float = 0.0) -> None:
        self.now += after_s
        self.take(self.lease(node))

    def lease(self, node: str) -> Put:
        lease = NodeLease(
            node=node,
            identity=node,
            epoch=1,
            version="0",
            state="ready",
            mock=True,
            host="h",
            pid=1,
            lease_s=LEASE_S,
            renewed_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now),
            capacity=NOTHING,
            allocatable=NOTHING,
            reserved=NOTHING,
            used=NOTHING,
        )
        return Put(node, lease.model_dump_json().encode())


@pytest.fixture
def world() -> World:
    made = World()
    made.take(Begin(), made.lease("a"), made.lease("b"), Ready())
    return made


def test_a_node_is_lost_when_the_server_is_heard_after_its_lease(world: World) -> None:
    world.renew("b", after_s=20)
    world.take(Heard(), after_s=9)
    assert world.view.gone_for_s("a") is None
    world.renew("b", after_s=2)
    assert world.kinds == ["node.joined", "node.joined", "node.changed", "node.changed", "node.lost"]
    assert (world.view.nodes["a"].alive, world.view.nodes["b"].alive) == (False, True)
    world.renew("b", after_s=5)
    assert world.view.gone_for_s("a") == 5
    world.renew("a")
    assert world.kinds[-1] == "node.joined"
    assert world.view.gone_for_s("a") is None


def test_who_hears_nothing_itself_loses_nobody(world: World) -> None:
    """The watcher was cut off for longer than any lease: that tells nothing about the nodes."""
    still = world.lease("a")
    world.take(Begin(), still, after_s=300)
    assert "node.lost" not in world.kinds
    world.take(Ready())
    assert "node.lost" not in world.kinds
    # From here on each has its whole time again; "b" uses it, "a" does not.
    world.renew("b", after_s=15)
    world.renew("b", after_s=14)
    assert "node.lost" not in world.kinds
    world.renew("b", after_s=2)
    assert world.kinds[-1] == "node.lost"
    assert not world.view.nodes["a"].alive


def test_nobody_is_lost_while_nobody_can_renew(world: World) -> None:
    """A server has died, the others elect: heartbeats come, and no write is taken."""
    world.take(Heard(), after_s=LEASE_S + ELECTION_S - 1)
    world.renew("a")  # it is over, and "b" is a moment later
    world.renew("b", after_s=1)
    assert "node.lost" not in world.kinds
    world.renew("a", after_s=15)
    world.renew("a", after_s=16)
    assert world.view.gone_for_s("b") == 0


def test_all_nodes_may_be_lost_at_once(world: World) -> None:
    world.take(Heard(), after_s=LEASE_S + ELECTION_S)
    assert world.kinds[-2:] == ["node.lost", "node.lost"]


def test_silence_does_not_count_as_time_that_a_node_is_gone(world: World) -> None:
    world.take(Heard(), after_s=LEASE_S + ELECTION_S)
    assert world.view.gone_for_s("a") == 0
    world.now += 500
    assert world.view.gone_for_s("a") == 0
    # It is back, and the snapshot that says so is still on its way.
    world.take(Begin())
    assert world.view.gone_for_s("a") == 0


def test_a_node_that_gave_its_lease_back_is_gone_from_then_on(world: World) -> None:
    world.take(Gone("a"), after_s=3)
    assert "a" not in world.view.nodes
    world.take(Heard(), after_s=4)
    assert world.view.gone_for_s("a") == 4


def test_a_node_that_was_never_seen_may_have_been_there_until_now(world: World) -> None:
    """Its lease has expired in the bucket, and its pods are still listed: when it went is not known."""
    assert world.view.gone_for_s("c") == 0
    world.take(Heard(), after_s=7)
    assert world.view.gone_for_s("c") == 7
    assert World().view.gone_for_s("c") == 0
