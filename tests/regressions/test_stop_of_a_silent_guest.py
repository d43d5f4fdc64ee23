"""``pod.stop`` with a grace of 3 s took 30 s when the guest was frozen (QEMU under SIGSTOP).

The signal to each container had the limit of any request, and it was not part of the grace.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.models.pod import PodState
from vcnode.pods import containers


async def test_the_grace_bounds_a_guest_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "ASK_LIMIT_S", 0.05)
    world = await World(tmp_path, "agent.signal_container:*=hang").start()
    try:
        await world.pods.run(pod(), world.call())
        async with asyncio.timeout(containers.REQUEST_LIMIT_S / 2):
            stopped = await world.pods.stop("p1", 0.05, world.call("pod.stop"))
        assert stopped.outcome == "forced"
        assert stopped.pod.state is PodState.STOPPED
        assert world.vms.alive == []
    finally:
        await world.close()
