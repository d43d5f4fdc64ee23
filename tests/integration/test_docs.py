"""What the pages tell people to write down or to run is taken, and runs: against a node without VMs.

The README's tour has a test of its own, and that every command line has options which exist is seen by
``tests/unit/cli/test_docs.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import shutil
import sqlite3
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.integration.conftest import mock_settings
from tests.support.cli import vcnode
from tests.support.guests import make_spec
from tests.support.nats import NatsServer, binary
from tests.support.pages import PAGES, Block, blocks
from vcnode.cli.settings import load
from vcnode.client import Client, Fleet
from vcnode.contracts import reference
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor, MockWorld
from vcnode.models.commands import PodCreate
from vcnode.models.fleet import Constraints
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.models.probes import Probes
from vcnode.node import Node, running
from vcnode.settings import Settings

pytestmark = [pytest.mark.nats, pytest.mark.timeout(60)]

TYPES: dict[str, type[BaseModel]] = {"Probes": Probes, "PodSpec": PodSpec, "Settings": Settings}
"""What the JSON of a block can be, by the word behind ``json`` in its fence."""
LANGUAGES = {"sh", "python", "toml", "conf", "text", *(f"json {name}" for name in TYPES)}
USED = (Client, Fleet, PodCreate, PodSpec, ContainerSpec, Cmd, Constraints)
"""What Python in the pages uses and does not import: the sentences around it say where it is from."""
USED_BY_THE_MOCK = (FaultPlan, MockHypervisor, MockWorld)
INSTEAD = {
    "fleet.md": [("        ...\n", "        break\n")],  # a watch goes on for ever
    "stats.md": [("sample.containers])\n", "sample.containers])\n    break\n")],  # and so do figures
    "streams.md": [("connect(80)", "connect(7)")],  # a mock pod listens there only
}
"""What a page's Python needs to end here."""
SLEEP = Cmd(args=("sleep", "600"))


def told(language: str, *names: str) -> list[Any]:
    """The blocks in *language* of the pages called *names*, or of all but the README."""
    found = (block for page in PAGES[1:] for block in blocks(page))
    return [
        pytest.param(block, id=block.id)
        for block in found
        if block.language.split()[:1] == [language] and (not names or block.page.name in names)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page))


@pytest.mark.parametrize("block", told("toml"))
def test_settings_are_settings(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(block.text)
    load(file)


@pytest.mark.parametrize("block", told("json"))
def test_json_is_what_it_is_called(block: Block) -> None:
    TYPES[block.language.split()[1]].model_validate_json(block.text)


@pytest.mark.parametrize("block", told("conf"))
async def test_the_server_takes_its_settings(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "nats.conf"
    file.write_text(block.text)
    process = await asyncio.create_subprocess_exec(
        binary(), "-t", "-c", str(file), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


@pytest.fixture
async def host1(
    nats_server: NatsServer, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Node]:
    """A node with an image ``busybox`` and a running pod ``web``, which the command line finds."""
    monkeypatch.setenv("VCNODE_NATS_URL", nats_server.url)
    for name in ("VCNODE_NODE", "VCNODE_OUTPUT", "VCNODE_NATS_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    settings = mock_settings(short_dir / "n", nats_server.url, node_name="host1")
    async with running(settings.model_copy(update={"labels": {"zone": "a"}})) as node:
        await node.connection.wait_connected()
        root = node.settings.allowed_roots[0]
        imported = await vcnode("image", "import", "busybox", str(root))
        assert imported.code == 0, imported.err
        ran = await vcnode("pod", "run", "--id", "web", "--image", "busybox", "--", "sleep", "600")
        assert ran.code == 0, ran.err
        (short_dir / "log").mkdir()
        (short_dir / "log/a").write_text("a line\n")
        copied = await vcnode("cp", str(short_dir / "log"), "web/main:/var/log")
        assert copied.code == 0, copied.err
        yield node


@pytest.mark.parametrize("block", told("python"))
async def test_python_runs(block: Block, host1: Node, nats_server: NatsServer, short_dir: Path) -> None:
    """As the body of a coroutine, with the names that its page speaks of."""
    main = ContainerSpec(id="main", image="busybox", cmd=SLEEP)
    spec: object = PodSpec(id="later", containers=(main,))
    text = block.text
    if block.page.name == "mock.md":
        spec = make_spec(short_dir)
    for old, new in INSTEAD.get(block.page.name, ()):
        assert old in text
        text = text.replace(old, new)
    names: dict[str, Any] = {used.__name__: used for used in (*USED, *USED_BY_THE_MOCK)}
    async with await Client.connect(nats_server.url) as client:
        names |= {"client": client, "node": client.node("host1"), "url": nats_server.url}
        names |= {"main": main, "spec": spec}
        exec("async def body():\n" + textwrap.indent(text, "    "), names)
        await names["body"]()


@pytest.mark.parametrize("block", told("sh", "logs.md", "streams.md"))
async def test_commands_run(
    block: Block, host1: Node, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that need no terminal, and end."""
    monkeypatch.chdir(short_dir)
    (short_dir / "site").mkdir()
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words[1] not in ("exec", "port-forward") and "-f" not in words:
            result = await vcnode(*words[1:])
            assert result.code == 0, (line, result.err)


async def test_the_file_to_back_up_is_whole_when_the_agent_has_stopped(
    nats_server: NatsServer, short_dir: Path
) -> None:
    settings = mock_settings(short_dir / "n", nats_server.url)
    async with running(settings) as node:
        await node.connection.wait_connected()
        async with await Client.connect(nats_server.url) as client:
            await client.node("n1").pod_create(PodSpec(id="web"))
    copy = short_dir / "copy.db"
    shutil.copy(settings.state_dir / "node.db", copy)
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("select pod_id from pods").fetchall() == [("web",)]


def test_the_reference_leads_somewhere() -> None:
    page = reference.render()
    anchors = {reference.anchor(heading) for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors
