"""The buckets: pods as they are, a lease for each node, and one node for each name."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
import nats.js.errors
import pytest

from tests.integration.conftest import mock_settings
from tests.integration.nats_node import WAIT_S
from tests.support.nats import NatsServer
from vcnode.bus.kv import Lease
from vcnode.client import Client
from vcnode.errors import VcnodeError
from vcnode.handlers.services import memory_mib
from vcnode.models.call import Call
from vcnode.models.node import NodeLease
from vcnode.models.pod import PodSpec, PodState, PodStatus
from vcnode.node import running
from vcnode.settings import LimitSettings, Settings

pytestmark = pytest.mark.nats


@pytest.fixture
async def js(nats_server: NatsServer) -> AsyncIterator[Any]:
    connection = await nats.connect(nats_server.url)
    yield connection.jetstream()
    await connection.close()


async def until(js: Any, bucket: str, key: str, good: Callable[[bytes | None], bool]) -> bytes | None:
    """Wait until the value of *key* (None: absent) is good."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                value: bytes | None = (await (await js.key_value(bucket)).get(key)).value
            except nats.js.errors.NotFoundError:
                value = None
            if good(value):
                return value
            await asyncio.sleep(0.02)


def in_state(state: str) -> Callable[[bytes | None], bool]:
    return lambda value: value is not None and json.loads(value)["state"] == state


def absent(value: bytes | None) -> bool:
    return value is None


def with_lease(settings: Settings, lease_s: float) -> Settings:
    return settings.model_copy(update={"nats": settings.nats.model_copy(update={"lease_s": lease_s})})


