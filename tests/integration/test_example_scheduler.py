"""The reference scheduler, as a process, on mock nodes."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.nats import NatsServer
from vcnode.client import Client
from vcnode.models.pod import PodState
from vcnode.node import Node
from vcnode.settings import NatsSettings

pytestmark = pytest.mark.nats

SCRIPT = Path(__file__).parents[2] / "examples/scheduler.py"
LIMIT_S = 50
SET = """
[web]
count = {count}
[[web.pod.containers]]
id = "main"
image = "busybox"
cmd = {{ args = ["sleep", "600"] }}
"""


def test_it_is_short_and_uses_the_sdk_only() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 200
    used = {line.split()[1] for line in text.splitlines() if line.startswith("from vcnode")}
    assert used == {"vcnode.client", "vcnode.errors", "vcnode.models.fleet", "vcnode.models.pod"}


async def test_it_keeps_what_its_file_says(mock_node: Node, nats_server: NatsServer, short_dir: Path) -> None:
    file = short_dir / "fleet.toml"
    file.write_text(SET.format(count=2))
    async with await Client.connect(NatsSettings(url=nats_server.url)) as client:
        node = client.node("n1")
        await node.image_import("busybox", str(mock_node.settings.allowed_roots[0]))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SCRIPT),
            str(file),
            "--nats-url",
            nats_server.url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None

        async def until(*lines: str) -> None:
            missing = set(lines)
            while missing:
                line = (await process.stdout.readline()).decode().strip()  # type: ignore[union-attr]
                assert line or process.returncode is None, await process.stderr.read()  # type: ignore[union-attr]
                missing.discard(line)

        try:
            async with asyncio.timeout(LIMIT_S):
                await until("n1: joined", "n1/web-0: running", "n1/web-1: running")
                await node.pod_delete("web-0", force=True)
                await until("n1/web-0: gone", "n1/web-0: running")
                file.write_text("[web]\ncuont = 3\n")
                process.send_signal(signal.SIGHUP)
                file.write_text("")
                process.send_signal(signal.SIGHUP)
                await until("n1/web-0: gone", "n1/web-1: gone")
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert all(pod.state is PodState.RUNNING for pod in (await node.pod_list()).pods)


async def test_a_file_that_is_wrong_is_refused_at_once(short_dir: Path) -> None:
    (short_dir / "fleet.toml").write_text("[web]\ncuont = 3\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), str(short_dir / "fleet.toml"), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (1, "error: unknown: cuont\n")
