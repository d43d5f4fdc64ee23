"""SIGKILL of real node agents after each side effect of each command, and of recovery itself.

A side effect is a call of a driver or a commit of the database. What comes before the next one is the same
moment as what comes after the one before it, so the sweep kills after each, and before the first. The drivers
are mocks, whose host outlives the node agent; what real VMs add is in `test_killed_nodes_vm`.
"""

from __future__ import annotations

import asyncio
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartNats
from tests.faults.lives import SAFE, Died, Host, hosts

pytestmark = [pytest.mark.nats, pytest.mark.timeout(180)]

AT_ONCE = 4
"""Hosts at a time."""
LIFE_LIMIT_S = 100.0
UNTIMED = {
    "store.mark",
    "store.rewind",
    "store.continue_after",
    "storage.held",
    "hypervisor.held",
    "network.held",
}
"""What a node does in the background, in no fixed order with commands."""
MAIN = {"id": "main", "image": "app", "cmd": {"args": ["sleep", "infinity"]}}
EXTRA = {"id": "extra", "rootfs": "/srv/app", "cmd": {"args": ["sleep", "infinity"]}}
POD = {"id": "web", "containers": [MAIN]}
COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("image.pull", {"reference": "app"}),
    ("pod.create", {"pod": POD}),
    ("pod.start", {"pod_id": "web"}),
    ("container.exec", {"pod_id": "web", "container_id": "main", "cmd": {"args": ["true"]}}),
    ("container.create", {"pod_id": "web", "container": EXTRA}),
    ("container.start", {"pod_id": "web", "container_id": "extra"}),
    ("container.stop", {"pod_id": "web", "container_id": "extra", "grace_s": 0}),
    ("container.delete", {"pod_id": "web", "container_id": "extra"}),
    ("pod.stop", {"pod_id": "web"}),
    ("pod.delete", {"pod_id": "web"}),
    ("pod.run", {"pod": POD}),
    ("pod.delete", {"pod_id": "web", "force": True}),
    ("image.remove", {"name": "app"}),
]
DURABLE = ("pod.run", {"pod": {"id": "queued", "containers": [EXTRA]}})


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where that is possible: hundreds of databases, and no power failure among the faults."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vc-", dir=shm if shm.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
async def make(start_nats: StartNats, place: Path) -> AsyncIterator[Any]:
    server = await start_nats()
    settings = {"hypervisor": "mock", "allowed_roots": ["/srv"]}
    async with hosts(server.url, settings, place) as maker:
        yield maker


async def first_life(host: Host, faults: str) -> bool:
    """All commands in their order, until the node agent dies; whether it did."""
    try:
        await host.start(faults)
        for number, (verb, body) in enumerate(COMMANDS):
            await host.ask(f"c-{number}", verb, body)
        await host.enqueue("d-0", *DURABLE)
        await host.done("d-0")
    except Died:
        return True
    return False


async def check(host: Host, where: str) -> None:
    """What must hold after any death: outcomes, pods, host, events."""
    begun = dict(host.asked)
    for command_id, (verb, body) in begun.items():
        known = host.answers.get(command_id)
        reply = await host.ask(command_id, verb, body)
        assert known is None or reply == known, f"{where}: {command_id} ({verb}) is answered in two ways"
        assert "message" not in reply or reply["code"] in SAFE, f"{where}: {verb}: {reply}"
    for pod in (await host.read("pod.list"))["pods"]:
        match pod["state"]:
            case "running":
                for container in pod["containers"]:
                    if container["state"] == "running":
                        body = {"pod_id": pod["pod_id"], "container_id": container["container_id"]}
                        done = await host.ask(
                            f"x-{pod['pod_id']}-{container['container_id']}",
                            "container.exec",
                            {**body, "cmd": {"args": ["true"]}},
                        )
                        assert done.get("exit_code") == 0, f"{where}: {done}"
            case "failed":
                assert pod["reason"], where
            case state:
                assert state in ("ready", "stopped"), f"{where}: {pod['pod_id']} is {state}"
    audit = await host.read("node.audit")
    assert [h for h in audit["holdings"] if h["orphan"]] == [], where
    assert audit["problems"] == [], where


