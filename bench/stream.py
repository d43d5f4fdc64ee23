"""``stream``: bytes out of a container and into it, over NATS."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from bench.bare import BareVm, floor
from bench.options import Options
from bench.report import Result, Series
from bench.stage import stage
from bench.starts import run
from vcnode.client import NodeClient

BLOCK = bytes(128 * 1024)


@dataclass
class _Seconds:
    """Samples of one side, in seconds."""

    out: list[float] = field(default_factory=list)
    into: list[float] = field(default_factory=list)

    def total(self) -> float:
        return Series("", "", tuple(a + b for a, b in zip(self.out, self.into, strict=True))).median


async def _out(node: NodeClient, pod_id: str, size: int) -> float:
    """Seconds for a container to write *size* bytes that arrive here."""
    began = time.perf_counter()
    command = ["/bin/dd", "if=/dev/zero", "bs=128k", f"count={size // len(BLOCK)}", "status=none"]
    async with node.exec_stream(pod_id, "main", command) as process:
        got = 0
        async for name, chunk in process.output():
            if name == "stdout":
                got += len(chunk)
        if (code := await process.wait()) or got != size:
            raise RuntimeError(f"{got} of {size} bytes came, exit code {code}")
    return time.perf_counter() - began


async def _into(node: NodeClient, pod_id: str, size: int) -> float:
    """Seconds for *size* bytes from here until a process in the container has read them all."""
    began = time.perf_counter()
    command = ["/bin/dd", "of=/dev/null", "bs=128k", "status=none"]
    async with node.exec_stream(pod_id, "main", command) as process:
        for _ in range(size // len(BLOCK)):
            await process.stdin.write(BLOCK)
        await process.stdin.close()
        if code := await process.wait():
            raise RuntimeError(f"dd ended with {code}")
    return time.perf_counter() - began


def _bare(vm: BareVm, size: int, seconds: _Seconds) -> None:
    """The same bytes over the bare port: written by the guest, then read by it, by nobody else."""
    began = time.perf_counter()
    vm.receive(size)
    seconds.out.append(time.perf_counter() - began)
    began = time.perf_counter()
    vm.send(BLOCK, size)
    seconds.into.append(time.perf_counter() - began)


async def stream(options: Options) -> Result:
    """Move bytes both ways, in turn through vcnode and over a bare port."""
    size, rounds = ((64 << 20), 3) if options.quick else ((256 << 20), 5)
    ours, least = _Seconds(), _Seconds()
    async with stage(options) as held:
        _, pod = await run(held, "never")
        with floor(options) as bare:
            vm = await asyncio.to_thread(bare.boot)
            try:
                for turn in range(rounds + 1):
                    seconds = (_Seconds(), _Seconds()) if turn == 0 else (ours, least)  # the first warms up
                    await asyncio.to_thread(_bare, vm, size, seconds[1])
                    seconds[0].out.append(await _out(held.node, pod.pod_id, size))
                    seconds[0].into.append(await _into(held.node, pod.pod_id, size))
            finally:
                vm.kill()

    def series(name: str, samples: list[float]) -> Series:
        return Series(name, "MiB/s", tuple(size / 2**20 / sample for sample in samples))

    script_out, node_out = series("bare port, out", least.out), series("exec, out", ours.out)
    script_in, node_in = series("bare port, in", least.into), series("exec, in", ours.into)
    return Result(
        "stream",
        ours.total() / least.total(),
        of=f"{size >> 20} MiB out of a container and into it over NATS, against the bare serial port",
        reach=2.0,
        series=(script_out, node_out, script_in, node_in),
        facts={
            "ratio_out": round(script_out.median / node_out.median, 4),
            "ratio_in": round(script_in.median / node_in.median, 4),
        },
    )
