"""Every input that ever reached new code, or found a bug, is tried again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.__main__ import CORPUS, NAMES
from tests.fuzz.targets import TARGETS


def test_every_target_has_a_corpus() -> None:
    assert set(NAMES) == set(TARGETS)
    assert all(list((CORPUS / name).iterdir()) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_corpus_gets_through(name: str) -> None:
    if name == "layer" and os.geteuid() != 0:
        pytest.skip("unpacking needs root; run dev/test, which asks sudo")
    for path in sorted(Path(CORPUS / name).iterdir()):
        TARGETS[name](path.read_bytes())