async def remove_all(host: Host, where: str) -> None:
    """Delete every pod: nothing is left, and the story of the node has no gap."""
    for command_id in host.queued:
        await host.done(command_id)
    for pod in (await host.read("pod.list"))["pods"]:
        gone = await host.ask(f"r-{pod['pod_id']}", "pod.delete", {"pod_id": pod["pod_id"], "force": True})
        assert gone.get("existed"), f"{where}: {gone}"
    audit = await host.read("node.audit")
    assert [h for h in audit["holdings"] if h["vm_id"]] == [], where
    assert await host.stop() == 0, where
    events = await host.events()
    assert [int(e["sequence"]) for e in events] == list(range(1, len(events) + 1)), where
    assert events[-1]["type"] == "vcnode.node.stopping", where
    outcomes = [e for e in events if e["type"].startswith("vcnode.command.")]
    assert [e["commandid"] for e in outcomes] == list(host.queued), f"{where}: {outcomes}"


def points_of(host: Host, untimed: Collection[str] = UNTIMED) -> list[str]:
    """The failpoints that lives have passed: the first, and what comes after each side effect."""
    found = re.findall(r"failpoint ([\w.]+):(\d+) (before|after)", host.log.read_text())
    timed = [(operation, call, when) for operation, call, when in found if operation not in untimed]
    (operation, call, _), *rest = timed
    after = [f"{operation}:{call}=kill(after)" for operation, call, when in rest if when == "after"]
    return [f"{operation}:{call}=kill", *after]


async def swept(make: Any, points: list[str], life: Any) -> int:
    """Lead *life* once per point, several at a time; how many of them died where they should."""
    slots = asyncio.Semaphore(AT_ONCE)
    wrong: list[str] = []
    died = 0

    async def one(number: int, point: str) -> None:
        nonlocal died
        async with slots:
            host = make(f"k{number}")
            try:
                async with asyncio.timeout(LIFE_LIMIT_S):
                    happened = await life(host, point)
                died += happened
            except Exception as exc:  # all of them are to be seen, not the first alone
                wrong.append(f"{point}: {exc!r}\n{host.tail()}")
            finally:
                await host.kill()

    async with asyncio.TaskGroup() as group:
        for number, point in enumerate(points):
            group.create_task(one(number, point))
    assert not wrong, f"{len(wrong)} of {len(points)}:\n" + "\n\n".join(wrong)
    return died


async def test_a_node_killed_after_any_side_effect_of_any_command_loses_nothing(make: Any) -> None:
    async def life(host: Host, point: str) -> bool:
        died = await first_life(host, point)
        if died:
            assert host.ended is not None
            assert host.ended.result() == signal.SIGKILL, f"{point}: {host.tail()}"
            await host.start()
        await check(host, point)
        await remove_all(host, point)
        return died

    plain = make("plain")
    assert not await first_life(plain, "*:*=trace")
    points = points_of(plain)
    await check(plain, "without a fault")
    await remove_all(plain, "without a fault")
    assert len(points) > 100
    died = await swept(make, points, life)
    assert died > 0.9 * len(points)


async def test_a_recovery_killed_after_any_side_effect_is_done_by_the_next(make: Any) -> None:
    """Of a node that died in the middle of a start, while another pod ran."""
    run = {"pod": {"id": "half", "containers": [EXTRA]}}

    async def die(host: Host) -> None:
        await host.start("agent.start_container:2=kill(after)")
        await host.ask("c-0", "pod.run", {"pod": {"id": "web", "containers": [EXTRA]}})
        with pytest.raises(Died):
            await host.ask("c-1", "pod.run", run)

    async def life(host: Host, point: str) -> bool:
        await die(host)
        died = False
        try:
            await host.start(point)
        except Died:
            died = True
            await host.start()
        (web,) = [p for p in (await host.read("pod.list"))["pods"] if p["pod_id"] == "web"]
        assert web["state"] == "running", f"{point}: {web}"
        await check(host, point)
        await remove_all(host, point)
        return died

    plain = make("plain")
    await die(plain)
    await plain.start("*:*=trace")
    points = points_of(plain, untimed={"store.mark", "store.rewind"})
    assert any(point.startswith("hypervisor.recover") for point in points)
    assert any(point.startswith("hypervisor.kill") for point in points)
    await check(plain, "without a fault")
    await remove_all(plain, "without a fault")
    died = await swept(make, points, life)
    assert died >= len(points) - 2  # the last may come when the node answers already
