"""Who sent a command: a real NATS server tells it of what comes from another account, and nobody else can."""

from __future__ import annotations

import asyncio
import json
from ipaddress import ip_address
from pathlib import Path

import nats
import pytest

from tests.conftest import StartNats
from tests.integration.conftest import mock_settings
from tests.integration.test_nats_connection import secret
from tests.support.nats import kind
from vcnode.models import wire
from vcnode.models.audit import AuditRecord
from vcnode.models.events import Event
from vcnode.node import running
from vcnode.settings import NatsSettings

pytestmark = pytest.mark.nats

CONFIG = """
accounts {
  NODES: {
    jetstream: enabled
    users: [ { user: n1, password: pw } ]
    exports: [ { service: "vcnode.rpc.n1.>", accounts: [TEAM] } ]
  }
  TEAM: {
    users: [ { user: alice, password: pw } ]
    imports: [ { service: { account: NODES, subject: "vcnode.rpc.n1.>" }, share: true } ]
  }
}
"""
FORGED = json.dumps({"acc": "TEAM", "user": "mallory", "id": 1})


async def test_the_servers_word_on_the_sender_reaches_the_audit_event(
    start_nats: StartNats, short_dir: Path
) -> None:
    server = await start_nats(config=CONFIG)
    login = NatsSettings(
        url=server.url, user="n1", password_file=secret(short_dir / "pw", "pw"), trust_request_info=True
    )
    settings = mock_settings(short_dir / "n1", server.url, node_name="n1").model_copy(
        update={"nats": login, "audit_events": True}
    )
    async with running(settings):
        watcher = await nats.connect(server.url, user="n1", password="pw")
        told = await watcher.subscribe("vcnode.evt.n1.audit.>")
        await watcher.flush()
        alice = await nats.connect(server.url, user="alice", password="pw", name="ci")
        headers = {wire.REQUEST_INFO: FORGED, wire.ACTOR: "alice@desk", wire.COMMAND_ID: "c1"}
        async with asyncio.timeout(20):
            while True:  # the node may still be connecting
                try:
                    reply = await alice.request(
                        "vcnode.rpc.n1.node.cordon", b'{"reason": "x"}', headers=headers, timeout=20
                    )
                    break
                except nats.errors.NoRespondersError:
                    await asyncio.sleep(0.05)
        assert wire.SERVICE_ERROR not in (reply.headers or {})
        event = Event.model_validate_json((await told.next_msg(timeout=20)).data)
        actor = AuditRecord.model_validate(event.data).actor
        assert (actor.account, actor.user, actor.client_name) == ("TEAM", "alice", "ci")
        if kind() == "binary":
            assert actor.host == "127.0.0.1"
        else:  # in a container the server sees the address of its bridge
            assert ip_address(str(actor.host)).is_private
        assert actor.client_id == alice.client_id
        assert actor.verified
        assert actor.claim == "alice@desk"
        await alice.close()
        await watcher.close()
