"""``exec``: ``container.exec`` of ``true`` over NATS."""

from __future__ import annotations

import asyncio
import time

from bench.bare import BareVm, floor
from bench.options import Options
from bench.report import Result, Series
from bench.stage import stage
from bench.starts import run

ARGS = ("/bin/true",)


def bare_exec(vm: BareVm) -> float:
    """Milliseconds of fork, exec and wait in a bare guest, asked for over the same kind of port."""
    began = time.perf_counter()
    code = vm.ask(do="run", args=ARGS)["code"]
    if code:
        raise RuntimeError(f"true ended with {code}")
    return (time.perf_counter() - began) * 1000


async def execute(options: Options) -> Result:
    """Run ``true`` in turn in a container and in a bare guest."""
    rounds = 40 if options.quick else 400
    ours: list[float] = []
    least: list[float] = []
    async with stage(options) as held:
        _, pod = await run(held, "never")
        with floor(options) as bare:
            vm = await asyncio.to_thread(bare.boot)
            try:
                for turn in range(rounds + 10):
                    bare_ms = await asyncio.to_thread(bare_exec, vm)
                    began = time.perf_counter()
                    result = await held.node.container_exec(pod.pod_id, "main", ARGS)
                    took = (time.perf_counter() - began) * 1000
                    if result.exit_code:
                        raise RuntimeError(f"true ended with {result.exit_code}: {result.stderr}")
                    if turn >= 10:  # before that both guests are translated for the first time
                        least.append(bare_ms)
                        ours.append(took)
            finally:
                vm.kill()
    script, node = Series("fork, exec, wait", "ms", tuple(least)), Series("container.exec", "ms", tuple(ours))
    return Result(
        "exec",
        node.median / script.median,
        of="container.exec of true over NATS, against fork, exec and wait in a bare guest",
        reach=2.0,
        series=(script, node),
        facts={"ratio_p99": round(node.quantile(0.99) / script.quantile(0.99), 4)},
    )
