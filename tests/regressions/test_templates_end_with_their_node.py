"""A QEMU outlived its node agent: the VM that was about to become a template when the node stopped.

The handle's watcher had been cancelled before the undo that was to kill the VM.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.pods.world import World, pod


async def test_closing_ends_the_vm_that_becomes_a_template(tmp_path: Path) -> None:
    world = await World(tmp_path, "hypervisor.save_template:1=hang", templates=True).start()
    try:
        await world.pods.run(pod(), world.call("pod.run"))
        async with asyncio.timeout(10):
            while "hypervisor.save_template" not in world.plan.log:  # noqa: ASYNC110 - a plain list
                await asyncio.sleep(0)
        assert len(world.vms.alive) == 2
        await world.pods.close()
        assert [machine.spec.template_key for machine in world.vms.alive] == [None]
    finally:
        await world.close()
