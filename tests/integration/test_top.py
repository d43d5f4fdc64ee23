"""``vcnode top`` against a node agent (with the mock hypervisor): for programs, and at a real terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pexpect
import pytest

from tests.support.cli import vcnode
from tests.support.nats import NatsServer
from vcnode.models.call import Call
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import Node

pytestmark = pytest.mark.nats

VCNODE = str(Path(sys.executable).with_name("vcnode"))
LIMIT_S = 60.0


def at_a_terminal(url: str) -> None:
    """Sort, quit by a key, and once more by Ctrl-C; the terminal is as it was each time."""
    for leave in ("q", "\x03"):
        run = f"{VCNODE} top --interval 30; echo code=$?"
        script = f"trap : INT; A=$(stty -g); {run}; test $A = $(stty -g) && echo restored"
        env = {**os.environ, "VCNODE_NATS_URL": url, "TERM": "xterm"}
        shell = pexpect.spawn(
            "/bin/sh", ["-c", script], env=env, encoding="utf-8", timeout=LIMIT_S, dimensions=(24, 110)
        )
        shell.expect_exact("\x1b[?1049h")  # the other screen
        shell.expect_exact("by cpu")
        shell.expect("n1 .*ready.*1/")
        shell.expect("n1 +web .*running")
        shell.expect("n1 +web +main .*running")
        shell.send("m")
        shell.expect_exact("by memory")
        shell.send(leave)
        shell.expect(pexpect.EOF)
        end = shell.before or ""
        assert "\x1b[?1049l" in end  # back from the other screen
        assert "\x1b[?25h" in end  # the cursor is shown again
        assert end.split("code=")[-1].split() == ["0", "restored"]
        shell.close()


async def test_top(mock_node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCNODE_NATS_URL", nats_server.url)
    rootfs = str(mock_node.settings.allowed_roots[0])
    container = ContainerSpec(id="main", rootfs=rootfs, cmd=Cmd(args=("sleep", "infinity")))
    await mock_node.pods.run(PodSpec(id="web", containers=(container,)), Call("run-1", "pod.run"))
    found = await vcnode("top", "--once", "-o", "json")
    assert (found.code, found.err) == (0, "")
    (pod,), (main,) = found.json["pods"], found.json["containers"]
    assert (pod["node"], pod["pod_id"], pod["state"], pod["cpu_percent"]) == ("n1", "web", "running", 0.0)
    assert (main["container_id"], main["pids"]) == ("main", 1)
    assert found.json["nodes"][0]["pods"] == 1
    table = await vcnode("top", "--sort", "name", "--no-guest")  # no terminal: once
    assert [line.split()[:2] for line in table.out.splitlines() if line.startswith("n1")] == [
        ["n1", "ready"],
        ["n1", "web"],
    ]
    await asyncio.to_thread(at_a_terminal, nats_server.url)
