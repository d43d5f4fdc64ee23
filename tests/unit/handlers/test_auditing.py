"""One audit event per command that may change something: who, what, and what came of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.handlers.fakes import NOW, World
from vcnode.errors import AbortedError, NotFoundError, PermissionDeniedError
from vcnode.handlers.auditing import actor, digest, names
from vcnode.handlers.headers import Meta
from vcnode.models import wire
from vcnode.models.audit import AuditRecord
from vcnode.models.events import Event, EventKind
from vcnode.pods.journal import Journal
from vcnode.pods.outbox import Outbox
from vcnode.pods.received import Received
from vcnode.pods.store import Store

CREATE = b'{"pod": {"id": "p1"}}'
ID = {wire.COMMAND_ID: "c1"}
INFO = json.dumps(
    {"acc": "TEAM", "user": "alice", "id": 7, "name": "ci", "host": "192.0.2.1", "rtt": 1, "kind": "Client"}
)


class Node:
    """Dispatcher and journal on a real database."""

    def __init__(self, store: Store, **options: Any) -> None:
        self.store = store
        self.journal = Journal(store, max_entries=100, max_age_s=1000, max_unpublished=100, mock=True)
        self.world = World(journal=self.journal, audits=True, **options)
        self.pods = self.world.pods

    async def send(self, verb: str, body: bytes, headers: dict[str, str] = ID, **options: Any) -> str:
        """Send a command; the code of its outcome."""
        return (await self.world.dispatcher.dispatch(verb, headers, body, **options)).code

    async def told(self) -> list[Event]:
        """All audit events."""
        events = await Outbox(self.store, retention_s=1000).since(0, 100)
        return [event for event in events if event.kind.startswith("audit.")]

    async def record(self) -> AuditRecord:
        """The only one's data."""
        (event,) = await self.told()
        return AuditRecord.model_validate(event.data)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "node.db", node_name="n1", clock=lambda: NOW)
    yield opened
    await opened.close()


async def test_a_success_is_told_with_who_and_what(store: Store) -> None:
    node = Node(store, trusts_request_info=True)
    headers = {**ID, wire.REQUEST_INFO: INFO, wire.ACTOR: "alice@desk"}
    assert await node.send("pod.create", CREATE, headers) == "ok"
    (event,) = await node.told()
    assert (event.kind, event.subject, event.commandid, event.mock) == (
        "audit.done",
        "command/c1",
        "c1",
        True,
    )
    assert event.data == {
        "verb": "pod.create",
        "command_id": "c1",
        "way": "rpc",
        "actor": {
            "account": "TEAM",
            "user": "alice",
            "client_id": 7,
            "client_name": "ci",
            "host": "192.0.2.1",
            "verified": True,
            "claim": "alice@desk",
        },
        "names": {"pod_id": "p1"},
        "digest": digest({"pod": {"id": "p1"}}),
        "received_at": NOW.isoformat().replace("+00:00", "Z"),
        "ok": True,
        "code": "ok",
        "rule": None,
        "message": None,
        "traceparent": None,
    }


async def test_ids_that_the_node_made_are_told(store: Store) -> None:
    node = Node(store)
    await node.send("pod.run", b'{"pod": {}}', way="cmd")
    record = await node.record()
    assert (record.names, record.way) == ({"pod_id": "made"}, "cmd")


@pytest.mark.parametrize(
    ("error", "kind", "rule"),
    [
        (NotFoundError("There is no pod p1."), "audit.failed", None),
        (PermissionDeniedError("No.", rule="policy.x", field="pod"), "audit.denied", "policy.x"),
    ],
)
async def test_what_failed_or_was_denied_is_told(
    store: Store, error: NotFoundError | PermissionDeniedError, kind: str, rule: str | None
) -> None:
    node = Node(store)
    node.pods.errors["start"] = error
    assert await node.send("pod.start", b'{"pod_id": "p1"}') == error.code
    (event,) = await node.told()
    record = await node.record()
    assert (event.kind, record.ok, record.code, record.rule) == (kind, False, error.code, rule)
    assert record.message == error.message


