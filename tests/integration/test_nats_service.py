"""Commands over a real nats-server: one node, many callers, and everything that goes wrong between them."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client as NatsClient

from tests.integration.nats_node import WAIT_S, running
from tests.support.nats import NatsServer
from tests.unit.handlers.fakes import NOW, Gate, pod_status
from vcnode.aio import Tasks
from vcnode.bus.service import endpoint_name
from vcnode.client import Client
from vcnode.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    NodeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    VcnodeError,
)
from vcnode.models import wire
from vcnode.models.commands import COMMANDS
from vcnode.models.pod import PodSpec

pytestmark = pytest.mark.nats

StartNats = Any


async def raw(url: str) -> NatsClient:
    return await nats.connect(url, allow_reconnect=False)


async def until(condition: Any) -> None:
    """Wait until *condition* holds; the thing itself has no event to wait for."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_every_kind_of_answer_reaches_the_client(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        n1 = client.node("n1")
        assert (await n1.pod_create(PodSpec(id="p1"))).pod_id == "p1"
        assert (await n1.container_exec("p1", "c1", ["cat"], stdin=b"\x00\xff")).stdout.raw == b"\x00\xff"
        node.pods.errors["status"] = NotFoundError("There is no pod p9.", pod_id="p9")
        with pytest.raises(NotFoundError) as caught:
            await n1.pod_status("p9")
        assert caught.value.message == "There is no pod p9."
        assert caught.value.details["pod_id"] == "p9"
        assert caught.value.details["error_id"]
        node.pods.errors["start"] = RuntimeError("boom")
        with pytest.raises(NodeError) as failed:
            await n1.pod_start("p1")
        assert "boom" not in failed.value.message
        with pytest.raises(UnavailableError, match="No node named n2"):
            await client.node("n2").node_ping()


async def test_a_busy_endpoint_blocks_nobody(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        gate = node.pods.gates["create"] = Gate()
        async with Tasks() as tasks:
            done: list[str] = []

            async def create(pod_id: str) -> None:
                done.append((await client.node("n1").pod_create(PodSpec(id=pod_id))).pod_id)

            tasks.spawn(create("slow-1"), name="1")
            tasks.spawn(create("slow-2"), name="2")
            await until(lambda: gate.waiting == 2)
            await client.node("n1").node_ping()
            await client.node("n1").pod_start("p1")
            assert not done
            gate.open()
            assert await tasks.join(timeout_s=WAIT_S)
            assert sorted(done) == ["slow-1", "slow-2"]


async def test_two_hundred_at_once_are_all_answered(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        running(nats_server.url, tmp_path, max_concurrent=200) as node,
        await Client.connect(nats_server.url) as client,
    ):
        gate = node.pods.gates["create"] = Gate()
        names: list[str] = []

        async def create(i: int) -> None:
            names.append((await client.node("n1").pod_create(PodSpec(id=f"p{i}"))).pod_id)

        async with Tasks() as tasks:
            for i in range(200):
                tasks.spawn(create(i), name=f"{i}")
            await until(lambda: gate.waiting == 200)
            gate.open()
            assert await tasks.join(timeout_s=WAIT_S)
        assert sorted(names) == sorted(f"p{i}" for i in range(200))


async def test_without_a_slot_the_answer_comes_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        running(nats_server.url, tmp_path, max_concurrent=2) as node,
        await Client.connect(nats_server.url) as client,
    ):
        gate = node.pods.gates["exec"] = Gate()
        n1 = client.node("n1")

        async def hang() -> None:
            await n1.container_exec("p1", "c1", ["sleep", "9"])

        async with Tasks() as tasks:
            tasks.spawn(hang(), name="1")
            tasks.spawn(hang(), name="2")
            await until(lambda: gate.waiting == 2)
            with pytest.raises(ResourceExhaustedError) as caught:
                await n1.container_exec("p1", "c1", ["true"], command_id="c-3")
            assert caught.value.details["limit"] == 2
            # A node full of hanging commands can still be asked, and emptied.
            await n1.pod_status("p1")
            await n1.pod_stop("p1")
            gate.open()
            assert await tasks.join(timeout_s=WAIT_S)
            await n1.container_exec("p1", "c1", ["true"], command_id="c-3")


