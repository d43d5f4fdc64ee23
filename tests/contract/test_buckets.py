"""Values of buckets are held against the contracts wherever a node writes or a client reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nats.js.kv import KeyValue

from tests.support import contracts
from vcnode.bus.connection import Connection
from vcnode.bus.kv import Lease, PodMirror
from vcnode.client.bucket import Put
from vcnode.client.requests import Requester
from vcnode.client.view import FleetView
from vcnode.models.subjects import Subjects
from vcnode.pods.contact import Contact
from vcnode.settings import NatsSettings

EXAMPLES = Path(__file__).parents[2] / "contracts/examples"


class Server:
    """Takes whatever is published."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.client = object()

    def on_change(self, _: object) -> None:
        pass

    on_client = on_change

    async def publish(self, _: str, payload: bytes, **__: Any) -> Any:
        self.taken.append(payload)
        return SimpleNamespace(seq=1)

    def bucket(self, name: str) -> KeyValue:
        return KeyValue(name, f"KV_{name}", f"$KV.{name}.", cast(Any, self), direct=True)


async def mirror(server: Server, body: bytes) -> None:
    made = PodMirror(
        cast(Connection, server),
        lambda: {"p1": body},
        asyncio.Event(),
        node_name="n1",
        subjects=Subjects(),
        settings=NatsSettings(),
    )
    await made._put_right(server.bucket("vcnode-pods"), {})


async def renew(server: Server, body: bytes) -> None:
    lease = SimpleNamespace(node="n1", model_dump_json=body.decode)
    made = Lease(
        cast(Connection, server),
        lambda: cast(Any, lease),
        cast(Contact, None),
        subjects=Subjects(),
        settings=NatsSettings(),
    )
    made._opened = cast(Any, (server.client, server.bucket("vcnode-nodes")))
    made._revision = 1
    await made._claim(cast(Any, server.client))


async def watch_pods(server: Server, body: bytes) -> None:
    server.taken.append(body)
    FleetView(cast(Requester, None), Subjects())._on_pod(Put("n1.p1", body))


async def watch_nodes(server: Server, body: bytes) -> None:
    server.taken.append(body)
    FleetView(cast(Requester, None), Subjects())._on_node(Put("n1", body))


@pytest.fixture
def violations() -> Iterator[list[str]]:
    contracts.violations.clear()
    yield contracts.violations
    contracts.violations.clear()


@pytest.mark.parametrize(
    ("way", "name"),
    [(mirror, "kv.pods"), (renew, "kv.nodes"), (watch_pods, "kv.pods"), (watch_nodes, "kv.nodes")],
)
async def test_a_value_with_a_field_that_the_contract_does_not_name_is_noted(
    way: Callable[..., Any], name: str, violations: list[str]
) -> None:
    server = Server()
    good = json.loads(next((EXAMPLES / "good" / name).glob("*.json")).read_text())
    await way(server, json.dumps(good).encode())
    assert violations == []
    await way(server, json.dumps({**good, "unheard_of": 1}).encode())
    assert len(server.taken) == 2
    [said] = violations
    assert said.startswith(f"{name}: ")
    assert "unheard_of" in said


async def test_what_a_test_writes_into_a_bucket_is_its_own_matter(violations: list[str]) -> None:
    await Server().bucket("vcnode-pods").put("n1.p1", b"{}")
    assert violations == []
