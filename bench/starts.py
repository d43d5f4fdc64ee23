"""``pod-start`` and ``cold-start``: from ``pod.run`` over NATS to the container's process running."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Literal

from bench.bare import Floor, floor
from bench.boot import time_guest
from bench.options import Options
from bench.report import Result, Series
from bench.stage import IMAGE, Stage, stage
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodStatus

ARGS = ("/bin/sleep", "86400")
CONTAINER = ContainerSpec(id="main", image=IMAGE, cmd=Cmd(args=ARGS))
WARM = "[templates]\nwarm = [{ vcpu_count = 1, mem_size_mib = 256 }]\n"
WARM_TIMEOUT_S = 180.0
_numbers = itertools.count()


def spec(template: Literal["auto", "require", "never"]) -> PodSpec:
    """A pod of 256 MiB with one container that sleeps."""
    return PodSpec(id=f"pod{next(_numbers)}", template=template, containers=(CONTAINER,))


async def run(held: Stage, template: Literal["auto", "require", "never"]) -> tuple[float, PodStatus]:
    """Milliseconds of one ``pod.run``, and the pod."""
    began = time.perf_counter()
    status = await held.node.pod_run(spec(template))
    return (time.perf_counter() - began) * 1000, status


async def warm(held: Stage) -> None:
    """Start pods until one is a clone: the template is there."""
    async with asyncio.timeout(WARM_TIMEOUT_S):
        while True:
            _, status = await run(held, "auto")
            await held.node.pod_delete(status.pod_id, force=True)
            if "boot" not in status.phases_ms:
                return


def image_file(held: Stage) -> Path:
    """The image as the node keeps it; the floor attaches the same file."""
    [found] = (held.root / "state").rglob("sha256-*.erofs")
    return found


def bare_start(bare: Floor, image: Path) -> float:
    """Milliseconds from the start of a bare clone to the process in its image running."""
    began = time.perf_counter()
    vm = bare.clone()
    try:
        vm.plug(image, "bench")
        vm.ask(do="start", disk="bench", args=ARGS)
        return (time.perf_counter() - began) * 1000
    finally:
        vm.kill()


async def pod_start(options: Options) -> Result:
    """Clone in turn by the node and by a script."""
    rounds = 5 if options.quick else 40
    ours: list[float] = []
    least: list[float] = []
    phases: dict[str, list[float]] = {}
    async with stage(guest_dir=options.guest_dir, settings=WARM) as held:
        with floor(options) as bare:
            await asyncio.to_thread(bare.make_template)
            await warm(held)
            image = image_file(held)
            await asyncio.to_thread(bare_start, bare, image)
            for _ in range(rounds):
                least.append(await asyncio.to_thread(bare_start, bare, image))
                took, status = await run(held, "require")
                ours.append(took)
                for name, value in status.phases_ms.items():
                    phases.setdefault(name, []).append(value)
                await held.node.pod_delete(status.pod_id, force=True)
    script, node = Series("bare clone", "ms", tuple(least)), Series("pod.run", "ms", tuple(ours))
    parts = tuple(Series(f"  of which {name}", "ms", tuple(values)) for name, values in phases.items())
    return Result(
        "pod-start",
        node.median / script.median,
        of="pod.run over NATS to the container running, against clone, hot-plug, mount and fork by a script",
        reach=1.5,
        series=(script, node, *parts),
    )


async def cold_start(options: Options) -> Result:
    """Boot in turn by the node and by a script."""
    rounds = 3 if options.quick else 9
    ours: list[float] = []
    least: list[float] = []
    phases: dict[str, list[float]] = {}
    async with stage(guest_dir=options.guest_dir) as held:
        with floor(options) as bare:
            for _ in range(rounds):
                least.append((await asyncio.to_thread(time_guest, bare)) * 1000)
                took, status = await run(held, "never")
                ours.append(took)
                for name, value in status.phases_ms.items():
                    phases.setdefault(name, []).append(value)
                await held.node.pod_delete(status.pod_id, force=True)
    script, node = Series("bare boot", "ms", tuple(least)), Series("pod.run", "ms", tuple(ours))
    parts = tuple(Series(f"  of which {name}", "ms", tuple(values)) for name, values in phases.items())
    return Result(
        "cold-start",
        node.median / script.median,
        of="pod.run with template 'never' to the container running, against a bare boot to the agent's hello",
        reach=1.25,
        series=(script, node, *parts),
    )
