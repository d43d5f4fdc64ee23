"""The README's tour, line by line, against a whole node agent (with the mock hypervisor) over real NATS."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest

from tests.integration.conftest import mock_settings
from tests.support.cli import vcnode
from tests.support.nats import NatsServer
from vcnode.node import Node, running

pytestmark = pytest.mark.nats

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_lines(first_word: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words for words in lines if words[:1] == [first_word]]


@pytest.fixture
async def host1(nats_server: NatsServer, short_dir: Path) -> AsyncIterator[Node]:
    """The node of the tour."""
    async with running(mock_settings(short_dir / "n", nats_server.url, node_name="host1")) as node:
        await node.connection.wait_connected()
        yield node


@pytest.fixture
async def image(host1: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of the tour, and the environment that finds the node."""
    monkeypatch.setenv("VCNODE_NATS_URL", nats_server.url)
    for name in ("VCNODE_NODE", "VCNODE_OUTPUT", "VCNODE_NATS_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    imported = await vcnode("image", "import", "busybox", str(host1.settings.allowed_roots[0]))
    assert imported.code == 0, imported.err


async def test_commands_of_the_tour(image: None) -> None:
    told = [words for words in shell_lines("vcnode") if words[1] in ("pod", "container", "events")]
    assert len(told) >= 5

    for _, *arguments in told:
        result = await vcnode(*arguments)
        # What a command inside a pod prints is not the mock's to know.
        assert result.code == 0 or "exec" in arguments, (arguments, result.err)


async def test_nats_requests_of_the_tour(image: None, nats_server: NatsServer) -> None:
    requests = [words[2:] for words in shell_lines("nats") if words[1] == "req"]
    assert len(requests) >= 4

    client = await nats.connect(nats_server.url)
    try:
        for subject, body in requests:
            reply = await client.request(subject, body.encode(), timeout=10)
            assert "Nats-Service-Error" not in (reply.headers or {}), reply.data
            assert isinstance(json.loads(reply.data), dict)
    finally:
        await client.close()


async def test_service_of_the_tour_is_discoverable(image: None, nats_server: NatsServer) -> None:
    [[_, _, _, name]] = [words for words in shell_lines("nats") if words[1] == "micro"]

    client = await nats.connect(nats_server.url)
    try:
        reply = await client.request(f"$SRV.INFO.{name}", b"", timeout=10)
        assert json.loads(reply.data)["metadata"]["node"] == "host1"
    finally:
        await client.close()


async def python(path: Path, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(path),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


async def test_python_of_the_tour(image: None, nats_server: NatsServer, tmp_path: Path) -> None:
    [code] = blocks("python")
    script = tmp_path / "tour.py"
    script.write_text(code.replace("nats://127.0.0.1:4222", nats_server.url))

    await python(script)


async def test_example_script_and_spec(image: None, nats_server: NatsServer) -> None:
    await python(ROOT / "examples/run_pod.py", "host1", nats_server.url)
    ran = await vcnode("pod", "run", "-f", str(ROOT / "examples/pod.toml"))
    assert ran.code == 0, ran.err


def test_example_settings_are_settings() -> None:
    from vcnode.cli.settings import load

    assert load(ROOT / "examples/node.toml").node_name == "host1"


@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_every_script_of_the_readme_exists() -> None:
    for name in sorted(set(re.findall(r"\bdev/([a-z-]+)", README))):
        assert (ROOT / "dev" / name).exists(), name
