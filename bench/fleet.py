"""``fleet``: placements among many simulated nodes on one server.

A placement of `Fleet.place` needs, in a fleet of any size above 24 nodes:

- a call for bids to so many shares that about 12 nodes hear it, and their bids;
- ``pod.run`` with the reservation of the best, and its reply; ``pod.release`` to others, without replies;
- of the node that runs it: its events, and the pod's status when it has changed, each acknowledged.

Exactly how many is counted in each run (`Traffic`), and the floor is the same number of requests with as
many bytes, and of KV puts, by processes that have nothing but nats-py, on the same server beside the same
idle fleet. All share the machine, so a rate is what it can do in all: nodes, server and scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crowd import cpu_seconds
from bench.many import IMAGE
from bench.options import Options
from bench.report import Curve, Result, Series
from bench.traffic import Traffic, counted, free_port, server_variables
from vcnode.bus.embedded import EmbeddedNats
from vcnode.client import Client, Fleet
from vcnode.client.fleet import Placement
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.settings import NatsSettings

PER_PROCESS = 500
"""Simulated nodes of one process: each has a thread and some files."""
LEASE_S = 60.0
IN_FLIGHT = 16
ASKING, ANSWERING = 2, 2
"""Processes of the floor; two cores are busy with less."""
SAMPLE = 30
"""Placements of which every message is counted."""
AT = 1000
"""The size whose ratio counts."""
IDLE_S = 12.0
ACK_BYTES = 60
"""About what JetStream answers when it has kept a message."""
PATIENCE_S = 30.0
START_LIMIT_S = 420.0
FLOOR_LIMIT_S = 120.0
SUBJECT, BUCKET = "bench.floor", "bench-floor"
CONTAINER = ContainerSpec(id="main", image=IMAGE, cmd=Cmd(args=("sleep", "600")))
_numbers = itertools.count()


@dataclass(slots=True)
class Point:
    """What was measured with so many nodes."""

    nodes: int
    alone_ms: list[float] = field(default_factory=list)
    """Of each placement with no other beside it."""
    floor_alone_ms: float = 0.0
    """Of the floor, one request after the other."""
    crowded_ms: list[float] = field(default_factory=list)
    """Of each with `IN_FLIGHT` at once."""
    rate: list[float] = field(default_factory=list)
    """Placements per second, by rounds."""
    floor_rate: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    """CPU of the server for one placement, by rounds."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU of everything for one placement."""
    floor_cpu_ms: list[float] = field(default_factory=list)
    idle: dict[str, float] = field(default_factory=dict)
    messages: dict[str, float] = field(default_factory=dict)
    """Of one placement, by purpose."""

    @property
    def cost_ms(self) -> float:
        """Milliseconds of the machine for one placement."""
        return 1000 / statistics.median(self.rate)

    @property
    def floor_ms(self) -> float:
        """The same of the floor."""
        return 1000 / statistics.median(self.floor_rate)

    def facts(self) -> dict[str, Any]:
        """For the JSON line."""
        alone, crowded = (Series("", "ms", tuple(samples)) for samples in (self.alone_ms, self.crowded_ms))
        return {
            "placements_per_s": round(statistics.median(self.rate), 1),
            "alone_p50_ms": round(alone.median, 2),
            "alone_p99_ms": round(alone.quantile(0.99), 2),
            "floor_alone_ms": round(self.floor_alone_ms, 2),
            "crowded_p50_ms": round(crowded.median, 2),
            "crowded_p99_ms": round(crowded.quantile(0.99), 2),
            "cpu_ms": round(statistics.median(self.cpu_ms), 2),
            "floor_cpu_ms": round(statistics.median(self.floor_cpu_ms), 2),
            "server_cpu_ms": round(statistics.median(self.server_ms), 2),
            "messages": {purpose: round(count, 1) for purpose, count in sorted(self.messages.items())},
            "idle": {name: round(value, 3) for name, value in self.idle.items()},
        }