async def test_a_drain_lets_running_commands_finish(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        gate = node.pods.gates["run"] = Gate()
        n1 = client.node("n1")
        states: list[str] = []

        async def run() -> None:
            states.append((await n1.pod_run(PodSpec(id="p1"))).state)

        async def drain() -> None:
            states.append(f"drained {await node.service.drain(timeout_s=WAIT_S)}")

        async with Tasks() as tasks:
            tasks.spawn(run(), name="run")
            await gate.arrived.wait()
            tasks.spawn(drain(), name="drain")
            await until(lambda: node.world.node.info().state == "draining")
            with pytest.raises(UnavailableError, match="takes no new commands"):
                await n1.pod_create(PodSpec(id="p2"))
            assert (await n1.node_info()).state == "draining"
            gate.open()
            assert await tasks.join(timeout_s=WAIT_S)
        assert sorted(states) == ["drained True", "running"]
        with pytest.raises(UnavailableError, match="No node named n1"):
            await n1.node_ping()


async def test_a_drain_at_its_end_undoes_and_answers_what_still_runs(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        gate = node.pods.gates["run"] = Gate()
        errors: list[VcnodeError] = []

        async def run() -> None:
            try:
                await client.node("n1").pod_run(PodSpec(id="p1"))
            except VcnodeError as exc:
                errors.append(exc)

        async with Tasks() as tasks:
            tasks.spawn(run(), name="run")
            await gate.arrived.wait()
            assert not await node.service.drain(timeout_s=0.0)
            assert await tasks.join(timeout_s=WAIT_S)
        assert [type(error) for error in errors] == [UnavailableError]
        assert node.pods.undone == ["run"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", ""),
        (b"\xff\xfe", ""),
        (b'{"pod": {"id": "p1", "colour": "red"}}', "pod.colour"),
        (b'{"pod": {"id": "../../etc"}}', "pod.id"),
    ],
)
async def test_bad_bodies_are_explained_to_plain_nats_callers(
    nats_server: NatsServer, tmp_path: Path, body: bytes, field: str
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        client = await raw(nats_server.url)
        msg = await client.request("vcnode.rpc.n1.pod.create", body, timeout=WAIT_S)
        reply = json.loads(msg.data)
        assert reply["code"] == "invalid_argument"
        assert reply["details"]["violations"][0]["field"] == field
        assert msg.headers is not None
        assert msg.headers[wire.SERVICE_ERROR_CODE] == "400"
        assert msg.headers[wire.SERVICE_ERROR] == reply["message"]
        assert msg.headers[wire.COMMAND_ID]
        assert not node.pods.calls
        await client.close()


async def test_the_same_id_is_carried_out_once(nats_server: NatsServer, tmp_path: Path) -> None:
    client = await raw(nats_server.url)
    headers = {wire.COMMAND_ID: "job-17"}
    body = b'{"pod": {"id": "p1"}}'

    async def ask(content: bytes = body) -> Any:
        return await client.request(
            "vcnode.rpc.n1.pod.create", content, timeout=WAIT_S, headers=dict(headers)
        )

    async with running(nats_server.url, tmp_path) as node:
        first, second = await ask(), await ask()
        other = await ask(b'{"pod": {"id": "p2"}}')
        assert node.pods.count("create") == 1
    async with running(nats_server.url, tmp_path) as restarted:
        third = await ask()
        assert restarted.pods.count("create") == 0
    assert first.data == second.data == third.data
    assert wire.DUPLICATE not in first.headers
    assert second.headers[wire.DUPLICATE] == third.headers[wire.DUPLICATE] == "true"
    assert json.loads(other.data)["code"] == "already_exists"
    await client.close()


async def test_client_errors_have_their_classes(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        n1 = client.node("n1")
        await n1.pod_create(PodSpec(id="p1"), command_id="x")
        with pytest.raises(AlreadyExistsError):
            await n1.pod_create(PodSpec(id="p2"), command_id="x")
        with pytest.raises(InvalidArgumentError):
            await n1.pod_status("Not An Id")
        with pytest.raises(InvalidArgumentError, match="takes at most"):
            await n1.container_exec("p1", "c1", ["cat"], stdin=b"x" * 2**20)
        assert node.connection.connected
        assert (await n1.pod_status("p1")).pod_id == "p1"


async def test_a_deadline_is_kept_by_the_node(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node:
        client = await raw(nats_server.url)
        node.pods.gates["create"] = Gate()

        async def ask(seconds: float) -> Any:
            deadline = (NOW + timedelta(seconds=seconds)).isoformat()  # the node's clock stands at NOW
            msg = await client.request(
                "vcnode.rpc.n1.pod.create",
                b'{"pod": {"id": "p1"}}',
                timeout=WAIT_S,
                headers={wire.DEADLINE: deadline},
            )
            return json.loads(msg.data)

        late = await ask(-1)
        assert (late["code"], late["details"]["begun"]) == ("deadline_exceeded", False)
        assert not node.pods.calls
        cut = await ask(0.05)
        assert (cut["code"], cut["details"]["begun"]) == ("deadline_exceeded", True)
        assert node.pods.undone == ["create"]
        await client.close()


async def test_a_node_that_does_not_answer_costs_the_caller_its_deadline(nats_server: NatsServer) -> None:
    silent = await raw(nats_server.url)
    await silent.subscribe("vcnode.rpc.n1.pod.start")
    await silent.flush()
    async with await Client.connect(nats_server.url) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.node("n1").pod_start("p1", deadline_s=-4.9, command_id="c-1")
    assert caught.value.details["command_id"] == "c-1"
    await silent.close()


async def test_a_reply_too_large_is_an_error_and_the_connection_lives(
    start_nats: StartNats, tmp_path: Path
) -> None:
    server = await start_nats(config="max_payload: 65536")
    async with running(server.url, tmp_path) as node, await Client.connect(server.url) as client:
        node.pods.pods = [pod_status(f"p{i}", labels={"k": "v" * 200}) for i in range(200)]
        with pytest.raises(ResourceExhaustedError, match="ask for less"):
            await client.node("n1").pod_list()
        node.pods.pods = node.pods.pods[:3]
        assert len((await client.node("n1").pod_list()).pods) == 3
        assert node.observer.states == [True]


async def test_malformed_messages_do_not_make_the_node_deaf(nats_server: NatsServer, tmp_path: Path) -> None:
    """A reply subject or a status line that is not UTF-8 ends the read loop of nats-py as it comes."""
    host, port = nats_server.url.removeprefix("nats://").split(":")
    subject = b"vcnode.rpc.n1.node.ping"
    async with running(nats_server.url, tmp_path), await Client.connect(nats_server.url) as client:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        writer.write(b"PUB " + subject + b" reply.\xff\xfe 2\r\n{}\r\n")
        header = b"NATS/1.0 \xff\xff\xff \xfe\xfe\r\n\r\n"
        writer.write(b"HPUB %s x %d %d\r\n%s\r\n" % (subject, len(header), len(header), header))
        header = b"NATS/1.0\r\n\xff: \xff\r\nVcnode-Command-Id: \xff\r\n\r\n"
        writer.write(b"HPUB %s x %d %d\r\n%s\r\n" % (subject, len(header), len(header), header))
        writer.write(b"PUB " + subject + b" 2\r\n{}\r\n")  # and one without any reply subject
        writer.write(b"PING\r\n")
        await writer.drain()
        async with asyncio.timeout(WAIT_S):
            while b"PONG" not in await reader.readline():
                pass
        writer.close()
        await writer.wait_closed()
        for _ in range(3):
            await client.node("n1").node_ping()


async def test_the_service_is_found_by_the_micro_protocol(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server.url, tmp_path) as node:
        client = await raw(nats_server.url)

        async def ask(what: str) -> Any:
            return json.loads((await client.request(f"$SRV.{what}.vcnode", b"", timeout=WAIT_S)).data)

        ping = await ask("PING")
        assert (ping["name"], ping["metadata"]["node"]) == ("vcnode", "n1")
        info = await ask("INFO")
        assert {e["name"] for e in info["endpoints"]} == {endpoint_name(verb) for verb in COMMANDS}
        assert {e["subject"] for e in info["endpoints"]} == {f"vcnode.rpc.n1.{verb}" for verb in COMMANDS}
        assert all(e["metadata"]["summary"] for e in info["endpoints"])

        node.pods.errors["start"] = NotFoundError("No.")
        gate = node.pods.gates["create"] = Gate()
        pending = await client.subscribe("answer")
        await client.publish("vcnode.rpc.n1.pod.create", b'{"pod": {"id": "p1"}}', reply="answer")
        await gate.arrived.wait()
        await client.request("vcnode.rpc.n1.pod.start", b'{"pod_id": "p1"}', timeout=WAIT_S)
        gate.open()
        await pending.next_msg(timeout=WAIT_S)
        stats = {e["name"]: e for e in (await ask("STATS"))["endpoints"]}
        assert stats["pod-start"]["num_requests"] == stats["pod-start"]["num_errors"] == 1
        assert stats["pod-start"]["last_error"] == "not_found"
        assert stats["pod-create"]["num_errors"] == 0
        assert stats["pod-create"]["processing_time"] >= stats["pod-create"]["average_processing_time"] > 0
        await client.close()


async def test_all_nodes_answer_a_broadcast(nats_server: NatsServer, tmp_path: Path) -> None:
    async with await Client.connect(nats_server.url) as client:
        assert await client.ping_all(timeout_s=WAIT_S) == ()  # nobody listens: known at once
        async with (
            running(nats_server.url, tmp_path, name="n1"),
            running(nats_server.url, tmp_path, name="n2"),
        ):
            pings = await client.ping_all(timeout_s=WAIT_S, enough=2)
    assert sorted(ping.node for ping in pings) == ["n1", "n2"]


async def test_prefixes_keep_fleets_apart(nats_server: NatsServer, tmp_path: Path) -> None:
    async with (
        running(nats_server.url, tmp_path),
        await Client.connect(nats_server.url, prefix="other") as client,
    ):
        with pytest.raises(UnavailableError, match="under 'other'"):
            await client.node("n1").node_ping()
