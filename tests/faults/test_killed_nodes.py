"""SIGKILL of real node agents before and after each side effect of each command, and of recovery itself.

A side effect is a call of a driver or a commit of the database. What comes before the next one is the same
moment as what comes after the one before it, so most moments have two names and are tried under one: see
`points_of`, and the test that none is missing. The drivers are mocks, whose host outlives the node agent;
what real VMs add is in `test_killed_nodes_vm`, what the real storage adds in `test_killed_pulls`.
"""

from __future__ import annotations

import ast
import asyncio
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import vcnode
from tests.conftest import StartNats
from tests.faults.lives import SAFE, Died, Host, hosts
from vcnode.drivers.faults import OPERATIONS
from vcnode.models.commands import COMMANDS

pytestmark = [pytest.mark.nats, pytest.mark.timeout(600)]

CHAINS = 4
"""Hosts at a time, each for many lives."""
LIFE_LIMIT_S = 200.0
UNTIMED = {
    "store.mark",
    "store.rewind",
    "store.follow",
    "storage.held",
    "storage.image_files",
    "hypervisor.held",
    "network.held",
}
"""What a node does in the background, in no fixed order with commands."""
Verb = tuple[str, dict[str, Any]]
Point = tuple[str, int, str]
"""Operation, its number, and whether ``before`` or ``after``."""


def stories(pod: str) -> dict[str, list[Verb]]:
    """Short tales of one pod each, told from a node without pods; together they have every command."""
    main = {"id": "main", "image": "app", "writable": "disk", "cmd": {"args": ["sleep", "infinity"]}}
    disk = {"image_path": "/srv/disk.qcow2"}
    extra = {"id": "extra", "rootfs": "/srv/app", "cmd": {"args": ["sleep", "infinity"]}}
    spec = {"pod": {"id": pod, "containers": [main]}}
    mounts = [{"source": "data", "destination": "/data"}, {"source": "disk", "destination": "/disk"}]
    volumes = [
        {"mount_tag": "data", "host_path": "/srv/data"},
        {"mount_tag": "disk", "device": "/srv/disk", "fs": "ext4"},
    ]
    sockets = [
        {"name": "one", "host_path": "/srv/one.sock"},
        {"name": "two", "host_path": "/srv/two.sock", "mode": "connect"},
    ]
    reaching = {"pod": {"id": pod, "volumes": volumes, "sockets": sockets, "containers": [extra]}}
    more = {"mount_tag": "more", "host_path": "/srv/more"}
    it, its_main, its_extra = (
        {"pod_id": pod},
        {"pod_id": pod, "container_id": "main"},
        {"pod_id": pod, "container_id": "extra"},
    )
    true = {"cmd": {"args": ["true"]}}
    return {
        "images": [
            ("image.pull", {"reference": f"other-{pod}"}),
            ("image.import", {"name": f"other-{pod}", "path": f"/srv/{pod}"}),
            ("image.remove", {"name": f"other-{pod}"}),
        ],
        "life": [
            ("pod.create", {"pod": {**spec["pod"], "hypervisor_config": disk}}),
            ("pod.start", it),
            ("container.exec", {**its_main, **true}),
            ("pod.exec", {**it, **true}),
            ("pod.stop", it),
            ("pod.delete", it),
        ],
        "pauses": [
            ("pod.run", spec),
            ("pod.pause", it),
            ("pod.resume", it),
            ("container.pause", its_main),
            ("container.resume", its_main),
            ("container.kill", {**its_main, "signal": "SIGUSR1"}),
            ("pod.delete", {**it, "force": True}),
        ],
        "containers": [
            ("pod.run", spec),
            ("container.create", {"pod_id": pod, "container": extra}),
            ("container.start", its_extra),
            ("container.stop", {**its_extra, "grace_s": 0}),
            ("container.delete", its_extra),
            ("container.create", {"pod_id": pod, "container": {**main, "id": "extra"}}),
            ("container.start", its_extra),
            ("container.delete", {**its_extra, "force": True}),
        ],
        "volumes": [
            ("pod.run", reaching),
            ("pod.attach_volume", {"pod_id": pod, "volume": more}),
            ("pod.detach_volume", {"pod_id": pod, "mount_tag": "more"}),
            ("container.create", {"pod_id": pod, "container": {**main, "mounts": mounts}}),
            ("container.start", its_main),
            ("container.delete", {**its_main, "force": True}),
        ],
        "standing": [
            ("pod.run", spec),
            ("node.label", {"set": {"zone": pod}}),
            ("node.cordon", {"reason": "to see"}),
            ("node.uncordon", {}),
            ("node.drain", {"delete": True, "timeout_s": 20}),
            ("node.audit", {"repair": True}),
        ],
        "durable": [("durable", {"pod": {"id": pod, "containers": [extra]}})],
    }


