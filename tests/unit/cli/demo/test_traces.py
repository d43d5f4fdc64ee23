from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vcnode.cli.demo import traces


def found(checks: tuple[traces.Check, ...]) -> dict[str, tuple[str, ...]]:
    return {check.what: check.found for check in checks if check.found}


def test_nothing_left(short_dir: Path) -> None:
    assert found(traces.of_demo(short_dir)) == {}
    assert found(traces.of_pod(short_dir, traces.Held("vm-none-1"))) == {}


def test_a_process_that_names_the_directory_is_found(short_dir: Path) -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, f"--at={short_dir}/x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # by now it has its own command line
        left = list(traces.processes(str(short_dir)))
        process.communicate()

    assert [line.split(" ")[0] for line in left] == [str(process.pid)]
    assert list(traces.processes(str(short_dir))) == []


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


def test_other_vms_are_not_the_pods(short_dir: Path) -> None:
    for vm_id in ("vm-none-1", "vm-none-2"):
        (short_dir / "run/vms" / vm_id).mkdir(parents=True)

    left = found(traces.of_pod(short_dir, traces.Held("vm-none-1")))

    assert left == {"directory or socket of the VM": (str(short_dir / "run/vms/vm-none-1"),)}


def test_network_leftovers_are_found(short_dir: Path) -> None:
    namespace = short_dir / "netns"
    namespace.touch()

    assert list(traces.links(traces.Held("vm-none-1", str(namespace), ("lo", "no-such-tap")))) == [
        str(namespace),
        "lo",
    ]
    assert list(traces.links(traces.Held("vm-none-1", str(short_dir / "gone")))) == []