class Stage:
    """One server, simulated nodes in some processes, and the fleet's view of them."""

    def __init__(
        self,
        root: Path,
        nats: EmbeddedNats,
        monitor_port: int,
        client: Client,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.root = root
        self.nats = nats
        self.client = client
        self._stack = stack
        self._monitor_port = monitor_port
        self._fleet: Fleet | None = None
        self._processes: list[asyncio.subprocess.Process] = []
        self._nodes = 0

    @property
    def fleet(self) -> Fleet:
        """The scheduler's view, there once there are nodes."""
        if self._fleet is None:
            raise RuntimeError("there is no node yet")
        return self._fleet

    @property
    def server_pid(self) -> int:
        """Process of the server."""
        if self.nats.pid is None:
            raise RuntimeError("nats-server has ended")
        return self.nats.pid

    def cpu_s(self) -> float:
        """CPU that nodes, server and scheduler have used so far."""
        return time.process_time() + sum(
            cpu_seconds(pid) for pid in (self.server_pid, *(process.pid for process in self._processes))
        )

    async def grow(self, nodes: int) -> None:
        """Start nodes until there are so many, and wait until the fleet has their leases."""
        ready = []
        while self._nodes < nodes:
            count = min(PER_PROCESS, nodes - self._nodes)
            arguments = (self.nats.url, str(self.root), str(self._nodes), str(count), str(LEASE_S))
            process = await _python("-m", "bench.many", *arguments)
            self._processes.append(process)
            self._stack.push_async_callback(_end, [process])
            self._nodes += count
            ready.append(_says(process, "ready"))
        async with asyncio.timeout(START_LIMIT_S):
            await asyncio.gather(*ready)
            if self._fleet is None:
                self._fleet = await self._stack.enter_async_context(Fleet(self.client))
            async for _ in self._fleet.watch():
                if len(self._fleet.nodes) >= nodes:
                    break

    async def variables(self) -> dict[str, Any]:
        """The server's own figures."""
        return await asyncio.to_thread(server_variables, self._monitor_port)

    async def renewals(self) -> int:
        """Leases written so far."""
        info = await self.client._requester.client.jetstream().stream_info("KV_vcnode-nodes")
        return int(info.state.last_seq)


@contextlib.asynccontextmanager
async def _stage() -> AsyncIterator[Stage]:
    # In memory where there is some: one disk for thousands of hosts is not what is measured.
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="vcfleet-", dir=memory if memory.is_dir() else "/var/tmp"))
    port = free_port()
    try:
        async with contextlib.AsyncExitStack() as stack:
            server = EmbeddedNats(root / "nats", config=f"http: 127.0.0.1:{port}")
            await stack.enter_async_context(server)
            client = await stack.enter_async_context(await Client.connect(NatsSettings(url=server.url)))
            await client._requester.client.jetstream().create_key_value(bucket=BUCKET, history=1, direct=True)
            yield Stage(root, server, port, client, stack)
    finally:
        await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)


async def _python(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )


async def _says(process: asyncio.subprocess.Process, word: str) -> None:
    if process.stdout is None or (await process.stdout.readline()).decode().strip() != word:
        raise RuntimeError(f"process {process.pid} of the benchmark ended before it was {word}")