async def test_the_bucket_of_pods_follows_every_change(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    async with (
        running(mock_settings(short_dir / "n1", nats_server.url)) as node,
        await Client.connect(nats_server.url) as client,
    ):
        await node.connection.wait_connected()
        await client.node("n1").pod_create(PodSpec(id="p1"))
        await until(js, "vcnode-pods", "n1.p1", in_state("ready"))
        await client.node("n1").pod_start("p1")
        value = await until(js, "vcnode-pods", "n1.p1", in_state("running"))
        assert value is not None
        assert PodStatus.model_validate_json(value) == await client.node("n1").pod_status("p1")
        await client.node("n1").pod_delete("p1", force=True)
        await until(js, "vcnode-pods", "n1.p1", absent)


async def test_what_the_bucket_missed_in_an_outage_is_put_right(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    """And only what is this node's: another one's entries stay."""
    settings = mock_settings(short_dir / "n1", nats_server.url)
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        await client.node("n1").pod_create(PodSpec(id="p1"))
        await until(js, "vcnode-pods", "n1.p1", in_state("ready"))
    bucket = await js.key_value("vcnode-pods")
    await bucket.put("n1.p1", b'{"state": "nonsense"}')
    await bucket.put("n1.ghost", b"{}")
    await bucket.put("n10.p1", b"{}")
    async with running(settings):
        await until(js, "vcnode-pods", "n1.p1", in_state("ready"))
        await until(js, "vcnode-pods", "n1.ghost", absent)
        assert (await bucket.get("n10.p1")).value == b"{}"


async def test_purged_buckets_are_filled_again(
    nats_server: NatsServer, js: Any, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcnode.bus.kv.RECHECK_S", 0.3)
    settings = with_lease(mock_settings(short_dir / "n1", nats_server.url), 1.0)
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        await client.node("n1").pod_create(PodSpec(id="p1"))
        await until(js, "vcnode-pods", "n1.p1", in_state("ready"))
        for bucket, key in (("vcnode-pods", "n1.p1"), ("vcnode-nodes", "n1")):
            await js.purge_stream(f"KV_{bucket}")
            await until(js, bucket, key, in_state("ready"))


async def test_what_was_last_of_a_pod_is_in_the_bucket_when_the_node_has_stopped(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    async with (
        running(mock_settings(short_dir / "n1", nats_server.url)) as node,
        await Client.connect(nats_server.url) as client,
    ):
        await node.connection.wait_connected()
        await client.node("n1").pod_run(PodSpec(id="p1"))
        await until(js, "vcnode-pods", "n1.p1", in_state("running"))
        await client.node("n1").pod_stop("p1")
    await until(js, "vcnode-pods", "n1.p1", in_state("stopped"))


async def test_a_node_that_ends_while_it_is_drained_comes_back_cordoned_with_its_pods(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    """SIGTERM during a drain whose pod does not stop, with pods to be stopped at the end besides."""
    given = mock_settings(short_dir / "n1", nats_server.url, faults="vm.stop:1=hang")
    settings = given.model_copy(update={"on_terminate": "stop", "drain_timeout_s": 0.2})
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        await client.node("n1").pod_run(PodSpec(id="p1"))
        draining = asyncio.create_task(client.node("n1").node_drain(timeout_s=60))
        await until(js, "vcnode-nodes", "n1", in_state("draining"))
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(VcnodeError):
            await draining
    async with running(mock_settings(short_dir / "n1", nats_server.url)) as node:
        await node.connection.wait_connected()
        assert node.service.info().state == "cordoned"
        (pod,) = node.pods.list({}, ()).pods
        assert pod.state in (PodState.RUNNING, PodState.STOPPED, PodState.FAILED)
        await node.pods.delete("p1", True, Call("delete", "pod.delete"))


async def test_a_node_has_a_lease_while_it_runs(nats_server: NatsServer, js: Any, short_dir: Path) -> None:
    async with running(mock_settings(short_dir / "n1", nats_server.url)) as node:
        await node.connection.wait_connected()
        entry = await (await js.key_value("vcnode-nodes")).get("n1")
        lease = NodeLease.model_validate_json(entry.value)
        assert (lease.node, lease.state, lease.mock, lease.used.pods) == ("n1", "ready", True, 0)
        assert lease.capacity.pods == node.settings.limits.pods
    await until(js, "vcnode-nodes", "n1", absent)


async def test_a_lease_is_renewed(nats_server: NatsServer, js: Any, short_dir: Path) -> None:
    settings = with_lease(mock_settings(short_dir / "n1", nats_server.url), 1.0)
    async with running(settings) as node:
        await node.connection.wait_connected()
        watcher = await (await js.key_value("vcnode-nodes")).watch("n1")
        revisions: list[int] = []
        async with asyncio.timeout(WAIT_S):
            while len(revisions) < 3:
                if (entry := await watcher.updates(timeout=WAIT_S)) is not None:
                    revisions.append(entry.revision)
        assert sorted(set(revisions)) == revisions
        await watcher.stop()


async def leases(js: Any, fresh: asyncio.Queue[NodeLease]) -> None:
    """Every lease that is written from now on."""
    watcher = await (await js.key_value("vcnode-nodes")).watch("n1", include_history=False)
    while True:
        entry = await watcher.updates(timeout=WAIT_S)
        if entry is not None and entry.value:
            fresh.put_nowait(NodeLease.model_validate_json(entry.value))


async def test_a_lease_says_at_once_what_became_different_and_not_every_step_of_it(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    settings = with_lease(mock_settings(short_dir / "n1", nats_server.url), 600.0)
    fresh: asyncio.Queue[NodeLease] = asyncio.Queue()
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        watching = asyncio.create_task(leases(js, fresh))

        async def until_lease(good: Callable[[NodeLease], bool]) -> int:
            """How many leases it took."""
            async with asyncio.timeout(WAIT_S):
                for count in itertools.count(1):
                    if good(await fresh.get()):
                        return count
            raise AssertionError

        n1 = client.node("n1")
        await n1.node_cordon("kernel")
        await until_lease(lambda lease: lease.state == "cordoned")
        for number in range(20):
            await n1.node_label(set={"odd/key_.x": f"wert-{number} \u00e4"})
        assert await until_lease(lambda lease: lease.labels.get("odd/key_.x") == "wert-19 \u00e4") < 10
        await n1.node_uncordon()
        await until_lease(lambda lease: lease.state == "ready")
        await n1.pod_create(PodSpec(id="p1"))  # no news for everybody at once
        node.service.drain()
        await until_lease(lambda lease: lease.state == "draining")
        watching.cancel()


async def test_a_lease_outlives_a_host_without_descriptors(
    nats_server: NatsServer, js: Any, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_lease(mock_settings(short_dir / "n1", nats_server.url), 600.0)
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        await until(js, "vcnode-nodes", "n1", in_state("ready"))
        failed = asyncio.Event()

        def short_once() -> tuple[int, int]:
            if not failed.is_set():
                failed.set()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return memory_mib()

        monkeypatch.setattr("vcnode.handlers.services.memory_mib", short_once)
        await client.node("n1").node_cordon("kernel")
        await until(js, "vcnode-nodes", "n1", in_state("cordoned"))
        assert failed.is_set()


async def test_nobody_renews_a_lease_that_is_released(
    nats_server: NatsServer, js: Any, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[str] = []
    release = Lease.release

    async def watched(lease: Lease) -> None:
        alive.extend(task.get_name() for task in asyncio.all_tasks())
        await release(lease)

    monkeypatch.setattr(Lease, "release", watched)
    async with running(mock_settings(short_dir / "n1", nats_server.url)) as node:
        await node.connection.wait_connected()
    assert "nats-connection" in alive
    assert "lease" not in alive
    await until(js, "vcnode-nodes", "n1", absent)


async def test_a_lease_waits_neither_for_commands_nor_for_the_disk(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    given = mock_settings(short_dir / "n1", nats_server.url, faults="hypervisor.launch:*=hang")
    settings = with_lease(given, 1.0).model_copy(update={"limits": LimitSettings(concurrent_commands=2)})
    disk = threading.Event()
    fresh: asyncio.Queue[NodeLease] = asyncio.Queue()
    async with running(settings) as node, await Client.connect(nats_server.url) as client:
        await node.connection.wait_connected()
        hanging = [
            asyncio.create_task(client.node("n1").pod_run(PodSpec(id=f"p{number}"), deadline_s=5))
            for number in range(2)
        ]
        await until(js, "vcnode-pods", "n1.p1", in_state("starting"))
        blocked = asyncio.create_task(node.pods._ledger._store.write(lambda _: disk.wait(WAIT_S)))
        watching = asyncio.create_task(leases(js, fresh))
        async with asyncio.timeout(WAIT_S):
            for _ in range(4):  # longer than a lease
                await fresh.get()
        assert not blocked.done()
        disk.set()
        await blocked
        watching.cancel()
        for task in hanging:
            task.cancel()


async def test_a_second_node_of_the_same_name_is_not_let_in_until_the_first_has_gone(
    nats_server: NatsServer, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = mock_settings(short_dir / "a", nats_server.url)
    second = mock_settings(short_dir / "b", nats_server.url)
    async with running(first) as holder:
        await holder.connection.wait_connected()
        async with running(second) as rival:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.0):
                    await rival.connection.wait_connected()
            assert any("Another node agent is called n1" in record.message for record in caplog.records)
            async with await Client.connect(nats_server.url) as client:
                pings = await client.ping_all(timeout_s=0.5)
                assert len(pings) == 1
    async with running(second) as rival, asyncio.timeout(WAIT_S):
        await rival.connection.wait_connected()


async def test_the_name_of_a_node_that_vanished_is_free_after_its_lease(
    nats_server: NatsServer, js: Any, short_dir: Path
) -> None:
    """Also in a bucket that somebody else made, which forgets nothing by itself."""
    bucket = await js.create_key_value(bucket="vcnode-nodes")
    settings = with_lease(mock_settings(short_dir / "a", nats_server.url), 1.0)
    async with running(settings) as node:
        await node.connection.wait_connected()
        gone = (await bucket.get("n1")).value
    await bucket.put("n1", gone)
    async with running(mock_settings(short_dir / "b", nats_server.url)) as heir, asyncio.timeout(WAIT_S):
        await heir.connection.wait_connected()
        lease = NodeLease.model_validate_json((await bucket.get("n1")).value)
        assert lease.identity != NodeLease.model_validate_json(gone).identity