async def test_a_repeated_command_is_told_once(store: Store) -> None:
    node = Node(store)
    for _ in range(3):
        await node.send("pod.create", CREATE)
    assert len(await node.told()) == 1


async def test_what_had_no_effect_is_told_when_it_has(store: Store) -> None:
    node = Node(store)
    node.pods.errors["create"] = AbortedError("Busy.")
    assert await node.send("pod.create", CREATE) == "aborted"
    assert await node.told() == []
    del node.pods.errors["create"]
    await node.send("pod.create", CREATE)
    assert (await node.record()).ok


async def test_a_command_that_a_restart_interrupted_is_told_once(tmp_path: Path) -> None:
    first = await Store.open(tmp_path / "node.db", node_name="n1", clock=lambda: NOW)
    node = Node(first)
    node.world.journal.finish = node.world.journal.forget = _lost  # type: ignore[method-assign]
    await node.send("pod.create", CREATE, {**ID, wire.ACTOR: "bob"})
    assert await node.told() == []
    await first.close()
    for _ in range(2):
        again = await Store.open(tmp_path / "node.db", node_name="n1", clock=lambda: NOW)
        after = Node(again)
        await after.journal.fail_unfinished()
        await after.send("pod.create", CREATE)
        record = await after.record()
        assert (record.ok, record.code, record.actor.claim) == (False, "internal", "bob")
        await again.close()


async def _lost(*_: object) -> None:
    """The process was killed before it came so far."""


async def test_a_durable_command_that_is_given_up_is_told_with_its_outcome(store: Store) -> None:
    node = Node(store)
    node.pods.errors["create"] = AbortedError("Busy.")
    outcome = await node.world.dispatcher.dispatch("pod.create", ID, CREATE, way="cmd")
    assert outcome.audit is not None
    received = Received(store, max_entries=10, max_age_s=1000, mock=True)
    await received.receive("m1")
    record = outcome.audit.model_copy(update={"code": "aborted"})
    for _ in range(2):
        data = {"verb": "pod.create", "command_id": "c1", "ok": False, "code": "aborted"}
        data |= {"duplicate": False, "deliveries": 1}
        await received.conclude("m1", EventKind.COMMAND_DONE, "c1", data, record)
    assert (await node.record()).code == "aborted"


async def test_reads_refusals_and_a_node_that_is_told_not_to_tell_nothing(store: Store) -> None:
    node = Node(store)
    await node.send("pod.list", b"{}")
    await node.send("pod.create", b"{")
    silent = World(journal=node.journal)
    await silent.dispatcher.dispatch("pod.create", ID, CREATE)
    assert await node.told() == []


async def test_no_password_is_told_or_can_be_guessed(store: Store) -> None:
    node = Node(store)
    body = {"reference": "r.example/a", "auth": {"username": "u", "password": "MARKER"}}
    await node.send("image.pull", json.dumps(body).encode())
    record = await node.record()
    assert "MARKER" not in record.model_dump_json()
    body["auth"] = {"username": "u", "password": "another"}
    assert record.digest == digest(body)
    assert record.names == {"reference": "r.example/a"}


@pytest.mark.parametrize("info", ["", "[]", "{", '{"acc": 1, "id": "x", "user": ""}', "[" * 100_000])
def test_an_odd_word_on_the_sender_is_no_word(info: str) -> None:
    found = actor(Meta(request_info=info), trusted=True)
    assert found.model_dump(exclude_none=True) == {"verified": False}


def test_a_word_on_the_sender_that_anybody_could_have_written_is_not_verified() -> None:
    found = actor(Meta(request_info=INFO), trusted=False)
    assert (found.user, found.verified) == ("alice", False)


async def test_a_claim_that_is_no_line_of_text_is_refused(store: Store) -> None:
    node = Node(store)
    for claim in ("", "x" * 257, "a\x1b[31m", "é"):
        assert await node.send("pod.create", CREATE, {wire.ACTOR: claim}) == "invalid_argument"


def test_names_are_those_of_the_request() -> None:
    assert names({"pod_id": "p", "container": {"id": "c"}, "name": 3}) == {"pod_id": "p", "container_id": "c"}
    assert names({"session_id": "s", "pod": "x"}) == {"session_id": "s"}
