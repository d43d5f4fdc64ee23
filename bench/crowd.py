"""``burst`` and ``density``: many pods at once, and many that do nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.bare import BareVm, Floor, floor
from bench.options import Options
from bench.report import Result, Series
from bench.stage import stage
from bench.starts import WARM, bare_pod, image_file, run, warm

PARALLEL = (1, 2, 4, 8)
"""How many clones the script starts at once; the best of the first round counts, and is repeated."""
SETTLE_S = 5.0
"""Between the last start and the measurement, for what only a start costs."""


def bare_burst(bare: Floor, image: Path, count: int, parallel: int) -> float:
    """Milliseconds until *count* bare clones run a process, *parallel* being started at once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        vms = list(pool.map(lambda _: bare_pod(bare, image), range(count)))
    took = (time.perf_counter() - began) * 1000
    _kill(vms)
    return took


def _kill(vms: Iterable[BareVm]) -> None:
    for vm in vms:
        vm.kill()


async def burst(options: Options) -> Result:
    """Ask for many pods at once, by turns of the node and of a script."""
    rounds, count = (1, 10) if options.quick else (3, 50)
    ours: list[float] = []
    bare_ms: dict[int, list[float]] = {parallel: [] for parallel in PARALLEL}
    async with stage(options, settings=WARM) as held:
        with floor(options) as bare:
            await asyncio.to_thread(bare.make_template)
            await warm(held)
            image = await image_file(held)
            candidates = PARALLEL
            for _ in range(rounds):
                for parallel in candidates:
                    took = await asyncio.to_thread(bare_burst, bare, image, count, parallel)
                    bare_ms[parallel].append(took)
                candidates = (min(bare_ms, key=lambda p: min(bare_ms[p])),)
                began = time.perf_counter()
                pods = await asyncio.gather(*(run(held, "require") for _ in range(count)))
                ours.append((time.perf_counter() - began) * 1000)
                for _, status in pods:
                    await held.node.pod_delete(status.pod_id, force=True)
    scripts = {p: Series(f"script, {p} at once", "ms", tuple(bare_ms[p])) for p in PARALLEL}
    best = scripts[candidates[0]]
    node = Series("pod.run", "ms", tuple(ours))
    return Result(
        "burst",
        node.median / best.median,
        of=f"{count} pods asked for at once, against as many bare ones by a script at its best",
        reach=1.5,
        series=(*scripts.values(), node),
        facts={"pods": count, "best": best.name},
    )


def pss_mib(pid: int) -> float:
    """Memory of a process in MiB, what it shares counted in proportion. Source: proc(5), smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used. Source: proc(5), stat fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(vms: list[int], others: list[int], window_s: float) -> tuple[Series, Series]:
    """Memory of each VM, and CPU in per mille of a core per VM, what *others* use shared out to them."""
    await asyncio.sleep(SETTLE_S)
    before = {pid: cpu_seconds(pid) for pid in (*vms, *others)}
    began = time.perf_counter()
    await asyncio.sleep(window_s)
    elapsed = time.perf_counter() - began
    used = {pid: cpu_seconds(pid) - before[pid] for pid in before}
    share = sum(used[pid] for pid in others) / len(vms)
    cpu = tuple((used[pid] + share) / elapsed * 1000 for pid in vms)
    mean = (sum(cpu) / len(cpu),)  # the clock ticks in 10 ms: single VMs say nothing
    return Series("memory", "MiB", tuple(pss_mib(pid) for pid in vms)), Series("CPU", "per mille", mean)


async def _bare_crowd(options: Options, image: Path, count: int, window_s: float) -> tuple[Series, Series]:
    """Memory and CPU of bare clones in which the same process sleeps as in the pods."""
    with floor(options) as bare:
        await asyncio.to_thread(bare.make_template)
        vms: list[BareVm] = []
        try:
            for _ in range(count):
                vm = await asyncio.to_thread(bare_pod, bare, image)
                vms.append(vm)  # at once: it is to be killed whatever comes next
            return await measure([vm.process.pid for vm in vms], [], window_s)
        finally:
            _kill(vms)


async def density(options: Options) -> Result:
    """Let many bare clones be idle, then as many pods."""
    count, window_s = (6, 5.0) if options.quick else (60, 30.0)
    async with stage(options, settings=WARM) as held:
        least_mem, least_cpu = await _bare_crowd(options, await image_file(held), count, window_s)
        await warm(held)
        pids = []
        for _ in range(count):
            _, status = await run(held, "require")
            if status.hypervisor is None or status.hypervisor.pid is None:
                raise RuntimeError(f"pod {status.pod_id} has no process")
            pids.append(status.hypervisor.pid)
        mem, cpu = await measure(pids, [held.pid], window_s)
    memory = mem.median / least_mem.median
    # An idle bare clone may use less than one tick in all: then CPU is compared with that tick.
    tick = 1000 / os.sysconf("SC_CLK_TCK") / window_s / count
    processor = max(cpu.median, tick) / max(least_cpu.median, tick)
    return Result(
        "density",
        max(memory, processor),
        of=f"{count} idle pods of 256 MiB, node agent included, against bare ones: the worse ratio",
        reach=1.3,
        series=(
            Series("bare clone, memory", "MiB", least_mem.samples),
            Series("pod, memory", "MiB", mem.samples),
            Series("bare clone, CPU", "‰ core", least_cpu.samples),
            Series("pod, CPU", "‰ core", cpu.samples),
        ),
        facts={"pods": count, "ratio_memory": round(memory, 4), "ratio_cpu": round(processor, 4)},
    )
