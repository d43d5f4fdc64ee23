"""A consumer in another language, written from contracts/ alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.nats import NatsServer
from vcnode.client import Client
from vcnode.node import Node
from vcnode.settings import NatsSettings

pytestmark = pytest.mark.nats

ROOT = Path(__file__).parents[2]
LIMIT_S = 50


async def run(*args: str) -> tuple[int, str, str]:
    node = shutil.which("node")
    assert node, "Node.js is missing: run dev/setup --tests"
    process = await asyncio.create_subprocess_exec(
        node,
        str(ROOT / "examples/node/run_pod.cjs"),
        *args,
        env={**os.environ, "NODE_PATH": str(ROOT / "dev/npm/node_modules")},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()


async def test_it_runs_a_pod_and_follows_its_events(mock_node: Node, nats_server: NatsServer) -> None:
    settings = mock_node.settings
    async with await Client.connect(NatsSettings(url=nats_server.url)) as client:
        await client.node(settings.node_name).image_import("busybox", str(settings.allowed_roots[0]))
    code, out, err = await run(nats_server.url, settings.node_name, "busybox")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    said = {line["what"]: line for line in lines if line["what"] != "event"}
    assert said["pod.run"]["state"] == "running"
    assert (said["container.exec"]["exit_code"], said["pod.delete"]["existed"]) == (0, True)
    assert said["container.exec"]["stdout"].startswith("hello from js-")

    events = [line for line in lines if line["what"] == "event"]
    kinds = [event["type"].removeprefix("vcnode.") for event in events]
    assert {"pod.created", "container.created", "pod.started", "container.started", "pod.deleted"} <= set(
        kinds
    )
    # Others of the node's events, such as audit.done, come in between.
    numbers = [int(event["sequence"]) for event in events]
    assert len(set(numbers)) == len(numbers)


async def test_it_shows_what_the_node_refuses(mock_node: Node, nats_server: NatsServer) -> None:
    code, _, err = await run(nats_server.url, mock_node.settings.node_name, "no-such-image")
    assert code == 1
    assert err.startswith("pod.run: not_found: ")