GIVEN = {"pauses": 1, "standing": 1}
"""How many commands of a story only lead up to it: another story has them."""

NO_SIDE_EFFECT = {
    **dict.fromkeys(
        ("session.exec", "container.attach", "container.copy_in", "container.copy_out", "pod.forward"),
        "a session is of this process alone: what it holds are calls of the guest agent, which ends with its "
        "connection; its journal entry is as that of an exec (integration/test_sessions.py)",
    ),
    **dict.fromkeys(("session.resume", "session.close"), "change nothing but a session of this process"),
    **dict.fromkeys(("container.update", "pod.resize"), "swept in one process, in test_pod_sweep.py"),
}
"""Commands that change something, and what there is to sweep of them beyond what the stories have."""

ELSEWHERE = {
    "vm": "no call, but the life of a VM",
    "hypervisor.clone": "a launch from a template; with real ones in test_killed_nodes_vm.py",
    "hypervisor.save_template": "test_audit.py: a template whose making died leaves nothing",
    "hypervisor.free": "the next life frees what is stranded: test_audit.py",
    "network.free": "as hypervisor.free",
    "hypervisor.recover": "here, in the sweep of recovery",
    "hypervisor.kill": "here, in the sweep of recovery",
    "network.recover": "here, in the sweep of recovery",
    "network.prepare": "for spares and templates, whose VMs are no pod's: test_audit.py",
    "storage.blank_image": "as network.prepare",
    "storage.read_notes": "here, in the sweep of recovery; it reads",
    "storage.read_secret": "reads",
    "storage.open_hook": "reads; a hook that fails or outlives its node agent: unit/pods/test_hooks.py",
    "agent.ping": "changes nothing",
    "agent.list_containers": "here, in the sweep of recovery; it reads",
    "agent.list_processes": "reads",
    "agent.read_stats": "reads",
    "vm.read_stats": "reads",
    "agent.available_memory": "reads",
    "agent.update_container": "of container.update: test_pod_sweep.py",
    "agent.set_watchdog": "of on_disconnect: told anew again and again (unit/pods/test_disconnect.py)",
    "vm.set_memory": "of pod.resize: test_pod_sweep.py",
    "agent.attach": "of sessions",
    "agent.copy": "of sessions",
    "agent.connect_port": "of sessions",
    "store.give_back": "of an orderly stop: regressions/test_commands_that_only_waited.py",
    "store.fail": "here, in the sweep of recovery",
    "store.restore": "with an older database: integration/test_nats_events.py",
    "store.forget": "of a command that had no effect and may come again: the one before it is swept",
    "store.prune": "removes what is published and old; killed or not, the next prune removes it",
    "store.announce": "here, in the sweep of recovery",
}
"""Operations that no command of the stories has, and where they are tried."""


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


async def tell(host: Host, name: str, life: str, faults: str) -> bool:
    """All commands of a story in their order, until the node agent dies; whether it did."""
    try:
        for number, (verb, body) in enumerate(stories(f"p-{life}")[name]):
            if number == GIVEN.get(name, 0):
                await host.arm(faults)
            if verb == "durable":
                await host.enqueue(f"d-{life}", "pod.run", body)
                await host.done(f"d-{life}")
            else:
                await host.ask(f"c-{life}-{number}", verb, body)
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
                assert state in ("ready", "stopped", "paused"), f"{where}: {pod['pod_id']} is {state}"
    audit = await host.read("node.audit")
    assert [h for h in audit["holdings"] if h["orphan"]] == [], where
    assert audit["problems"] == [], where


