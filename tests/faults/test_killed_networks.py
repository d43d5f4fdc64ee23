"""A node agent killed between any two side effects on networks: the next one removes what it has made."""

from __future__ import annotations

import asyncio
import secrets
import sys
from pathlib import Path

import pytest

from tests.support import networks
from tests.support.netns import private_network


@pytest.mark.root
@pytest.mark.parametrize(("kind", "bridges"), [("bridge", set()), ("cni", {"cni1"})])
async def test_a_death_between_any_two_side_effects_leaves_nothing_that_is_not_found(
    kind: str, bridges: set[str], tmp_path: Path
) -> None:
    mark = f"vm-{secrets.token_hex(3)[:5]}"
    with private_network():
        program = (sys.executable, "-m", "tests.faults.dying_networks", kind, mark, str(tmp_path))
        process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        lines = (await process.stdout.read()).decode().splitlines()
        assert await process.wait() == 0
        assert networks.links() == bridges  # what the plugin bridge has made it leaves, as ever
    deaths = [line.split()[0] for line in lines]
    assert deaths.count("set-up") > 15, lines
    assert deaths.count("tear-down") > 2, lines
