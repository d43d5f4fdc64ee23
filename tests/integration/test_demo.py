"""``vcnode demo`` from outside: what it shows, and that it leaves nothing, interrupted or not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vcnode.cli.demo import traces

pytestmark = [pytest.mark.nats, pytest.mark.timeout(180)]

KINDS = [
    pytest.param("mock", id="mock"),
    pytest.param("qemu", id="qemu", marks=pytest.mark.vm),
]


@asynccontextmanager
async def demo(hypervisor: str, guest_dir: Path, temp_dir: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a child; it is killed if the test leaves early."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vcnode.cli", "demo", "--hypervisor", hypervisor, "--accel", "tcg"),
        *("--guest-dir", str(guest_dir)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"TMPDIR": str(temp_dir)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
def guest_dir(request: pytest.FixtureRequest, hypervisor: str, tmp_path: Path) -> Path:
    """The guest image, where one is needed."""
    if hypervisor == "mock":
        return tmp_path
    found: Path = request.getfixturevalue("guest_image")
    return found


@pytest.mark.parametrize("hypervisor", KINDS)
async def test_demo_runs_a_pod_and_leaves_nothing(hypervisor: str, guest_dir: Path, short_dir: Path) -> None:
    async with demo(hypervisor, guest_dir, short_dir) as process:
        out, _ = await process.communicate()

    text = out.decode()
    assert process.returncode == 0, text
    events = ("node.started demo", "pod.created hello", "pod.started hello", "pod.deleted hello")
    places = [text.index(words) for words in events]
    assert places == sorted(places)
    assert "exit code 7" in text
    if hypervisor == "qemu":
        assert "Hello from hello, Linux" in text
    assert 'vcnode_commands_total{code="ok",verb="pod.run"} 1.0' in text
    assert "✘" not in text
    assert "\x1b" not in text
    assert list(short_dir.iterdir()) == []


@pytest.mark.parametrize("hypervisor", KINDS)
async def test_demo_that_is_interrupted_leaves_nothing(
    hypervisor: str, guest_dir: Path, short_dir: Path
) -> None:
    async with demo(hypervisor, guest_dir, short_dir) as process:
        assert process.stdout is not None
        while b"pod.starting" not in (line := await process.stdout.readline()):
            assert line, "the demo ended early"
        assert len(list(short_dir.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        rest = (await process.stdout.read()).decode()
        code = await process.wait()

    assert code == 130, rest
    assert list(short_dir.iterdir()) == []
    assert list(traces.processes(str(short_dir))) == []
    assert traces.mounts(short_dir) == []
