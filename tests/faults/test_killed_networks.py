"""A node agent killed between any two messages to the kernel: the next one removes what it has made."""

from __future__ import annotations

import asyncio
import secrets
import sys

import pytest

from tests.support import networks
from tests.support.netns import private_network


@pytest.mark.root
async def test_a_death_between_any_two_messages_leaves_nothing_that_is_not_found() -> None:
    mark = f"vm-{secrets.token_hex(3)[:5]}"
    with private_network():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.dying_networks", mark, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        lines = (await process.stdout.read()).decode().splitlines()
        assert await process.wait() == 0
        assert networks.links() == set()
    deaths = [line.split()[0] for line in lines]
    assert deaths.count("set-up") > 15, lines
    assert deaths.count("tear-down") > 2, lines
