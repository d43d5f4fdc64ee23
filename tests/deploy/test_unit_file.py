"""The systemd unit and the Dockerfile."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    unit = tmp_path / "vcnode.service"
    # What it starts is not installed on this host.
    unit.write_text(
        re.sub("ExecStart=.*", "ExecStart=/bin/true", (ROOT / "deploy/systemd/vcnode.service").read_text())
    )
    result = subprocess.run(
        [analyze, "verify", unit], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in result.stderr.splitlines() if "vcnode.service" in line]
    assert ours == []


def test_pods_survive_a_restart_of_the_unit() -> None:
    text = (ROOT / "deploy/systemd/vcnode.service").read_text()
    for line in ("KillMode=process", "Delegate=yes", "RuntimeDirectoryPreserve=yes"):
        assert f"\n{line}\n" in text


def test_what_the_image_copies_is_there() -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (ROOT / "deploy/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed
