"""``commands``: status requests per second through one node, against an echo service."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from bench.crowd import cpu_seconds
from bench.flood import flood
from bench.options import Options
from bench.report import Result, Series
from bench.stage import IMAGE, NODE, stage
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec

IN_FLIGHT = 64
ECHO = "bench.echo"
BODY = b'{"pod_id":"bench"}'


async def commands(options: Options) -> Result:
    """Flood node and echo in turn from one raw client on one server."""
    rounds, count = (5, 3000) if options.quick else (15, 10_000)
    ours: list[float] = []
    floor: list[float] = []
    small: list[float] = []
    async with stage(options, hypervisor="mock") as held, _echo(held.nats.url) as echo_pid:
        container = ContainerSpec(id="main", image=IMAGE, cmd=Cmd(args=("sleep", "600")))
        status = await held.node.pod_run(PodSpec(id="bench", containers=(container,)))
        reply = status.model_dump_json().encode()  # the echo moves the same bytes to the caller
        subject = f"vcnode.rpc.{NODE}.pod.status"

        async def rate(target: str, number: int, body: bytes) -> float:
            port = held.nats.port
            seconds = await asyncio.to_thread(flood, port, target, body, in_flight=IN_FLIGHT, count=number)
            return number / seconds

        for target in (subject, ECHO):  # both warm
            await rate(target, 500, BODY)
        used = {echo_pid: 0.0, held.pid: 0.0}

        async def accounted(pid: int, target: str, body: bytes) -> float:
            before = cpu_seconds(pid)
            found = await rate(target, count, body)
            used[pid] += cpu_seconds(pid) - before
            return found

        for _ in range(rounds):
            floor.append(await accounted(echo_pid, ECHO, reply))
            ours.append(await accounted(held.pid, subject, BODY))
            small.append(await rate(ECHO, count, BODY))
    mine, echo = Series("pod.status", "1/s", tuple(ours)), Series("echo", "1/s", tuple(floor))
    tiny = Series("echo of the request", "1/s", tuple(small))
    return Result(
        "commands",
        mine.median / echo.median,
        of=f"pod.status per second, {IN_FLIGHT} in flight, against an echo of as many bytes with nats-py",
        reach=0.5,
        at_most=False,
        series=(echo, mine, tiny),
        facts={
            "reply_bytes": len(reply),
            "cpu_us_echo": round(used[echo_pid] / rounds / count * 1e6, 1),
            "cpu_us_node": round(used[held.pid] / rounds / count * 1e6, 1),
            "ratio_to_echo_of_request": round(mine.median / tiny.median, 4),
        },
    )


@contextlib.asynccontextmanager
async def _echo(url: str) -> AsyncIterator[int]:
    """The echo service; gives its process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("echo.py")),
        url,
        ECHO,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        if process.stdout is None or await process.stdout.readline() != b"ready\n":
            raise RuntimeError("the echo service did not come up")
        yield process.pid
    finally:
        process.kill()
        await process.wait()
