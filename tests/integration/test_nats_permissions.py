"""The ready-made permissions on a real server: enough for each role, and no more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nats
import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client as Nats
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from tests.conftest import StartNats
from tests.integration.conftest import mock_settings
from tests.integration.test_nats_connection import Operator, operator, secret
from tests.support.cli import vcnode
from vcnode.client import Client
from vcnode.models.commands import PodDelete
from vcnode.models.permissions import Permissions, Role, permissions
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.models.subjects import Subjects
from vcnode.node import running
from vcnode.settings import NatsSettings, Settings

__all__ = ["operator"]

pytestmark = pytest.mark.nats

WAIT_S = 20.0
SUBJECTS = Subjects()
USERS = ((Role.NODE, "n1"), (Role.NODE, "n2"), (Role.SCHEDULER, "main"), (Role.OBSERVER, "eye"))


@dataclass
class World:
    """A server with a user per role, and how each connects."""

    url: str
    settings: Callable[[str], NatsSettings]

    def node(self, name: str, directory: Path) -> Settings:
        return mock_settings(directory / name, self.url, node_name=name).model_copy(
            update={"nats": self.settings(name)}
        )


def granted(name: str) -> Permissions:
    [role] = [role for role, user in USERS if user == name]
    return permissions(role, name, SUBJECTS)


@pytest.fixture(params=["config", "operator"])
async def world(
    request: pytest.FixtureRequest, start_nats: StartNats, tmp_path: Path, operator: Operator
) -> World:
    if request.param == "config":
        users = "\n".join(
            f"{{ user: {name}, password: pw, permissions: {granted(name).as_config()} }}" for _, name in USERS
        )
        server = await start_nats(config=f"authorization {{ users: [ {users} ] }}")
        password = secret(tmp_path / "password", "pw")

        def settings(name: str) -> NatsSettings:
            return NatsSettings(
                url=server.url, user=name, password_file=password, inbox_prefix=granted(name).inbox_prefix
            )
    else:
        server = await start_nats(config=operator.config)

        def settings(name: str) -> NatsSettings:
            file = secret(tmp_path / f"{name}.creds", operator.creds(name, grants=granted(name).as_claims()))
            return NatsSettings(url=server.url, creds_file=file, inbox_prefix=granted(name).inbox_prefix)

    return World(server.url, settings)


@dataclass
class Thief:
    """Somebody with a user's credentials and a client of their own."""

    client: Nats
    denied: asyncio.Queue[str]

    async def publishing_is_denied(self, subject: str, body: bytes = b"{}") -> None:
        await self.client.publish(subject, body, reply=self.client.new_inbox())
        await self._denial(subject)

    async def subscribing_is_denied(self, subject: str) -> None:
        await self.client.subscribe(subject)
        await self._denial(subject)

    async def _denial(self, subject: str) -> None:
        await self.client.flush()
        async with asyncio.timeout(WAIT_S):
            text = await self.denied.get()
        assert "permissions violation" in text.lower()
        assert subject.lower() in text.lower()


async def steal(settings: NatsSettings) -> Thief:
    denied: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(exc: Exception) -> None:
        denied.put_nowait(str(exc))

    login: dict[str, object] = {"user": settings.user, "password": "pw"}
    if settings.creds_file is not None:
        login = {"user_credentials": str(settings.creds_file)}
    client = await nats.connect(
        settings.url, error_cb=on_error, inbox_prefix=settings.inbox_prefix, allow_reconnect=False, **login
    )
    return Thief(client, denied)


async def test_every_role_can_do_its_work(world: World, short_dir: Path) -> None:
    container = ContainerSpec(id="main", image="busybox", cmd=Cmd(args=("sleep", "600")))
    async with (
        running(world.node("n1", short_dir)) as node,
        running(world.node("n2", short_dir)) as other,
        await Client.connect(world.settings("main")) as scheduler,
        await Client.connect(world.settings("eye")) as observer,
    ):
        for each in (node, other):
            async with asyncio.timeout(WAIT_S):
                await each.connection.wait_connected()
        one = scheduler.node("n1")
        await one.image_import("busybox", str(node.settings.allowed_roots[0]))
        async with observer.events(node="n1", since="all") as events:
            await one.pod_run(PodSpec(id="p1", containers=(container,)))
            command_id = await one.enqueue("pod.delete", PodDelete(pod_id="p1", force=True))
            async with asyncio.timeout(WAIT_S):
                async for event in events:
                    if event.kind == "command.done" and event.commandid == command_id:
                        break
        found = {ping.node for ping in await scheduler.ping_all(timeout_s=WAIT_S, enough=2)}
        assert found == {"n1", "n2"}

        raw = await steal(world.settings("eye"))
        bucket = await raw.client.jetstream().key_value("vcnode-nodes")
        lease = json.loads((await bucket.get("n1")).value or b"")
        assert lease["node"] == "n1"
        await raw.client.close()
    # A restart finds what the stream and the bucket have of this node.
    async with running(world.node("n1", short_dir)) as node:
        async with asyncio.timeout(WAIT_S):
            await node.connection.wait_connected()


