"""The node as a member of a fleet, on mock drivers: bids, standing, drain, all over restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.errors import FailedPreconditionError, ResourceExhaustedError, UnavailableError
from vcnode.models.events import EventKind
from vcnode.models.fleet import Constraints, NodeLabel, PodBid
from vcnode.models.pod import PodSpec, PodState, Resources
from vcnode.pods.fleet import FleetService
from vcnode.pods.standing import MAX_LABELS, Standing
from vcnode.settings import CapacitySettings

LABELS = {"zone": "a", "disk": "ssd"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await World(tmp_path, capacity=CapacitySettings(mem_mib=1512, vcpu_count=2)).start()
    yield made
    await made.close()


async def fleet_of(world: World, taints: tuple[str, ...] = ()) -> FleetService:
    standing = await Standing.open(world.store, labels=LABELS, taints=taints, mock=True)
    world.pods._takes_pods = standing.check_takes_pods
    return FleetService(pods=world.pods, standing=standing, clock=world.clock)


def ask(spec: PodSpec, *, explain: bool = True, hold_s: float = 0, **constraints: object) -> PodBid:
    return PodBid(pod=spec, constraints=Constraints(**constraints), explain=explain, hold_s=hold_s)  # type: ignore[arg-type]


async def test_a_node_that_can_bids_with_the_parts_of_its_score(world: World) -> None:
    fleet = await fleet_of(world)
    bid = fleet.bid(ask(pod("p1"), labels={"zone": "a"}))
    assert bid.able
    assert bid.score == pytest.approx(sum(bid.parts.values()), abs=1e-3)
    assert 0 < bid.score <= 1
    assert bid.predicted_start_ms
    assert bid.reservation is None
    await world.pods.create(pod("p2", resources=Resources(mem_size_mib=512)), world.call())
    assert fleet.bid(ask(pod("p1"))).score < bid.score


@pytest.mark.parametrize(
    ("constraints", "reason"),
    [
        ({"labels": {"zone": "b"}}, "Label zone is 'a', not 'b'."),
        ({"labels": {"rack": "1"}}, "Label rack is 'not set', not '1'."),
        ({"anti_affinity": {"app": "db"}}, "Pod p0 has the labels that the pod keeps away from."),
    ],
)
async def test_a_node_that_does_not_fit_says_why_when_asked(
    world: World, constraints: dict[str, object], reason: str
) -> None:
    fleet = await fleet_of(world)
    await world.pods.create(pod("p0", labels={"app": "db"}), world.call())
    bid = fleet.bid(ask(pod("p1"), **constraints))
    assert (bid.able, bid.reasons) == (False, (reason,))
    silent = fleet.bid(ask(pod("p1"), explain=False, **constraints))
    assert (silent.able, silent.reasons, silent.quiet) == (False, (), True)


async def test_every_obstacle_is_told(world: World) -> None:
    fleet = await fleet_of(world, taints=("gpu", "old"))
    await fleet.cordon("")
    big = pod("p1", [container(image="nowhere")], resources=Resources(mem_size_mib=4096))
    reasons = fleet.bid(ask(big, tolerations=("old",))).reasons
    assert [reason.split()[0] for reason in reasons] == ["The", "Taint", "There", "The"]
    assert "3144 short" in reasons[-1] or "short" in reasons[-1]


async def test_spreading_prefers_nodes_with_fewer_of_the_same(world: World) -> None:
    fleet = await fleet_of(world)
    wanted = pod("p1", labels={"app": "web"})
    before = fleet.bid(ask(wanted, spread_by="app")).parts["spread"]
    await world.pods.create(pod("p2", labels={"app": "web"}), world.call())
    await world.pods.create(pod("p3", labels={"app": "other"}), world.call())
    assert fleet.bid(ask(wanted, spread_by="app")).parts["spread"] == pytest.approx(before / 2)


async def test_a_reservation_is_used_once(world: World) -> None:
    fleet = await fleet_of(world)
    bid = fleet.bid(ask(pod("p1", resources=Resources(mem_size_mib=800)), hold_s=30))
    assert bid.reservation is not None
    assert not fleet.bid(ask(pod("p2", resources=Resources(mem_size_mib=800)))).able
    with pytest.raises(ResourceExhaustedError, match="short"):
        await world.pods.run(pod("p2", resources=Resources(mem_size_mib=800)), world.call())
    spec = pod("p1", resources=Resources(mem_size_mib=800))
    await world.pods.run(spec, world.call(), reservation=bid.reservation)
    with pytest.raises(FailedPreconditionError, match="was used"):
        await world.pods.create(pod("p3"), world.call(), reservation=bid.reservation)


async def test_what_pods_have_survives_a_restart_exactly(world: World) -> None:
    await world.pods.create(pod("p1", resources=Resources(mem_size_mib=800)), world.call())
    await world.restart()
    await world.pods.recover()
    with pytest.raises(ResourceExhaustedError):
        await world.pods.create(pod("p2", resources=Resources(mem_size_mib=800)), world.call())
    await world.pods.delete("p1", False, world.call())
    await world.pods.create(pod("p2", resources=Resources(mem_size_mib=800)), world.call())


async def test_labels_change_and_survive_a_restart(world: World) -> None:
    fleet = await fleet_of(world)
    standing = await fleet.label(NodeLabel(set={"rack": "7"}, remove=("disk",)))
    assert standing.labels == {"zone": "a", "rack": "7"}
    await world.restart()
    fleet = await fleet_of(world)
    assert fleet.standing().labels == {"zone": "a", "rack": "7"}
    await fleet.label(NodeLabel(set={"disk": "hdd"}))
    assert fleet.standing().labels["disk"] == "hdd"


async def test_labels_are_bounded_however_many_commands_set_them(world: World) -> None:
    """Each lease carries them: without a bound a node could be made too large to be heard of."""
    fleet = await fleet_of(world)
    await fleet.label(NodeLabel(set={f"a{n}": "x" for n in range(62)}))
    with pytest.raises(ResourceExhaustedError, match="would have 65 labels"):
        await fleet.label(NodeLabel(set={"b": "x"}))
    standing = await fleet.label(NodeLabel(set={"b": "x"}, remove=("a0",)))
    assert len(standing.labels) == MAX_LABELS
    for number in range(50):  # what is not there leaves no trace
        await fleet.label(NodeLabel(remove=tuple(f"none{number}-{n}" for n in range(64))))
    await fleet.label(NodeLabel(remove=("zone",)))
    assert fleet._standing._changes.removed == {"zone"}


async def test_a_cordoned_node_takes_no_pods_but_keeps_those_it_has(world: World) -> None:
    fleet = await fleet_of(world)
    await world.pods.create(pod("p1"), world.call())
    await fleet.cordon("new kernel")
    with pytest.raises(UnavailableError, match=r"is cordoned \(new kernel\)"):
        await world.pods.create(pod("p2"), world.call())
    await world.pods.start("p1", world.call())
    await world.restart()
    fleet = await fleet_of(world)
    assert fleet.standing().state == "cordoned"
    await fleet.uncordon()
    await world.pods.create(pod("p2"), world.call())


async def test_a_drain_stops_pods_in_the_order_of_their_priority(world: World) -> None:
    fleet = await fleet_of(world)
    for name, priority in (("mid", 0), ("last", 10), ("first", -10)):
        spec = pod(name, priority=priority, resources=Resources(mem_size_mib=128))
        await world.pods.run(spec, world.call())
    await world.pods.create(pod("idle", resources=Resources(mem_size_mib=128)), world.call())
    report = await fleet.drain(timeout_s=30, delete=False, reason="kernel", call=world.call())
    assert report.stopped == ("first", "last", "mid")
    assert fleet.standing().state == "cordoned"
    events = await world.events()
    stopped = [e.data["pod_id"] for e in events if e.kind == EventKind.POD_STOPPED]
    assert stopped == ["first", "mid", "last"]
    progress = [e.data for e in events if e.kind == EventKind.NODE_DRAINING]
    assert [(p["done"], p["total"]) for p in progress] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [e.data["stopped"] for e in events if e.kind == EventKind.NODE_DRAINED] == [
        ["first", "last", "mid"]
    ]
    states = {status.pod_id: status.state for status in world.pods.list({}, ()).pods}
    assert states["idle"] is PodState.READY


async def test_a_drain_may_delete(world: World) -> None:
    fleet = await fleet_of(world)
    await world.pods.run(pod("p1"), world.call())
    await world.pods.create(pod("p2"), world.call())
    await fleet.drain(timeout_s=30, delete=True, reason="", call=world.call())
    assert world.pods.list({}, ()).pods == ()
    with pytest.raises(UnavailableError):
        await world.pods.create(pod("p3"), world.call())


async def test_a_pod_that_cannot_be_stopped_does_not_keep_the_others(world: World) -> None:
    fleet = await fleet_of(world)
    await world.pods.run(pod("p1", resources=Resources(mem_size_mib=128)), world.call())
    await world.pods.run(pod("p2", resources=Resources(mem_size_mib=128)), world.call())
    async with world.pods._parts.locks.hold("p1", "container.create"):
        report = await fleet.drain(timeout_s=0, delete=False, reason="", call=world.call())
    assert report.failed == ("p1",)
    assert "p2" in (*report.stopped, *report.forced)
