"""A host that fails in flight: each failure is a clear error, and the node goes on when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartNats
from tests.faults.lives import Died, Host, hosts
from tests.unit.pods.world import World, container, pod
from vcnode.cli.demo.busybox import make_root
from vcnode.errors import ResourceExhaustedError, StorageError
from vcnode.models import wire
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, HypervisorType, PodState
from vcnode.node import running
from vcnode.pods.outbox import Outbox
from vcnode.pods.store import Store
from vcnode.settings import NatsSettings, Settings

SLEEP = {"id": "main", "rootfs": "/srv/app", "cmd": {"args": ["sleep", "infinity"]}}
TRUE = ExecOptions(cmd=Cmd(args=("true",)))


def spec(pod_id: str) -> dict[str, Any]:
    return {"pod": {"id": pod_id, "containers": [SLEEP]}}


def fill(ballast: Path) -> None:
    """Use up all of a disk."""
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4096)):
            pass
    os.close(fd)
    assert not os.statvfs(ballast).f_bavail


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@pytest.fixture
def small(short_dir: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    place = short_dir / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "vcnode-test", str(place))
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
async def host(start_nats: StartNats, small: Path) -> AsyncIterator[Host]:
    """A node whose state lies on the small disk."""
    server = await start_nats()
    settings = {"hypervisor": "mock", "allowed_roots": ["/srv"]}
    async with hosts(server.url, settings, small.parent) as make:
        made = make("h", state_dir=str(small / "state"))
        yield made
        await made.kill()


@pytest.mark.nats
@pytest.mark.root
async def test_a_full_disk_refuses_commands_and_loses_nothing(host: Host, small: Path) -> None:
    await host.start()
    assert (await host.ask("c-1", "pod.run", spec("before")))["state"] == "running"
    ballast = small / "ballast"
    fill(ballast)
    # What fits into the database's last page still does; then it is over.
    replies = [await host.read("pod.create", spec(f"full-{number}")) for number in range(30)]
    refused = [reply for reply in replies if "message" in reply]
    assert refused
    assert {reply["code"] for reply in refused} == {"resource_exhausted"}
    assert all(reply["retryable"] for reply in refused)
    assert "disk of the node's state directory is full" in refused[-1]["message"]
    status = await host.read("pod.status", {"pod_id": "before"})
    assert status["state"] == "running"

    # Killed while the disk is full: every record that was told is there, and the node starts again with room.
    await host.kill()
    ballast.unlink()
    await host.start()
    listed = {p["pod_id"] for p in (await host.read("pod.list"))["pods"]}
    assert listed == {"before", *(reply["pod_id"] for reply in replies if "message" not in reply)}
    assert (await host.ask("c-2", "pod.run", spec("after")))["state"] == "running"
    assert await host.stop() == 0
    connection = sqlite3.connect(small / "state/node.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    events = await host.events()
    assert [int(e["sequence"]) for e in events] == list(range(1, len(events) + 1))


@pytest.mark.nats
@pytest.mark.root
async def test_a_read_only_state_directory_is_said_at_the_start(host: Host, small: Path) -> None:
    await host.start()
    await host.ask("c-1", "pod.create", spec("p1"))
    assert await host.stop() == 0
    mount("-o", "remount,ro", str(small))
    with pytest.raises(Died):
        await host.start()
    assert host.ended is not None
    assert os.WEXITSTATUS(host.ended.result()) == 1
    assert "cannot be used: Read-only file system" in host.tail()
    mount("-o", "remount,rw", str(small))
    await host.start()
    assert [p["pod_id"] for p in (await host.read("pod.list"))["pods"]] == ["p1"]


async def test_a_database_that_turns_read_only_refuses_and_goes_on(tmp_path: Path) -> None:
    world = await World(tmp_path).start()
    await world.pods.run(pod("p1"), world.call())
    await world.store.read(lambda c: c.execute("PRAGMA query_only = ON").fetchall())
    for act in (
        lambda: world.pods.create(pod("p2"), world.call("pod.create")),
        lambda: world.pods.stop("p1", 0, world.call("pod.stop")),
    ):
        with pytest.raises(StorageError, match="cannot be written; nothing was changed"):
            await act()
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    await world.store.read(lambda c: c.execute("PRAGMA query_only = OFF").fetchall())
    await world.pods.delete("p1", True, world.call("pod.delete"))
    assert world.leaks == []
    await world.close()


@pytest.mark.parametrize("jump", [timedelta(days=-400), timedelta(days=400)], ids=["back", "forward"])
async def test_a_jump_of_the_clock_ends_and_mixes_up_nothing(tmp_path: Path, jump: timedelta) -> None:
    world = await World(tmp_path).start()
    honest = world.clock
    await world.pods.run(pod("p1", [container("c1")]), world.call())
    assert await world.journal.begin("open", "pod.start", "d") is None
    world.clock = world.store.clock = lambda: honest() + jump  # type: ignore[assignment]
    await world.restart()
    await world.pods.recover()
    await world.journal.fail_unfinished()
    assert world.pods.status("p1").state is PodState.RUNNING
    await world.pods.run(pod("p2"), world.call())
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    assert await world.journal.begin("open", "pod.start", "d") is not None
    await world.outbox.prune()
    assert (await world.pods.audit(repair=True)).orphan_count == 0
    for each in ("p1", "p2"):
        await world.pods.delete(each, True, world.call("pod.delete"))
    assert world.leaks == []
    sequences = [int(e.sequence) for e in await world.events()]
    assert sequences == list(range(1, len(sequences) + 1))
    await world.close()


@pytest.mark.nats
@pytest.mark.vm
@pytest.mark.timeout(120)
async def test_without_descriptors_a_start_is_undone_and_the_node_goes_on(
    start_nats: StartNats, guest_image: Path, short_dir: Path
) -> None:
    server = await start_nats()
    roots = short_dir / "roots"
    roots.mkdir()
    make_root(roots / "app")
    settings = {
        "guest_dir": str(guest_image),
        "allowed_roots": [str(roots)],
        "network": "noop",  # the host's own is left alone
        "qemu": {"accel": "tcg"},
    }
    main = {"id": "main", "rootfs": str(roots / "app"), "cmd": {"args": ["/bin/sleep", "100000"]}}
    run = {"pod": {"id": "p1", "template": "never", "resources": {"mem_size_mib": 128}, "containers": [main]}}
    async with hosts(server.url, settings, short_dir) as make:
        host = make("h")
        await host.start()
        soft, hard = resource.prlimit(host.pid, resource.RLIMIT_NOFILE)
        for spare in range(6):
            used = len(os.listdir(f"/proc/{host.pid}/fd"))
            resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (used + spare, hard))
            reply = await host.read("pod.run", run)
            resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert "message" in reply, f"with {spare} descriptors: {reply}"
            assert "descriptors left" in reply["message"], f"with {spare} descriptors: {reply}"
            for left in (await host.read("pod.list"))[
                "pods"
            ]:  # what could not be undone, for want of them, too
                assert left["state"] == "failed", left
                assert (await host.ask(f"d-{spare}", "pod.delete", {"pod_id": "p1"}))["existed"]
            audit = await host.read("node.audit")
            assert [h for h in audit["holdings"] if h["vm_id"]] == [], f"with {spare} descriptors"
        assert (await host.ask("c-1", "pod.run", run))["state"] == "running"
        assert (await host.ask("c-2", "pod.delete", {"pod_id": "p1", "force": True}))["existed"]
        assert host.ended is not None
        assert not host.ended.done()
        os.kill(host.pid, signal.SIGTERM)
        assert await host.ended == 0


@pytest.mark.parametrize("step", ["hypervisor.launch", "network.attach", "storage.make_vm_dir"])
async def test_a_host_that_is_short_of_something_refuses_a_start_which_is_undone(
    tmp_path: Path, step: str
) -> None:
    """As the drivers say it for want of memory, of taps, or of file descriptors."""
    world = await World(tmp_path).start()
    hit = world.plan.hit

    async def short(operation: str, *, vm_id: str | None = None) -> None:
        await hit(operation, vm_id=vm_id)
        if operation == step:
            raise ResourceExhaustedError("The host has no more of it.")

    world.plan.hit = short  # type: ignore[method-assign]
    with pytest.raises(ResourceExhaustedError):
        await world.pods.run(pod("p1"), world.call())
    assert world.leaks == []
    assert world.pods.list({}, ()).pods == ()
    world.plan.hit = hit  # type: ignore[method-assign]
    await world.pods.run(pod("p1"), world.call())
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    await world.close()


@pytest.mark.nats
@pytest.mark.root
async def test_a_disk_that_fails_to_write_or_is_slow_refuses_and_the_node_goes_on(
    start_nats: StartNats, short_dir: Path
) -> None:
    """A limit on the size of files makes writes fail as a broken disk does: EFBIG, an I/O error to SQLite."""
    server = await start_nats()
    settings = {"hypervisor": "mock", "allowed_roots": ["/srv"]}
    async with hosts(server.url, settings, short_dir) as make:
        host: Host = make("h")
        await host.start("storage.make_vm_dir:2=delay(30)")
        assert (await host.ask("c-1", "pod.run", spec("p1")))["state"] == "running"
        before = resource.prlimit(host.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(host.pid, resource.RLIMIT_FSIZE, (4096, before[1]))
        reply = await host.read("pod.create", spec("p2"))
        assert reply["code"] == "internal", reply
        assert "database failed; nothing was changed" in host.tail(), host.tail()
        assert (await host.read("pod.status", {"pod_id": "p1"}))["state"] == "running"
        resource.prlimit(host.pid, resource.RLIMIT_FSIZE, before)

        deadline = {wire.DEADLINE: (datetime.now(UTC) + timedelta(seconds=1)).isoformat()}
        reply = await host._request("pod.run", spec("slow"), deadline, timeout_s=20)
        assert reply["code"] == "deadline_exceeded", reply
        assert [p["pod_id"] for p in (await host.read("pod.list"))["pods"]] == ["p1"]
        assert (await host.ask("c-2", "pod.run", spec("p2")))["state"] == "running"
        audit = await host.read("node.audit")
        assert {h["pod_id"] for h in audit["holdings"] if h["vm_id"]} == {"p1", "p2"}
        assert await host.stop() == 0


@pytest.mark.nats
async def test_two_node_agents_on_one_state_directory_are_one_too_many(
    start_nats: StartNats, short_dir: Path
) -> None:
    server = await start_nats()
    async with hosts(server.url, {"hypervisor": "mock", "allowed_roots": ["/srv"]}, short_dir) as make:
        host: Host = make("h")
        await host.start()
        assert (await host.ask("c-1", "pod.run", spec("p1")))["state"] == "running"
        other: Host = make("o", **host.settings)
        with pytest.raises(Died):
            await other.start()
        assert "Another node agent uses" in other.tail()
        assert (await host.read("pod.status", {"pod_id": "p1"}))["state"] == "running"

        # Killed again and again while it recovers, at whatever moment that is.
        for pause_s in (0.0, 0.01, 0.03, 0.1, 0.2, 0.3):
            await host.kill()
            host.pid, host.ended = await host.zygote.fork(host.settings, host.log)
            await asyncio.sleep(pause_s)
        await host.kill()
        await host.start()
        assert (await host.read("pod.status", {"pod_id": "p1"}))["state"] == "running"
        audit = await host.read("node.audit", {"repair": True})
        assert (audit["orphan_count"], audit["problems"]) == (0, [])
        assert await host.stop() == 0

        # The whole directory in another place: another mark, so its pods are nobody's there, and are told.
        moved = short_dir / "moved"
        os.rename(host.settings["state_dir"], moved)
        host.settings["state_dir"] = str(moved)
        await host.start()
        (p1,) = (await host.read("pod.list"))["pods"]
        assert p1["state"] in ("running", "failed"), p1
        assert (await host.ask("c-2", "pod.delete", {"pod_id": "p1", "force": True}))["existed"]
        audit = await host.read("node.audit", {"repair": True})
        assert audit["holdings"] == [], audit
        assert await host.stop() == 0


async def test_a_node_whose_database_is_damaged_below_it_goes_on_and_tells(tmp_path: Path) -> None:
    settings = Settings(
        node_name="n1",
        state_dir=tmp_path / "s",
        run_dir=tmp_path / "r",
        allowed_roots=(Path("/roots"),),
        hypervisor=HypervisorType.MOCK,
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
    )
    async with running(settings) as node:
        store = node.pods._ledger._store
        await node.pods.run(pod("p1"), Call("c-1", "pod.run"))
        await store.read(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        await store.read(lambda c: c.execute("PRAGMA shrink_memory").fetchall())
        store.path.write_bytes(b"\xff" * store.path.stat().st_size)
        before = store.sequence
        with pytest.raises(StorageError, match="found damaged, and nothing was changed"):
            await node.pods.create(pod("p2"), Call("c-2", "pod.create"))
        assert (await node.pods.exec("p1", "c1", TRUE, Call("c-3", "container.exec"))).exit_code == 0
        await node.pods.create(pod("p2"), Call("c-2", "pod.create"))
        async with asyncio.timeout(10):
            while "node.database_rebuilt" not in (found := await kinds_after(store, before)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # told by a task of its own
        assert "pod.created" in found
    async with running(settings) as node:
        states = {p.pod_id: p.state for p in node.pods.list({}, ()).pods}
        assert states == {"p1": PodState.RUNNING, "p2": PodState.READY}


async def kinds_after(store: Store, sequence: int) -> list[str]:
    outbox = Outbox(store, retention_s=1e6)
    return [event.kind for event in await outbox.since(sequence, 100)]
