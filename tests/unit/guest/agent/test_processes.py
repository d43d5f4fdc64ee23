"""What is told of processes, read from this machine's own /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vcnode.guest.agent import processes, users
from vcnode.guest.agent.loop import Loop


def listed(pids: list[int], limit: int = 512, root: str = "/") -> dict[str, Any]:
    loop = Loop()
    found: list[dict[str, Any]] = []

    def done(result: dict[str, Any]) -> None:
        found.append(result)
        loop.stop()

    loop.call_later(0, lambda: processes.Listing(loop, pids, root, limit, done) and None)
    loop.run()
    loop.close()
    return found[0]


def test_a_process_is_described() -> None:
    args = [sys.executable, "-c", "print(flush=True); input()", "a\nb", "", "ü\udcff"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it has executed its program by now
        result = listed([child.pid])
        child.communicate(b"\n")
    (found,) = result["processes"]
    assert (found["pid"], found["ppid"], found["uid"]) == (child.pid, os.getpid(), os.geteuid())
    assert found["args"] == [*args[:-1], "ü\ufffd"]
    assert found["user"] == users.names(Path("/etc/passwd").read_bytes()).get(os.geteuid())
    assert found["state"] in "RSD"
    assert found["rss_bytes"] > 0


def test_no_more_than_asked_for_are_described_and_those_that_are_gone_do_not_count() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    result = listed([os.getpid()] * 40, limit=20)
    assert len(result["processes"]) == 20
    assert listed([gone.pid]) == {"processes": [], "total": 0}


def test_long_arguments_are_cut() -> None:
    with subprocess.Popen(
        ["cat", "-", "x" * 5000], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        # Until its exec is done it shows the arguments of this process.
        while Path(f"/proc/{child.pid}/comm").read_text() != "cat\n":
            os.sched_yield()
        (found,) = listed([child.pid])["processes"]
        child.kill()
    assert found["args_truncated"]
    assert sum(len(arg) for arg in found["args"]) <= processes.MAX_ARGS_BYTES


@pytest.mark.parametrize(
    ("cmdline", "args"), [(b"", []), (b"a\0", ["a"]), (b"a\0\0b\0", ["a", "", "b"]), (b"\xff\0", ["\ufffd"])]
)
def test_arguments_are_what_stands_between_the_zeros(cmdline: bytes, args: list[str]) -> None:
    assert processes.args(cmdline) == args


def test_a_root_without_users_names_nobody(tmp_path: Path) -> None:
    (found,) = listed([os.getpid()], root=str(tmp_path))["processes"]
    assert found["user"] is None
