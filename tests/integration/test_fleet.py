"""Several nodes (mock drivers) on one NATS server, driven by the SDK's fleet and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.conftest import mock_settings
from tests.support.cli import vcnode
from tests.support.nats import NatsServer
from vcnode.client import Client, Fleet
from vcnode.client.replicas import LABEL
from vcnode.errors import ResourceExhaustedError
from vcnode.models import pod as pod_models
from vcnode.models.call import Call
from vcnode.models.fleet import Bid, Constraints
from vcnode.models.pod import Cmd, ContainerSpec, OnDisconnect, PodSpec, PodState, PodStatus, Resources
from vcnode.node import Node, running
from vcnode.settings import CapacitySettings, NatsSettings, Settings

pytestmark = pytest.mark.nats

WAIT_S = 45.0
LEASE_S = 4.0
ZONES = {"n1": "a", "n2": "a", "n3": "b"}


class Nodes:
    """Node agents that can be stopped and cut off one by one."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self._stacks: dict[str, contextlib.AsyncExitStack] = {}
        self.nodes: dict[str, Node] = {}

    def settings(self, name: str) -> Settings:
        return mock_settings(self.directory / name, self.url, node_name=name).model_copy(
            update={
                "nats": NatsSettings(url=self.url, lease_s=LEASE_S),
                "labels": {"zone": ZONES[name]},
                "capacity": CapacitySettings(mem_mib=1512, vcpu_count=4),
            }
        )

    async def start(self, name: str) -> Node:
        stack = self._stacks[name] = contextlib.AsyncExitStack()
        node = self.nodes[name] = await stack.enter_async_context(running(self.settings(name)))
        async with asyncio.timeout(WAIT_S):
            await node.connection.wait_connected()
        return node

    async def stop(self, name: str) -> None:
        await self._stacks.pop(name).aclose()

    async def close(self) -> None:
        for name in list(self._stacks):
            await self.stop(name)


@pytest.fixture
async def nodes(nats_server: NatsServer, short_dir: Path) -> AsyncIterator[Nodes]:
    made = Nodes(short_dir, nats_server.url)
    for name in ZONES:
        await made.start(name)
    yield made
    await made.close()


@pytest.fixture
async def fleet(nodes: Nodes) -> AsyncIterator[Fleet]:
    async with await Client.connect(NatsSettings(url=nodes.url)) as client, Fleet(client) as fleet:
        for name, node in nodes.nodes.items():
            await client.node(name).image_import("busybox", str(node.settings.allowed_roots[0]))
        yield fleet


def spec(pod_id: str | None = None, mem: int = 256, **fields: object) -> PodSpec:
    container = ContainerSpec(id="main", image="busybox", cmd=Cmd(args=("sleep", "600")))
    return PodSpec(id=pod_id, resources=Resources(mem_size_mib=mem), containers=(container,), **fields)  # type: ignore[arg-type]


async def until(fleet: Fleet, condition: Callable[[], bool]) -> None:
    """Wait for the view to show something; looked at after each change."""
    async with asyncio.timeout(WAIT_S):
        async for _ in fleet.watch():
            if condition():
                return


async def test_pods_are_placed_where_they_fit_best(fleet: Fleet) -> None:
    placed = await fleet.place(spec("web"), Constraints(labels={"zone": "b"}))
    assert (placed.node, placed.pod.state) == ("n3", PodState.RUNNING)
    # Equal otherwise: the emptier nodes bid better.
    others = {(await fleet.place(spec(f"p{i}"))).node for i in range(2)}
    assert others == {"n1", "n2"}
    await until(fleet, lambda: ("n3", "web") in fleet.pods)


async def test_a_full_fleet_says_so_and_every_node_says_why(fleet: Fleet) -> None:
    for number in range(3):
        await fleet.place(spec(f"big{number}", mem=800))
    with pytest.raises(ResourceExhaustedError, match="No node can take pod big3"):
        await fleet.place(spec("big3", mem=800))
    bids = await fleet.bids(spec("big3", mem=800), explain=True)
    assert [bid.node for bid in bids] == ["n1", "n2", "n3"]
    assert all("600 short" in bid.reasons[0] for bid in bids)