async def test_a_node_that_lost_its_database_may_look_up_what_the_stream_has(
    world: World, short_dir: Path
) -> None:
    settings = world.node("n1", short_dir)
    for _ in range(2):
        async with running(settings) as node:
            async with asyncio.timeout(WAIT_S):
                await node.connection.wait_connected()
        (settings.state_dir / "node.db").unlink()
    async with (
        await Client.connect(world.settings("eye")) as observer,
        observer.events(node="n1", since="all", follow=False) as events,
    ):
        numbers = [int(event.sequence) async for event in events]
    assert len(numbers) > 4
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_stolen_node_credential_opens_nothing_of_others(world: World, short_dir: Path) -> None:
    async with running(world.node("n1", short_dir)) as node, running(world.node("n2", short_dir)) as other:
        for each in (node, other):
            async with asyncio.timeout(WAIT_S):
                await each.connection.wait_connected()
        thief = await steal(world.settings("n2"))
        for subject in (
            "vcnode.rpc.n1.node.info",
            "vcnode.cmd.n1.pod.delete",
            "vcnode.all.node.ping",
            "vcnode.evt.n1.pod.started.web",
            "vcnode.io.n1.s1.stdin",
            "$KV.vcnode-nodes.n1",
            "$KV.vcnode-pods.n1.web",
            "$JS.API.STREAM.DELETE.vcnode-events",
            "$JS.API.STREAM.UPDATE.vcnode-events",
            "$JS.API.STREAM.PURGE.vcnode-events",
            "$JS.API.STREAM.MSG.GET.vcnode-events",
            "$JS.API.STREAM.MSG.GET.KV_vcnode-pods",
            "$JS.API.DIRECT.GET.KV_vcnode-nodes.$KV.vcnode-nodes.n1",
            "$JS.API.DIRECT.GET.vcnode-events.vcnode.evt.n1.>",
            "$JS.API.CONSUMER.CREATE.vcnode-events",
            "$JS.API.CONSUMER.CREATE.vcnode-commands.n2.vcnode.cmd.n1.>",
            "$JS.API.CONSUMER.CREATE.KV_vcnode-pods.x.$KV.vcnode-pods.n1.>",
            "$JS.API.CONSUMER.DURABLE.CREATE.vcnode-commands.n2",
            "$JS.API.CONSUMER.MSG.NEXT.vcnode-commands.n1",
            "$JS.API.CONSUMER.DELETE.vcnode-commands.n1",
        ):
            await thief.publishing_is_denied(subject)
        for subject in (
            "vcnode.rpc.n1.>",
            "vcnode.evt.>",
            "vcnode.io.n1.>",
            "_INBOX.>",
            "_INBOX_scheduler_main.>",
            ">",
        ):
            await thief.subscribing_is_denied(subject)

        # What is allowed by its subject must say the same in its body.
        liar = ConsumerConfig(
            name="liar",
            ack_policy=AckPolicy.NONE,
            filter_subject="$KV.vcnode-pods.n1.>",
            deliver_subject=thief.client.new_inbox(),
        )
        request = {"stream_name": "KV_vcnode-pods", "config": liar.as_dict()}
        answer = await thief.client.request(
            "$JS.API.CONSUMER.CREATE.KV_vcnode-pods.liar.$KV.vcnode-pods.n2.>",
            json.dumps(request).encode(),
            timeout=WAIT_S,
        )
        assert json.loads(answer.data)["error"]["code"] == 400
        with pytest.raises(nats.js.errors.BadRequestError):
            await thief.client.jetstream().add_stream(
                StreamConfig(name="vcnode-events", subjects=["vcnode.evt.>"], max_msgs=1)
            )
        await thief.client.close()


async def test_an_observer_commands_nobody(world: World, short_dir: Path) -> None:
    async with running(world.node("n1", short_dir)) as node:
        async with asyncio.timeout(WAIT_S):
            await node.connection.wait_connected()
        thief = await steal(world.settings("eye"))
        for subject in (
            "vcnode.rpc.n1.pod.list",
            "vcnode.cmd.n1.pod.delete",
            "vcnode.all.node.ping",
            "vcnode.io.n1.s1.stdin",
            "vcnode.evt.n1.pod.deleted.web",
            "$KV.vcnode-nodes.n1",
            "$JS.API.STREAM.PURGE.vcnode-events",
            "$JS.API.CONSUMER.CREATE.vcnode-commands",
        ):
            await thief.publishing_is_denied(subject)
        for subject in ("vcnode.rpc.>", "vcnode.io.>", "_INBOX_scheduler_main.>", "$KV.>"):
            await thief.subscribing_is_denied(subject)
        await thief.client.close()


async def test_the_command_line_prints_them() -> None:
    config = await vcnode("nats", "permissions", "node", "host1")
    assert (config.code, config.out) == (0, permissions(Role.NODE, "host1", SUBJECTS).as_config() + "\n")
    assert config.err == 'nats.inbox_prefix = "_INBOX_node_host1"\n'
    claims = await vcnode("nats", "permissions", "observer", "eye", "--form", "jwt", "--prefix", "prod")
    assert json.loads(claims.out) == permissions(Role.OBSERVER, "eye", Subjects("prod")).as_claims()
    assert (await vcnode("nats", "permissions", "node", "a.b")).code == 2