async def remove_pods(host: Host, where: str) -> None:
    """Delete every pod: nothing is left of them."""
    for pod in (await host.read("pod.list"))["pods"]:
        gone = await host.ask(f"r-{pod['pod_id']}", "pod.delete", {"pod_id": pod["pod_id"], "force": True})
        assert gone.get("existed"), f"{where}: {gone}"
    audit = await host.read("node.audit")
    assert [h for h in audit["holdings"] if h["vm_id"]] == [], where


async def end(host: Host, where: str) -> None:
    """Stop in good order: the story of the node has no gap, and each durable command one outcome."""
    assert await host.stop() == 0, where
    events = await host.events()
    assert [int(e["sequence"]) for e in events] == list(range(1, len(events) + 1)), where
    assert events[-1]["type"] == "vcnode.node.stopping", where
    outcomes = [e for e in events if e["type"].startswith("vcnode.command.")]
    assert [e["commandid"] for e in outcomes] == list(host.queued), f"{where}: {outcomes}"


def read_trace(text: str, untimed: Collection[str] = UNTIMED) -> list[Point]:
    """The moments that a life has passed, in their order."""
    found = re.findall(r"failpoint ([\w.]+):(\d+) (before|after)", text)
    return [(operation, int(call), when) for operation, call, when in found if operation not in untimed]


def points_of(trace: Sequence[Point]) -> list[str]:
    """Failpoints for every moment of a trace, each moment once.

    Nothing changes between what ends and what begins next, so before that is where after this was.
    """
    points = []
    for number, (operation, call, when) in enumerate(trace):
        if when == "after":
            points.append(f"{operation}:{call}=kill(after)")
        elif number == 0 or trace[number - 1][2] == "before":
            points.append(f"{operation}:{call}=kill")
    return points


def test_each_moment_of_a_life_has_its_point() -> None:
    one, other = ("store.begin", 1), ("vm.stop", 1)
    trace = [(*one, "before"), (*one, "after"), (*other, "before"), (*other, "after")]
    assert points_of(trace) == ["store.begin:1=kill", "store.begin:1=kill(after)", "vm.stop:1=kill(after)"]
    at_once = [(*one, "before"), (*other, "before"), (*one, "after"), (*other, "after")]
    assert points_of(at_once) == [
        "store.begin:1=kill",
        "vm.stop:1=kill",
        "store.begin:1=kill(after)",
        "vm.stop:1=kill(after)",
    ]


