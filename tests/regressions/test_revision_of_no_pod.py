"""``pod.create`` with an expected revision made the pod although there was none of that revision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.errors import FailedPreconditionError


@pytest.mark.parametrize("verb", ["create", "run"])
async def test_a_pod_that_does_not_exist_has_no_revision(tmp_path: Path, verb: str) -> None:
    world = await World(tmp_path).start()
    try:
        call = dataclasses.replace(world.call(f"pod.{verb}"), expected_revision=3)
        with pytest.raises(FailedPreconditionError, match="no pod p1"):
            await getattr(world.pods, verb)(pod(), call)
        assert world.pods.list({}, ()).pods == ()
    finally:
        await world.close()
