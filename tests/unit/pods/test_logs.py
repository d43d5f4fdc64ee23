"""Logs of pods: kept while they run, read in pieces, followed, and gone with the pod."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.pods.world import ROOT, World
from vcnode.drivers.base import GuestSession, LogRecord
from vcnode.drivers.logfiles import Chunk
from vcnode.errors import InvalidArgumentError, NotFoundError, UnavailableError
from vcnode.models.logs import ContainerLogEntries, ContainerLogs
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, RestartPolicy
from vcnode.pods import logs as pump

TALK = "echo one; echo two >&2; sleep infinity"


def spec(*scripts: str) -> PodSpec:
    containers = tuple(
        ContainerSpec(id=f"c{n}", rootfs=ROOT, cmd=Cmd(args=("sh", "-c", script)))
        for n, script in enumerate(scripts, 1)
    )
    return PodSpec(id="p1", containers=containers)


@contextlib.asynccontextmanager
async def world_with(path: Path, *scripts: str) -> AsyncIterator[World]:
    world = await World(path).start()
    try:
        await world.pods.run(spec(*scripts), world.call("pod.run"))
        yield world
    finally:
        await world.close()


async def logs(world: World, container_id: str | None = "c1", **fields: object) -> ContainerLogEntries:
    request = ContainerLogs.model_validate({"pod_id": "p1", "container_id": container_id, **fields})
    return await world.pods.container_logs(request)


def text(reply: ContainerLogEntries) -> bytes:
    return b"".join(entry.raw for entry in reply.entries)


async def until(world: World, wanted: bytes, container_id: str = "c1") -> ContainerLogEntries:
    """Follow from the beginning until all of *wanted* is there."""
    found, cursor = b"", "0"
    while True:
        reply = await logs(world, container_id, cursor=cursor, wait_s=30)
        found, cursor = found + text(reply), reply.cursor
        if found == wanted:
            return reply
        assert wanted.startswith(found)
        assert not reply.ended


async def test_output_is_kept_in_order_with_time_and_stream(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK) as world:
        await until(world, b"one\ntwo\n")
        reply = await logs(world, None)
        assert [(e.stream, e.data) for e in reply.entries] == [("stdout", "one\n"), ("stderr", "two\n")]
        assert (reply.container_id, reply.more, reply.ended) == ("c1", False, False)
        assert text(await logs(world, tail=1)) == b"two\n"
        assert text(await logs(world, max_bytes=5)) == b"one\nt"
        assert text(await logs(world, since=reply.entries[0].time)) == b"one\ntwo\n"
        assert text(await logs(world, until=reply.entries[0].time)) == b""


async def test_following_ends_with_the_container(tmp_path: Path) -> None:
    async with world_with(tmp_path, "echo one; sleep 0.05; echo two") as world:
        found, cursor = b"", "0"
        while not (reply := await logs(world, cursor=cursor, wait_s=30)).ended:
            found, cursor = found + text(reply), reply.cursor
        assert found + text(reply) == b"one\ntwo\n"


async def test_following_goes_on_over_restarts_by_policy_until_a_stop(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.clock = lambda: datetime(2030, 1, 1, tzinfo=UTC)  # restarts come when the test says so
    await world.start()
    world.pods.start_restarts()
    (container,) = spec("echo one; exit 1").containers
    again = container.model_copy(update={"restart_policy": RestartPolicy.ALWAYS})
    await world.pods.run(PodSpec(id="p1", containers=(again,)), world.call("pod.run"))
    first = await until(world, b"one\n")
    assert not first.ended
    while not world.naps.count:  # noqa: ASYNC110 -- until its restart is waited for
        await asyncio.sleep(0)
    following = asyncio.ensure_future(logs(world, cursor=first.cursor, wait_s=30))
    world.naps.wake()
    reply = await following
    assert (text(reply), reply.ended) == (b"one\n", False)
    last = asyncio.ensure_future(logs(world, cursor=reply.cursor, wait_s=30))
    await world.pods.stop_container("p1", "c1", 0, world.call("container.stop"))
    assert (await last).ended  # also where the container had ended by itself before
    await world.close()


async def test_logs_survive_a_restart_of_the_node_agent_and_nothing_comes_twice(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK) as world:
        await until(world, b"one\ntwo\n")
        await world.restart()
        await world.pods.recover()
        await world.pods.stop("p1", 1, world.call("pod.stop"))
        assert text(await logs(world)) == b"one\ntwo\n"
        assert (await logs(world)).ended
        await world.pods.start("p1", world.call("pod.start"))
        await until(world, b"one\ntwo\none\ntwo\n")


async def test_the_last_words_of_a_pod_that_stops_are_kept(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK) as world:
        await world.pods.stop("p1", 5, world.call("pod.stop"))
        assert text(await logs(world)) == b"one\ntwo\n"


async def test_logs_go_with_container_and_pod(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK, "echo three") as world:
        await until(world, b"one\ntwo\n")
        await until(world, b"three\n", "c2")
        with pytest.raises(InvalidArgumentError, match="c1, c2"):
            await logs(world, None)
        await world.pods.delete_container("p1", "c2", True, world.call("container.delete"))
        assert os.listdir(tmp_path / "logs/p1") == ["c1"]
        follower = asyncio.ensure_future(logs(world, cursor="8", wait_s=60))
        await asyncio.sleep(0)
        await world.pods.delete("p1", True, world.call("pod.delete"))
        with contextlib.suppress(NotFoundError):  # it may look before or after the pod is forgotten
            assert (await follower).ended
        assert os.listdir(tmp_path / "logs") == []


async def test_logs_of_no_pod_are_found_by_the_audit(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK) as world:
        await until(world, b"one\ntwo\n")
        (tmp_path / "logs/gone/c1").mkdir(parents=True)
        audit = await world.pods.audit(repair=True)
        assert [(h.pod_id, h.orphan) for h in audit.holdings if h.kind == "logs"] == [
            (None, True),
            ("p1", False),
        ]
        assert os.listdir(tmp_path / "logs") == ["p1"]


async def test_who_follows_is_told_when_the_node_stops(tmp_path: Path) -> None:
    async with world_with(tmp_path, TALK) as world:
        await until(world, b"one\ntwo\n")
        follower = asyncio.ensure_future(logs(world, cursor="8", wait_s=60))
        pieces = world.pods.logs.subscribe("p1", "c1")
        subscriber = asyncio.ensure_future(anext(pieces))
        while world.pods.logs.followers < 2:  # noqa: ASYNC110 -- they wait, and nothing tells that they do
            await asyncio.sleep(0)
        world.pods.logs.end_waits()
        assert (await follower).entries == ()
        with pytest.raises(UnavailableError):
            await subscriber


async def test_a_subscriber_gets_all_from_its_position_on(tmp_path: Path) -> None:
    async with world_with(tmp_path, "echo one; sleep 0.05; echo two") as world:
        pieces = [
            piece async for batch in world.pods.logs.subscribe("p1", "c1", position=0) for piece in batch
        ]
        assert b"".join(piece.data for piece in pieces) == b"one\ntwo\n"


async def test_an_end_that_is_recorded_while_the_log_is_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world_with(tmp_path, "echo one; sleep infinity") as world:
        await until(world, b"one\n")
        loop = asyncio.get_running_loop()
        read, ended = pump._read, list[bool]()

        def slow(*args: Any) -> Chunk:
            """Read; the container ends, and that is recorded, before anybody listens."""
            chunk = read(*args)
            if not ended:
                ended.append(True)
                killed = world.pods.kill_container("p1", "c1", 9, False, world.call("container.kill"))
                asyncio.run_coroutine_threadsafe(killed, loop).result()
                gone = world.pods.wait_container("p1", "c1", "exited")
                asyncio.run_coroutine_threadsafe(gone, loop).result()
                while not args[0].at_rest:
                    time.sleep(0.001)
            return chunk

        with monkeypatch.context() as patch:
            patch.setattr(pump, "_read", slow)
            patch.setattr(world.pods.logs, "_ring", lambda pod_id: None)
            async with asyncio.timeout(10):
                assert (await logs(world, cursor="4", wait_s=60)).ended


class GappyFeed:
    """A feed whose guest has dropped 100 bytes of one container, and names one that is not the pod's."""

    async def records(self) -> AsyncIterator[list[LogRecord]]:
        yield [LogRecord("c1", 7, "stdout", 100, time.time_ns(), b"late\n")]
        yield [LogRecord("other", 7, "stdout", 999, time.time_ns(), b"late\n")]

    async def close(self) -> None:
        pass


class GappySession:
    """A session with nothing but logs."""

    async def follow_logs(self, *_: object, **__: object) -> GappyFeed:
        return GappyFeed()


async def test_lost_output_is_counted(tmp_path: Path) -> None:
    async with world_with(tmp_path, "sleep infinity") as world:
        assert world.pods.logs.lost_bytes == 0
        await world.pods.logs.pump("p1", cast(GuestSession, GappySession()))
        assert world.pods.logs.lost_bytes == 100
