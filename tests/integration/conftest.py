"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.nats import NatsServer
from vcnode.models.pod import HypervisorType
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, Settings


def mock_settings(directory: Path, url: str, *, node_name: str = "n1", faults: str = "") -> Settings:
    """Settings of a node agent that only pretends to run VMs, with everything below *directory*."""
    roots = directory / "roots"
    roots.mkdir(parents=True, exist_ok=True)
    return Settings(
        node_name=node_name,
        state_dir=directory / "state",
        run_dir=directory / "run",
        allowed_roots=(roots,),
        hypervisor=HypervisorType.MOCK,
        metrics_address="127.0.0.1:0",
        faults=faults,
        nats=NatsSettings(url=url),
    )


@pytest.fixture
async def mock_node(nats_server: NatsServer, short_dir: Path) -> AsyncIterator[Node]:
    """A whole node agent named ``n1`` in this process, without VMs, on a NATS server of its own."""
    async with running(mock_settings(short_dir / "n1", nats_server.url)) as node:
        await node.connection.wait_connected()
        yield node
