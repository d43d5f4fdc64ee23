"""A world per test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.pods.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A host with a node that runs; nothing may hang on it when the test is done."""
    built = await World(tmp_path).start()
    yield built
    await built.close()