async def test_many_placements_at_once_never_overbook(fleet: Fleet) -> None:
    async def place(number: int) -> str | None:
        try:
            return (await fleet.place(spec(f"p{number}", mem=500))).node
        except ResourceExhaustedError:
            return None

    found = await asyncio.gather(*(place(number) for number in range(10)))
    taken = {name: found.count(name) for name in ZONES}
    assert all(count <= 2 for count in taken.values())
    assert found.count(None) == 10 - sum(taken.values())
    # What bids had promised and nobody took is free again: the fleet can be filled.
    for number in range(10, 16 - sum(taken.values())):
        await fleet.place(spec(f"p{number}", mem=500))


async def test_two_schedulers_do_not_share_the_last_room(fleet: Fleet, nodes: Nodes) -> None:
    async with await Client.connect(nodes.url) as client, Fleet(client) as other:
        there = Constraints(labels={"zone": "b"})
        placed = await asyncio.gather(
            *(one.place(spec(name, mem=800), there) for name, one in (("a", fleet), ("b", other))),
            return_exceptions=True,
        )
    assert sorted(type(one).__name__ for one in placed) == ["Placement", "ResourceExhaustedError"]
    assert len(nodes.nodes["n3"].pods.records) == 1


async def test_a_node_that_restarts_between_bid_and_run_is_asked_again(
    fleet: Fleet, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same name, new epoch: a restart breaks the promise, and nothing runs twice or nowhere."""
    run_on, restarts = fleet._run_on, iter([True])

    async def after_restart(spec: PodSpec, bid: Bid, deadline_s: float | None) -> PodStatus:
        if next(restarts, False):
            await nodes.stop("n3")
            await nodes.start("n3")
        return await run_on(spec, bid, deadline_s)

    monkeypatch.setattr(fleet, "_run_on", after_restart)
    placed = await fleet.place(spec("web"), Constraints(labels={"zone": "b"}), patience_s=WAIT_S)
    assert (placed.node, placed.bid.epoch) == ("n3", 2)
    assert [record.pod_id for record in nodes.nodes["n3"].pods.records] == ["web"]


async def test_a_watcher_misses_nothing_of_what_was_while_the_server_was_away(
    fleet: Fleet, nodes: Nodes, nats_server: NatsServer
) -> None:
    n1 = nodes.nodes["n1"]
    await n1.pods.create(spec("old"), Call("old", "pod.create"))
    await until(fleet, lambda: ("n1", "old") in fleet.pods)
    told: list[tuple[str, str | None]] = []
    with fleet._entered.listening(lambda change: told.append((change.kind, change.pod_id))):
        await nats_server.kill()
        await n1.pods.delete("old", False, Call("gone", "pod.delete"))
        await n1.pods.create(spec("new"), Call("new", "pod.create"))
        await nats_server.start()
        await until(fleet, lambda: set(fleet.pods) == {("n1", "new")})
    pods = [change for change in told if change[0].startswith("pod.")]
    assert sorted(set(pods)) == [("pod.changed", "new"), ("pod.gone", "old")]
    assert "node.lost" not in {kind for kind, _ in told}


async def test_a_reservation_that_expired_on_the_way_is_asked_for_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler or a node that is slow is no reason to say that there is no room."""
    monkeypatch.setattr("vcnode.client.fleet.HOLD_S", 0.2)
    run_on, delays = fleet._run_on, iter([0.3])

    async def slow(spec: PodSpec, bid: Bid, deadline_s: float | None) -> PodStatus:
        await asyncio.sleep(next(delays, 0))
        return await run_on(spec, bid, deadline_s)

    monkeypatch.setattr(fleet, "_run_on", slow)
    placed = await fleet.place(spec("web"), patience_s=WAIT_S)
    assert placed.refused == {}
    assert placed.pod.state is PodState.RUNNING


async def test_a_node_that_stops_leaves_and_one_that_dies_is_lost(fleet: Fleet, nodes: Nodes) -> None:
    kinds: list[tuple[str, str]] = []
    seen = asyncio.Event()

    async def follow() -> None:
        async for change in fleet.watch():
            if change.kind.startswith("node.") and change.kind != "node.changed":
                kinds.append((change.kind, change.node))
                seen.set()

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(WAIT_S):
        task = tasks.create_task(follow())
        await nodes.stop("n2")
        while ("node.left", "n2") not in kinds:
            await seen.wait()
            seen.clear()
        # Cut off, not stopped: nothing is said any more, and the lease runs out.
        await nodes.nodes["n3"].connection.close()
        while ("node.lost", "n3") not in kinds:
            await seen.wait()
            seen.clear()
        task.cancel()
    assert not fleet.nodes["n3"].alive
    assert "n2" not in fleet.nodes


async def test_replicas_are_spread_replaced_and_removed(fleet: Fleet, nodes: Nodes) -> None:
    def running_on() -> dict[str, str]:
        return {
            pod_id: node
            for (node, pod_id), status in fleet.pods.items()
            if status.state is PodState.RUNNING and node in fleet.nodes and fleet.nodes[node].alive
        }

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(fleet.run_replicas("web", spec(), 3))
        await until(fleet, lambda: len(running_on()) == 3)
        assert set(running_on().values()) == set(ZONES)
        assert fleet.pods["n1", next(p for p, n in running_on().items() if n == "n1")].labels[LABEL] == "web"

        victim = running_on()
        await nodes.nodes["n3"].connection.close()
        await until(fleet, lambda: not fleet.nodes["n3"].alive)
        await until(fleet, lambda: set(running_on()) == {"web-0", "web-1", "web-2"})
        assert set(running_on().values()) == {"n1", "n2"}
        assert set(victim) == set(running_on())
        keeping.cancel()
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(fleet.run_replicas("web", spec(), 0))
        await until(fleet, lambda: not running_on())
        keeping.cancel()


async def test_a_copy_that_must_be_one_waits_for_its_fence(
    fleet: Fleet, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is replaced only when its own node, which was cut off and lives on, has stopped it."""
    monkeypatch.setattr(pod_models, "DISCONNECT_MARGIN_S", 1.0)  # mock pods end at once
    main = spec().containers[0].model_copy(update={"stop_timeout_s": 0.0})
    rule = OnDisconnect(action="stop", after_s=LEASE_S + 2)  # seconds after it is lost
    one = PodSpec(containers=(main,), on_disconnect=rule)
    fence_s = one.ends_after_s
    assert fence_s is not None
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(fleet.run_replicas("one", one, 1))
        await until(fleet, lambda: bool(fleet.pods))
        [(first, _)] = fleet.pods
        cut_off = nodes.nodes[first]
        await cut_off.connection.close()
        await until(fleet, lambda: not fleet.nodes[first].alive)
        lost_at = fleet.nodes[first].lost_at
        assert lost_at is not None
        await until(fleet, lambda: len(fleet.pods) == 2)
        assert loop.time() - lost_at >= fence_s
        stopped = cut_off.pods.status("one-0")
        [second] = [status for (node, _), status in fleet.pods.items() if node != first]
        assert stopped.state is PodState.STOPPED
        assert stopped.finished_at is not None
        assert stopped.finished_at < second.created_at  # one clock: it is one host
        keeping.cancel()


async def test_the_command_line_places_lists_and_drains(
    fleet: Fleet, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("VCNODE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VCNODE_NATS_URL", nodes.url)
    placed = await vcnode(
        "place", "--id", "web", "--image", "busybox", "--require", "zone=b", "--", "sleep", "60"
    )
    assert (placed.code, placed.err) == (0, "")
    assert "n3" in placed.out
    await until(fleet, lambda: fleet.nodes["n3"].lease.reserved.pods == 1)
    listed = await vcnode("nodes")
    assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [
        ["n1", "ready", "0/500"],
        ["n2", "ready", "0/500"],
        ["n3", "ready", "1/500"],
    ]
    assert "web" in (await vcnode("pods")).out
    labelled = await vcnode("node", "label", "rack=7", "zone-", "--node", "n1", "-o", "json")
    assert labelled.json["labels"] == {"rack": "7"}
    assert (await vcnode("node", "cordon", "--node", "n1", "--reason", "kernel")).code == 0
    asked = await vcnode("pod", "bid", "--image", "busybox", "--id", "x", "--require", "zone=c")
    assert asked.code == 6
    assert "The node is cordoned." in asked.out
    assert (await vcnode("node", "uncordon", "--node", "n1")).code == 0
    drained = await vcnode("node", "drain", "--node", "n3", "--timeout", "5", "--delete")
    assert (drained.code, drained.err) == (0, "")
    assert "web" in drained.out
    await until(fleet, lambda: ("n3", "web") not in fleet.pods)
    refused = await vcnode("place", "--image", "busybox", "--require", "zone=b", "--", "sleep", "60")
    assert refused.code == 6
