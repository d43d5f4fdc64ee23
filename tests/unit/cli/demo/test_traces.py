from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vcnode.cli.demo import traces


def found(checks: tuple[traces.Check, ...]) -> dict[str, tuple[str, ...]]:
    return {check.what: check.found for check in checks if check.found}


def test_nothing_left(short_dir: Path) -> None:
    assert found(traces.look(short_dir, keep=(), network=traces.Network())) == {}


def test_a_process_that_names_the_directory_is_found(short_dir: Path) -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, f"--at={short_dir}/x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # by now it has its own command line
        left = list(traces.processes(short_dir, keep={os.getpid()}))
        kept = list(traces.processes(short_dir, keep={os.getpid(), process.pid}))
        process.communicate()

    assert [line.split(" ")[0] for line in left] == [str(process.pid)]
    assert kept == []
    assert list(traces.processes(short_dir, keep={os.getpid()})) == []


@pytest.mark.root
def test_a_mount_is_found_even_below_a_name_with_blanks(short_dir: Path) -> None:
    point = short_dir / "a b"
    (point / "c").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        left = traces.mounts(short_dir)
    finally:
        subprocess.run(["umount", point], check=True)

    assert left == [str(point)]


def test_sockets_and_vm_directories_are_found(short_dir: Path) -> None:
    (short_dir / "run/vms/vm-1").mkdir(parents=True)
    (short_dir / "state").mkdir()
    (short_dir / "state/db").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s.sock"))
        left = list(traces.vm_files(short_dir))

    assert left == [str(short_dir / "run/vms/vm-1"), str(short_dir / "s.sock")]


def test_network_leftovers_are_found(short_dir: Path) -> None:
    namespace = short_dir / "netns"
    namespace.touch()

    assert list(traces.links(traces.Network(str(namespace), ("lo", "no-such-tap")))) == [str(namespace), "lo"]
    assert list(traces.links(traces.Network(str(short_dir / "gone"), ()))) == []
