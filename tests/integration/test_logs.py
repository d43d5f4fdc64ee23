"""Logs of a real VM: kept across restarts of the node agent, and a flood that hurts nobody."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.models.call import Call
from vcnode.models.logs import ContainerLogs
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import Node, running
from vcnode.settings import LogSettings, NatsSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

_numbers = itertools.count(1)
COUNT = (
    "i=0; while [ $i -lt 1000000 ]; do echo line $i; i=$((i+1)); [ $((i % 50)) -ne 0 ] || sleep 0.05; done"
)


def call(verb: str) -> Call:
    return Call(f"cmd-{next(_numbers)}", verb)


async def follow(node: Node, container_id: str, cursor: str, until: bytes) -> tuple[bytes, str]:
    """Everything from *cursor* on, until it holds *until*."""
    found = b""
    async with asyncio.timeout(120):
        while until not in found:
            request = ContainerLogs(pod_id="p1", container_id=container_id, cursor=cursor, wait_s=60)
            reply = await node.pods.container_logs(request)
            found, cursor = found + b"".join(e.raw for e in reply.entries), reply.cursor
    return found, cursor


async def test_logs_of_a_real_vm(guest_image: Path, short_dir: Path) -> None:
    make_busybox(short_dir / "box")
    settings = Settings(
        node_name="logs",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(short_dir,),
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=120),
        logs=LogSettings(max_mib_per_s=1, max_file_mib=1, max_files=2, min_free_mib=0),
    )

    def container(container_id: str, script: str) -> ContainerSpec:
        args = ("/bin/sh", "-c", script)
        return ContainerSpec(id=container_id, rootfs=str(short_dir / "box"), cmd=Cmd(args=args))

    spec = PodSpec(id="p1", template="never", containers=(container("count", COUNT),))
    try:
        async with running(settings) as node:
            await node.pods.run(spec, call("pod.run"))
            before, cursor = await follow(node, "count", "0", b"line 99\n")
        async with running(settings) as node:
            after, _ = await follow(node, "count", cursor, b"line 400\n")
            numbers = [int(n) for n in re.findall(rb"line (\d+)\n", before + after)]
            assert numbers == list(range(len(numbers)))  # nothing lost, nothing twice
            await node.pods.create_container("p1", container("flood", "yes; true"), call("test"))
            await node.pods.start_container("p1", "flood", call("test"))
            flood, _ = await follow(node, "flood", "0", b"bytes of output were dropped")
            assert flood.startswith(b"y\ny\n")
            await node.pods.kill_container("p1", "flood", 9, True, call("test"))
            stopped = await node.pods.stop("p1", 5, call("pod.stop"))
            assert stopped.outcome == "graceful"
            last = await node.pods.container_logs(ContainerLogs(pod_id="p1", container_id="count", tail=1))
            assert re.fullmatch(rb"line \d+\n", b"".join(e.raw for e in last.entries))
            assert last.ended
            sizes = [f.stat().st_size for f in (short_dir / "s/logs/p1/flood").iterdir()]
            assert len(sizes) <= 2
            assert max(sizes) < 2 << 20
    finally:
        async with running(settings) as node:
            await node.pods.delete("p1", True, call("pod.delete"))
            assert list((short_dir / "s/logs").iterdir()) == []
