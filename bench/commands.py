"""``commands``: status requests per second through one node, against an echo service."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

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
    async with stage(hypervisor="mock") as held, _echo(held.nats.url):
        container = ContainerSpec(id="main", image=IMAGE, cmd=Cmd(args=("sleep", "600")))
        await held.node.pod_run(PodSpec(id="bench", containers=(container,)))
        subject = f"vcnode.rpc.{NODE}.pod.status"

        async def rate(target: str, number: int) -> float:
            port = held.nats.port
            seconds = await asyncio.to_thread(flood, port, target, BODY, in_flight=IN_FLIGHT, count=number)
            return number / seconds

        for target in (subject, ECHO):  # both warm
            await rate(target, 500)
        for _ in range(rounds):
            floor.append(await rate(ECHO, count))
            ours.append(await rate(subject, count))
    mine, echo = Series("pod.status", "1/s", tuple(ours)), Series("echo", "1/s", tuple(floor))
    return Result(
        "commands",
        mine.median / echo.median,
        of=f"pod.status per second, {IN_FLIGHT} in flight, against an echo with nats-py on the same server",
        reach=0.5,
        at_most=False,
        series=(echo, mine),
    )


@contextlib.asynccontextmanager
async def _echo(url: str) -> AsyncIterator[None]:
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
        yield
    finally:
        process.kill()
        await process.wait()
