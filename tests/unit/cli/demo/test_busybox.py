from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vcnode.cli.demo.busybox import is_static, make_root
from vcnode.errors import FailedPreconditionError


@pytest.mark.root
def test_the_root_runs_its_own_shell(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")

    done = subprocess.run(
        ["chroot", root, "/bin/sh", "-c", "id -un; ls -d /tmp"], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["root", "/tmp"]


def test_a_dynamic_program_is_not_static(tmp_path: Path) -> None:
    assert not is_static(Path(shutil.which("cat") or "/bin/cat").resolve())
    text = tmp_path / "x"
    text.write_bytes(b"#!/bin/sh\n" + b"x" * 100)
    assert not is_static(text)
    assert not is_static(Path(sys.executable).resolve())


def test_without_a_static_busybox_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FailedPreconditionError, match="busybox-static"):
        make_root(tmp_path / "root")

    assert not (tmp_path / "root").exists()
