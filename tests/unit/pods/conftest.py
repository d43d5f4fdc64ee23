"""A world per test."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.pods.world import World


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible (no test here takes the power away)."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vc-", dir=place if place.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A host with a node that runs; nothing may hang on it when the test is done."""
    built = await World(tmp_path).start()
    yield built
    await built.close()