async def _end(processes: Iterable[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.kill()  # they hold nothing, and their files are thrown away
        await process.wait()


# ---- what is measured ------------------------------------------------------------------------------------


async def _place(held: Stage) -> tuple[float, Placement]:
    spec = PodSpec(id=f"p{next(_numbers):07}", containers=(CONTAINER,))
    began = time.perf_counter()
    placed = await held.fleet.place(spec, patience_s=PATIENCE_S, hold_s=PATIENCE_S)
    return (time.perf_counter() - began) * 1000, placed


async def _place_many(held: Stage, count: int, in_flight: int) -> list[tuple[float, Placement]]:
    """Milliseconds of each of so many placements, and the pods."""
    left = iter(range(count))
    done: list[tuple[float, Placement]] = []

    async def work() -> None:
        for _ in left:
            done.append(await _place(held))  # noqa: PERF401 -- several workers fill it

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(work())
    return done


async def _remove(held: Stage, placed: Iterable[tuple[float, Placement]]) -> None:
    left = iter([one for _, one in placed])

    async def work() -> None:
        for one in left:
            await held.client.node(one.node).pod_delete(one.pod.pod_id, force=True)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(work())


async def _count_messages(held: Stage, point: Point) -> Traffic:
    async with counted(held.nats.url) as traffic:
        placed = await _place_many(held, SAMPLE, 1)
        # What the node has to say of the last one is on its way.
        await asyncio.sleep(0.5)
    await _remove(held, placed)
    point.messages = {
        purpose: count / SAMPLE for purpose, count in traffic.count.items() if purpose != "lease"
    }
    return traffic


def floor_placement(traffic: Traffic, placements: int) -> dict[str, Any]:
    """The requests, with bytes out and back, and the puts that so many placements have needed, for one.

    A reply among the messages is a bid, that of ``pod.run``, or an acknowledgement of JetStream, which there
    is of every event, status and lease, and of calls of its API.
    """

    def each(purpose: str) -> int:
        return round(traffic.count[purpose] / placements)

    acknowledged = ("pod.run", "event", "status of a pod", "lease", "other")
    bids = round((traffic.count["reply"] - sum(traffic.count[p] for p in acknowledged)) / placements)
    ask, bid = traffic.mean_bytes("call for bids"), traffic.mean_bytes("reply")
    requests = [(ask, bid)] * bids
    requests += [(traffic.mean_bytes("pod.run"), bid)] * each("pod.run")
    requests += [(traffic.mean_bytes("event"), ACK_BYTES)] * each("event")
    puts = [traffic.mean_bytes("status of a pod")] * each("status of a pod")
    return {"requests": requests, "puts": puts}


async def _floor(
    held: Stage, placement: dict[str, Any], count: int, *, asking: int = ASKING, in_flight: int = IN_FLIGHT
) -> tuple[float, float]:
    """Seconds, and CPU seconds, of so many bare placements."""
    script = str(Path(__file__).with_name("bare_fleet.py"))
    processes: list[asyncio.subprocess.Process] = []
    try:
        async with asyncio.timeout(FLOOR_LIMIT_S):
            for number in range(ANSWERING):
                process = await _python(script, "answer", held.nats.url, f"{SUBJECT}.{number}")
                processes.append(process)
            for number in range(asking):
                subject = f"{SUBJECT}.{number % ANSWERING}"
                share = (str(count // asking), str(in_flight // asking), json.dumps(placement))
                processes.append(await _python(script, "ask", held.nats.url, subject, BUCKET, *share))
            for process in processes:
                await _says(process, "ready")
            pids = [held.server_pid, *(process.pid for process in processes)]
            askers = processes[ANSWERING:]
            used, began = sum(map(cpu_seconds, pids)), time.perf_counter()
            for process in askers:
                if process.stdin is not None:
                    process.stdin.write(b"go\n")
            for process in askers:
                await _says(process, "done")
            took = time.perf_counter() - began
            return took, sum(map(cpu_seconds, pids)) - used
    finally:
        await _end(processes)


async def _idle(held: Stage, point: Point, window_s: float) -> None:
    """What nodes that do nothing cost: their leases, and the pings of their connections."""
    before, renewals, used = await held.variables(), await held.renewals(), cpu_seconds(held.server_pid)
    everything, began = held.cpu_s(), time.perf_counter()
    await asyncio.sleep(window_s)
    took = time.perf_counter() - began
    after, written = await held.variables(), await held.renewals() - renewals
    lease = max((node.lease for node in held.fleet.nodes.values()), key=lambda lease: lease.node)
    point.idle = {
        "renewals_per_s": written / took,
        "lease_bytes": len(lease.model_dump_json()),
        "wire_bytes_per_heartbeat": sum(after[k] - before[k] for k in ("in_bytes", "out_bytes"))
        / max(1, written),
        "server_cpu": (cpu_seconds(held.server_pid) - used) / took,
        "all_cpu": (held.cpu_s() - everything) / took,
        "server_mib": after["mem"] / 2**20,
        "subscriptions": after["subscriptions"],
    }


async def _measure(held: Stage, nodes: int, *, rounds: int, count: int, alone: int) -> Point:
    point = Point(nodes)
    await held.grow(nodes)
    await _remove(held, await _place_many(held, IN_FLIGHT, IN_FLIGHT))  # all is warm
    await _idle(held, point, IDLE_S)
    traffic = await _count_messages(held, point)
    placement = floor_placement(traffic, SAMPLE)
    placed = await _place_many(held, alone, 1)
    point.alone_ms += [took for took, _ in placed]
    await _remove(held, placed)
    took, _ = await _floor(held, placement, alone, asking=1, in_flight=1)
    point.floor_alone_ms = took / alone * 1000
    for _ in range(rounds):
        used, server = held.cpu_s(), cpu_seconds(held.server_pid)
        began = time.perf_counter()
        placed = await _place_many(held, count, IN_FLIGHT)
        took = time.perf_counter() - began
        background = point.idle["all_cpu"] * took
        point.cpu_ms.append((held.cpu_s() - used - background) / count * 1000)
        point.server_ms.append((cpu_seconds(held.server_pid) - server) / count * 1000)
        point.rate.append(count / took)
        point.crowded_ms += [took for took, _ in placed]
        await _remove(held, placed)
        floor_s, floor_cpu_s = await _floor(held, placement, count)
        point.floor_rate.append(count / floor_s)
        background = point.idle["server_cpu"] * floor_s
        point.floor_cpu_ms.append((floor_cpu_s - background) / count * 1000)
    return point


def growth(points: Iterable[Point]) -> float:
    """The exponent *e* of a cost that grows as ``nodes ** e``, from the fewest nodes to the most."""
    ordered = sorted(points, key=lambda point: point.nodes)
    few, many = ordered[0], ordered[-1]
    return math.log(many.cost_ms / few.cost_ms) / math.log(many.nodes / few.nodes)


async def fleet(options: Options) -> Result:
    """Let a fleet grow, and place pods in it at each size, by turns with the floor."""
    sizes, rounds, count = ((100, 1000), 2, 100) if options.quick else ((100, 1000, 5000), 3, 300)
    points: list[Point] = []
    async with _stage() as held:
        for nodes in sizes:
            points.append(await _measure(held, nodes, rounds=rounds, count=count, alone=count // 2))
            print(f"  {nodes} nodes: {json.dumps(points[-1].facts())}", flush=True)
    at = next(point for point in points if point.nodes == AT)
    exponent = growth(points)
    return Result(
        "fleet",
        at.cost_ms / at.floor_ms,
        of=f"a placement among {AT} simulated nodes, against as many bare requests and KV puts",
        reach=2.0,
        besides=exponent < 1,
        series=[
            series
            for point in points
            for series in (
                Series(f"placement, {point.nodes} nodes, alone", "ms", tuple(point.alone_ms)),
                Series(f"placements, {point.nodes} nodes", "1/s", tuple(point.rate)),
                Series(f"floor, {point.nodes} nodes", "1/s", tuple(point.floor_rate)),
            )
        ],
        facts={
            "ratio_alone": round(statistics.median(at.alone_ms) / at.floor_alone_ms, 3),
            "ratio_cpu": round(statistics.median(at.cpu_ms) / statistics.median(at.floor_cpu_ms), 3),
            "growth_exponent": round(exponent, 3),
            "by_nodes": {str(point.nodes): point.facts() for point in points},
        },
        curves=(
            Curve("placement", tuple((point.nodes, point.cost_ms) for point in points)),
            Curve("floor", tuple((point.nodes, point.floor_ms) for point in points)),
        ),
    )
