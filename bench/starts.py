"""``pod-start``, ``pool-start``, ``cold-start``: ``pod.run`` over NATS to the container's process running."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from bench.bare import BareVm, Floor, floor
from bench.boot import time_guest
from bench.options import Options
from bench.report import Result, Series
from bench.stage import IMAGE, Stage, stage
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodStatus

ARGS = ("/bin/sleep", "86400")
CONTAINER = ContainerSpec(id="main", image=IMAGE, cmd=Cmd(args=ARGS))
WARM = "[templates]\nwarm = [{ vcpu_count = 1, mem_size_mib = 256 }]\n"
WARM_TIMEOUT_S = 180.0
SPARES = 3
POOL = f"{WARM}[[pool]]\nvcpu_count = 1\nmem_size_mib = 256\nspares = {SPARES}\n"
_numbers = itertools.count()

Template = Literal["auto", "require", "never"]


def spec(template: Template) -> PodSpec:
    """A pod of 256 MiB with one container that sleeps."""
    return PodSpec(id=f"pod{next(_numbers)}", template=template, containers=(CONTAINER,))


async def run(held: Stage, template: Template) -> tuple[float, PodStatus]:
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


async def spares(held: Stage) -> None:
    """Wait until the pool is full, which nothing announces."""
    async with asyncio.timeout(WARM_TIMEOUT_S):
        while sum(pool.ready for pool in (await held.node.node_info()).pool) < SPARES:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def image_file(held: Stage) -> Path:
    """The image as the node keeps it; the floor attaches the same file."""
    digest = (await held.node.image_status(IMAGE)).digest
    return held.root / "state" / "images" / f"{digest.replace(':', '-')}.erofs"


def bare_pod(bare: Floor, image: Path) -> BareVm:
    """A bare clone in whose image the same process runs as in a pod's container."""
    vm = bare.clone()
    try:
        vm.plug(image, "bench")
        vm.ask(do="start", disk="bench", args=ARGS)
    except BaseException:
        vm.kill()
        raise
    return vm


def bare_start(bare: Floor, image: Path) -> float:
    """Milliseconds from the start of a bare clone to the process in its image running."""
    began = time.perf_counter()
    vm = bare_pod(bare, image)
    took = (time.perf_counter() - began) * 1000
    vm.kill()
    return took


class Turns:
    """Samples of the floor and of the node, by turns, with the phases that the node reports."""

    def __init__(self) -> None:
        self.least: list[float] = []
        self.ours: list[float] = []
        self._phases: dict[str, list[float]] = {}

    async def run(self, held: Stage, template: Template) -> None:
        """Start one pod, and delete it."""
        took, status = await run(held, template)
        self.ours.append(took)
        for name, value in status.phases_ms.items():
            self._phases.setdefault(name, []).append(value)
        await held.node.pod_delete(status.pod_id, force=True)

    def result(self, bench: str, *, floor_name: str, of: str, reach: float) -> Result:
        """The ratio of the medians."""
        script = Series(floor_name, "ms", tuple(self.least))
        node = Series("pod.run", "ms", tuple(self.ours))
        parts = (Series(f"  of which {name}", "ms", tuple(ms)) for name, ms in self._phases.items())
        return Result(bench, node.median / script.median, of=of, reach=reach, series=(script, node, *parts))


@contextlib.asynccontextmanager
async def _both(options: Options, settings: str) -> AsyncIterator[tuple[Stage, Floor, Path]]:
    """A node with a template, a script with one, and the image that both attach."""
    async with stage(options, settings=settings) as held:
        with floor(options) as bare:
            await asyncio.to_thread(bare.make_template)
            await warm(held)
            image = await image_file(held)
            await asyncio.to_thread(bare_start, bare, image)
            yield held, bare, image


async def pod_start(options: Options) -> Result:
    """Clone in turn by the node and by a script."""
    turns = Turns()
    async with _both(options, WARM) as (held, bare, image):
        for _ in range(5 if options.quick else 40):
            turns.least.append(await asyncio.to_thread(bare_start, bare, image))
            await turns.run(held, "require")
    return turns.result(
        "pod-start",
        floor_name="bare clone",
        of="pod.run over NATS to the container running, against clone, hot-plug, mount and fork by a script",
        reach=1.5,
    )


async def pool_start(options: Options) -> Result:
    """Take spare VMs out of the pool, by turns with the same floor as `pod_start`."""
    turns = Turns()
    async with _both(options, POOL) as (held, bare, image):
        for _ in range(5 if options.quick else 40):
            turns.least.append(await asyncio.to_thread(bare_start, bare, image))
            await spares(held)
            await turns.run(held, "require")
    return turns.result(
        "pool-start",
        floor_name="bare clone",
        of="pod.run with spares in the pool, against clone, hot-plug, mount and fork by a script",
        reach=0.7,
    )


async def cold_start(options: Options) -> Result:
    """Boot in turn by the node and by a script."""
    turns = Turns()
    async with stage(options) as held:
        with floor(options) as bare:
            for _ in range(3 if options.quick else 9):
                turns.least.append((await asyncio.to_thread(time_guest, bare)) * 1000)
                await turns.run(held, "never")
    return turns.result(
        "cold-start",
        floor_name="bare boot",
        of="pod.run with template 'never' to the container running, against a bare boot to the agent's hello",
        reach=1.25,
    )