def commits() -> set[str]:
    """The names of all commits: of the functions that the node's code gives to ``Store.write``."""
    found = set()
    for path in (Path(vcnode.__file__).parent / "pods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                on = ast.unparse(node.func.value)
                if (on, node.func.attr) in (("self._store", "write"), ("self", "_write")):
                    work = node.args[-1]
                    found.add(work.id if isinstance(work, ast.Name) else "write")
    return {f"store.{name}" for name in found - {"work"}}


def test_every_command_that_changes_something_is_in_a_story() -> None:
    told = {verb for story in stories("p").values() for verb, _ in story}
    changing = {verb for verb, command in COMMANDS.items() if command.mutates}
    assert changing - told == NO_SIDE_EFFECT.keys()


async def settle(host: Host, life: str, where: str) -> None:
    """See that all is as it must be after a story, however it ended; then the node is as before it."""
    if f"d-{life}" in host.queued:
        await host.done(f"d-{life}")
    await check(host, where)
    await remove_pods(host, where)
    await host.ask(f"u-{life}", "node.uncordon", {})
    host.asked.clear()
    host.answers.clear()


async def begin(host: Host) -> None:
    """The first life of a host, with the image of all pods."""
    await host.start(armed=True)
    await host.ask("app", "image.pull", {"reference": "app"})


async def traces(host: Host) -> dict[str, list[Point]]:
    """The moments of each story when all goes well."""
    await begin(host)
    found = {}
    for name in stories("p"):
        seen = host.log.stat().st_size
        assert not await tell(host, name, name, "*:*=trace")
        await host.arm("")
        found[name] = read_trace(host.log.read_text()[seen:])
        await settle(host, name, name)
    await end(host, "without a fault")
    return found


async def live(host: Host, story: str, point: str, life: str) -> bool:
    """Tell a story, die at that point or not, and see to the end; whether it died."""
    where = f"{story}, {point}"
    died = await tell(host, story, life, point)
    if died:
        assert host.ended is not None
        assert host.ended.result() == signal.SIGKILL, where
        await host.start(armed=True)
    else:
        await host.arm("")
    await settle(host, life, where)
    return died


async def test_a_node_killed_around_any_side_effect_of_any_command_loses_nothing(make: Any) -> None:
    found = await traces(make("plain"))
    passed = {operation for trace in found.values() for operation, _, _ in trace}
    every = OPERATIONS | commits()
    assert every - UNTIMED - passed <= ELSEWHERE.keys(), "put it into a story, or say where it is tried"
    assert ELSEWHERE.keys() <= every
    points = [(story, point) for story, trace in found.items() for point in points_of(trace)]
    assert len(points) > 100
    left = [(str(number), *point) for number, point in enumerate(points)]
    wrong: list[str] = []
    died = 0

    async def lives_of(host: Host) -> None:
        nonlocal died
        await begin(host)
        while left:
            life, story, point = left.pop(0)
            async with asyncio.timeout(LIFE_LIMIT_S):
                happened = await live(host, story, point, life)
            died += happened
        await end(host, "at the end of a chain")

    async def chain(name: str) -> None:
        while left:  # a host on which something went wrong is given up, and another does the rest
            host = make(f"{name}-{len(wrong)}")
            try:
                await lives_of(host)
            except Exception as exc:  # all of them are to be seen, not the first alone
                wrong.append(f"{exc!r}\n{host.tail()}")
            finally:
                await host.kill()

    async with asyncio.TaskGroup() as group:
        for number in range(CHAINS):
            group.create_task(chain(f"k{number}"))
    assert not wrong, f"{len(wrong)} of {len(points)}:\n" + "\n\n".join(wrong)
    assert died > 0.9 * len(points)


async def test_a_recovery_killed_around_any_side_effect_is_done_by_the_next(make: Any) -> None:
    """Of a node that died in the middle of a start, while another pod ran."""
    extra = {"id": "extra", "rootfs": "/srv/app", "cmd": {"args": ["sleep", "infinity"]}}
    run = {"pod": {"id": "half", "containers": [extra]}}

    async def die(host: Host) -> None:
        await host.start("agent.start_container:2=kill(after)")
        await host.ask("c-0", "pod.run", {"pod": {"id": "web", "containers": [extra]}})
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
        await remove_pods(host, point)
        await end(host, point)
        return died

    plain = make("plain")
    await die(plain)
    await plain.start("*:*=trace")
    trace = read_trace(plain.log.read_text(), untimed={"store.mark", "store.rewind"})
    assert {name for name, where in ELSEWHERE.items() if where.startswith("here")} <= {p[0] for p in trace}
    await check(plain, "without a fault")
    await remove_pods(plain, "without a fault")
    await end(plain, "without a fault")
    points = points_of(trace)
    slots = asyncio.Semaphore(CHAINS)
    wrong: list[str] = []
    died = 0

    async def one(number: int, point: str) -> None:
        nonlocal died
        async with slots:
            host = make(f"r{number}")
            try:
                async with asyncio.timeout(LIFE_LIMIT_S):
                    happened = await life(host, point)
                died += happened
            except Exception as exc:  # as above
                wrong.append(f"{point}: {exc!r}\n{host.tail()}")
            finally:
                await host.kill()

    async with asyncio.TaskGroup() as group:
        for number, point in enumerate(points):
            group.create_task(one(number, point))
    assert not wrong, f"{len(wrong)} of {len(points)}:\n" + "\n\n".join(wrong)
    assert died >= len(points) - 2  # the last may come when the node answers already
