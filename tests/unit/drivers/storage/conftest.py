"""A small host: allowed roots with content, and a precious directory beside them that must never change."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from vcnode.drivers.storage.paths import AllowedRoots


@dataclass
class Host:
    top: Path
    roots: Path
    precious: Path
    state: Path
    run: Path
    allowed: AllowedRoots

    def mounts(self) -> list[str]:
        text = Path("/proc/self/mountinfo").read_text()
        return [line for line in text.splitlines() if str(self.top) in line.split(" ")[4]]


@pytest.fixture
def host(tmp_path: Path):
    top = Path(os.path.realpath(tmp_path))
    roots, precious = top / "roots", top / "precious"
    (roots / "app" / "bin").mkdir(parents=True)
    (roots / "app" / "bin" / "sh").write_text("#!")
    (roots / "plain").write_text("a file")
    precious.mkdir()
    (precious / "keep").write_text("precious")
    made = Host(
        top, roots, precious, top / "state", top / "run", AllowedRoots([roots], [top / "state", top / "run"])
    )
    yield made
    assert (precious / "keep").read_text() == "precious"
    left = made.mounts()
    for line in reversed(left):
        subprocess.run(["umount", "-l", line.split(" ")[4]], check=True)
    assert left == [], "mounts were left behind"
