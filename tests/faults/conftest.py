"""Databases in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: thousands of transactions, and no power failure among the faults."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="vc-", dir=place if place.is_dir() else None) as path:
        yield Path(path)
