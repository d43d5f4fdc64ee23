"""Every way to authenticate, and every way in which a connection is lost."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys
import pytest
import trustme

from tests.integration.nats_node import WAIT_S, running
from tests.support.nats import NatsServer
from tests.unit.handlers.fakes import Gate
from vcnode.aio import Tasks
from vcnode.bus.embedded import EmbeddedNats
from vcnode.client import Client
from vcnode.errors import InvalidArgumentError, UnavailableError
from vcnode.models.pod import PodSpec
from vcnode.settings import NatsSettings

pytestmark = pytest.mark.nats

StartNats = Any


def secret(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


async def check(settings: NatsSettings, directory: Path) -> None:
    """A node and a client get in with *settings*, and speak to each other."""
    async with running(settings, directory) as node, await Client.connect(settings) as client:
        assert (await client.node("n1").node_ping()).node == "n1"
        await node.emit()
        await node.all_published()


async def refused(settings: NatsSettings) -> str:
    """*settings* do not get in; returns why."""
    with pytest.raises(UnavailableError) as caught:
        await Client.connect(settings.model_copy(update={"connect_timeout_s": 0.5}))
    return caught.value.message


async def not_authorized(settings: NatsSettings) -> None:
    message = await refused(settings)
    # The server's reset can overtake its last words.
    assert "Authorization Violation" in message or "are the credentials right?" in message


async def test_user_and_password(start_nats: StartNats, tmp_path: Path) -> None:
    server = await start_nats(config='authorization { user: ann, password: "s3cret pw" }')
    password = secret(tmp_path / "password", "s3cret pw\n")
    settings = NatsSettings(url=server.url, user="ann", password_file=password)
    await check(settings, tmp_path)
    password.write_text("wrong")
    await not_authorized(settings)
    password.unlink()
    assert "cannot be read (FileNotFoundError)" in await refused(settings)
    await not_authorized(NatsSettings(url=server.url))


async def test_user_and_password_in_the_url_are_not_shown(start_nats: StartNats, tmp_path: Path) -> None:
    server = await start_nats(config="authorization { user: ann, password: pw }")
    url = server.url.replace("nats://", "nats://ann:pw@")
    await check(NatsSettings(url=url), tmp_path)
    message = await refused(NatsSettings(url=url.replace(":pw@", ":hidden@")))
    assert "hidden" not in message
    assert server.url.removeprefix("nats://") in message


async def test_token(start_nats: StartNats, tmp_path: Path) -> None:
    server = await start_nats(config="authorization { token: t0ken }")
    settings = NatsSettings(url=server.url, token_file=secret(tmp_path / "token", "t0ken\n"))
    await check(settings, tmp_path)
    secret(tmp_path / "token", "other")
    await not_authorized(settings)


def key_pair(kind: int) -> nkeys.KeyPair:
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), kind))


async def test_nkey(start_nats: StartNats, tmp_path: Path) -> None:
    user = key_pair(nkeys.PREFIX_BYTE_USER)
    server = await start_nats(config=f"authorization {{ users: [ {{ nkey: {user.public_key.decode()} }} ] }}")
    file = secret(tmp_path / "seed", user.seed.decode() + "\n")
    settings = NatsSettings(url=server.url, nkey_seed_file=file)
    await check(settings, tmp_path)
    secret(file, key_pair(nkeys.PREFIX_BYTE_USER).seed.decode())
    await not_authorized(settings)
    secret(file, "SUnonsense")
    assert "no usable nkey seed" in await refused(settings)


@dataclass
class Operator:
    """An operator with one account, as server configuration and credentials."""

    config: str
    account: Any
    account_id: str

    def creds(self, name: str = "node", *, grants: dict[str, Any] | None = None, **claims: Any) -> str:
        user = key_pair(nkeys.PREFIX_BYTE_USER)
        limits = {"subs": -1, "data": -1, "payload": -1}
        nats = {"type": "user", "version": 2, "pub": {}, "sub": {}} | limits | (grants or {})
        token = jwt(self.account, user.public_key.decode(), name, nats, **claims)
        return (
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )


def jwt(issuer: Any, subject: str, name: str, nats: dict[str, Any], **claims: Any) -> str:
    """A NATS JWT: ed25519-nkey over header and claims (nats-io/jwt, version 2)."""

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    body = {"iss": issuer.public_key.decode(), "sub": subject, "name": name, "iat": 1, "nats": nats} | claims
    digest = hashlib.new("sha512_256", json.dumps(body).encode()).digest()
    body["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
    signed = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    signature = base64.urlsafe_b64encode(issuer.sign(signed.encode())).rstrip(b"=").decode()
    return f"{signed}.{signature}"


@pytest.fixture
def operator() -> Operator:
    root = key_pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, system = (key_pair(nkeys.PREFIX_BYTE_ACCOUNT) for _ in range(2))
    unlimited = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}

    def account_jwt(keys: Any, limits: dict[str, Any]) -> str:
        nats = {"type": "account", "version": 2, "limits": limits}
        return jwt(root, keys.public_key.decode(), "account", nats)

    own = {"type": "operator", "version": 2, "system_account": system.public_key.decode()}
    account_id, system_id = account.public_key.decode(), system.public_key.decode()
    config = f"""
        operator: {jwt(root, root.public_key.decode(), "op", own)}
        system_account: {system_id}
        resolver: MEMORY
        resolver_preload: {{
            {account_id}: {account_jwt(account, unlimited | storage)}
            {system_id}: {account_jwt(system, unlimited)}
        }}
    """
    return Operator(config, account, account_id)


async def test_credentials_file(start_nats: StartNats, tmp_path: Path, operator: Operator) -> None:
    server = await start_nats(config=operator.config)
    file = secret(tmp_path / "node.creds", operator.creds())
    settings = NatsSettings(url=server.url, creds_file=file)
    await check(settings, tmp_path)
    secret(file, "no markers here")
    assert "holds no user" in await refused(settings)
    secret(file, operator.creds().replace("SU", "SX"))
    assert "no usable nkey seed" in await refused(settings)


async def test_an_expired_user_is_replaced_when_its_file_is(
    start_nats: StartNats, tmp_path: Path, operator: Operator
) -> None:
    """nats-py closes its client for good when the server says that the user has expired."""
    import time

    server = await start_nats(config=operator.config)
    file = secret(tmp_path / "node.creds", operator.creds(exp=int(time.time()) + 2))
    async with running(NatsSettings(url=server.url, creds_file=file), tmp_path) as node:
        await node.emit()
        await node.all_published()
        down = node.connection.changed
        await asyncio.wait_for(down.wait(), WAIT_S)  # the server ends it when the time has come
        await node.emit()
        secret(file, operator.creds())
        await node.connected()
        await node.all_published()
        async with await Client.connect(NatsSettings(url=server.url, creds_file=file)) as client:
            await client.node("n1").node_ping()


@dataclass
class Tls:
    """A certificate authority, a server's and a client's certificate, as files."""

    ca: Path
    cert: Path
    key: Path
    config: str


@pytest.fixture
def tls(short_dir: Path) -> Tls:
    directory = short_dir / "nats0"  # where the server of this test looks
    directory.mkdir()
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "nats.example")
    client = authority.issue_cert("client.example")
    names = {name: directory / f"{name}.pem" for name in ("ca", "server", "server-key", "cert", "key")}
    authority.cert_pem.write_to_path(str(names["ca"]))
    server.cert_chain_pems[0].write_to_path(str(names["server"]))
    server.private_key_pem.write_to_path(str(names["server-key"]))
    client.cert_chain_pems[0].write_to_path(str(names["cert"]))
    client.private_key_pem.write_to_path(str(names["key"]))
    config = (
        f'tls {{ cert_file: "{names["server"]}", key_file: "{names["server-key"]}", '
        f'ca_file: "{names["ca"]}", verify: %s }}'
    )
    return Tls(names["ca"], names["cert"], names["key"], config)


async def test_tls_with_a_client_certificate(start_nats: StartNats, tmp_path: Path, tls: Tls) -> None:
    server = await start_nats(config=tls.config % "true")
    settings = NatsSettings(url=server.url, tls_ca_file=tls.ca, tls_cert_file=tls.cert, tls_key_file=tls.key)
    await check(settings, tmp_path)
    await refused(NatsSettings(url=server.url, tls_ca_file=tls.ca))


async def test_tls_checks_the_servers_name(start_nats: StartNats, tmp_path: Path, tls: Tls) -> None:
    server = await start_nats(config=tls.config % "false")
    settings = NatsSettings(url=server.url, tls_ca_file=tls.ca, tls_hostname="nats.example")
    await check(settings, tmp_path)
    wrong = settings.model_copy(update={"tls_hostname": "other.example"})
    assert "certificate" in await refused(wrong)
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    assert "certificate" in await refused(settings.model_copy(update={"tls_ca_file": stranger}))


async def test_a_server_that_merely_allows_tls_is_used_with_it(
    start_nats: StartNats, tmp_path: Path, tls: Tls
) -> None:
    server = await start_nats(config=f"{tls.config % 'false'}\nallow_non_tls: true")
    await check(NatsSettings(url=server.url, tls_ca_file=tls.ca), tmp_path)


async def test_without_tls_no_secret_is_sent_where_tls_is_asked_for(tls: Tls, tmp_path: Path) -> None:
    """A server, or whoever answers in its place, that offers no TLS gets nothing."""
    received = bytearray()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576}\r\n')
        await writer.drain()
        received.extend(await reader.read())
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    settings = NatsSettings(
        url=f"nats://127.0.0.1:{port}",
        tls_ca_file=tls.ca,
        token_file=secret(tmp_path / "token", "t0ken"),
    )
    async with listener:
        assert "offers no TLS" in await refused(settings)
    assert not received


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"user": "ann"}, "nats.password_file"),
        ({"token_file": "x", "creds_file": "y"}, "nats.token_file"),
        ({"url": "http://127.0.0.1"}, "nats.url"),
        ({"url": " , "}, "nats.url"),
        ({"tls_ca_file": "/does/not/exist"}, "nats.tls_ca_file"),
    ],
)
async def test_settings_that_cannot_work_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await Client.connect(NatsSettings(**changes))
    assert caught.value.details["violations"][0]["field"] == field


async def test_a_node_may_start_before_nats(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await nats_server.kill()
    with caplog.at_level(logging.WARNING):
        async with running(nats_server.url, tmp_path, wait=False) as node:
            async with asyncio.timeout(WAIT_S):
                while "trying again until it works" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not node.connection.connected
            await nats_server.start()
            await node.connected()
            async with await Client.connect(nats_server.url) as client:
                await client.node("n1").node_ping()


async def test_a_node_that_never_reaches_nats_stops_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    await nats_server.kill()
    async with running(nats_server.url, tmp_path, wait=False) as node:
        await node.emit()
        assert not await node.publisher.flush(timeout_s=0.05)
        async with asyncio.timeout(WAIT_S):
            await node.service.drain(timeout_s=1.0)


async def test_a_client_without_nats_is_told_so() -> None:
    settings = NatsSettings(url="nats://127.0.0.1:1", connect_timeout_s=0.3)
    assert "cannot be reached" in await refused(settings)


async def test_a_reply_survives_the_loss_of_the_server(nats_server: NatsServer, tmp_path: Path) -> None:
    """The command runs through the outage, once; its caller gets the reply over the new connection."""
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        gate = node.pods.gates["create"] = Gate()
        names: list[str] = []

        async def create() -> None:
            names.append((await client.node("n1").pod_create(PodSpec(id="p1"))).pod_id)

        async with Tasks() as tasks:
            tasks.spawn(create(), name="create")
            await gate.arrived.wait()
            await nats_server.kill()
            gate.open()
            await nats_server.start()
            assert await tasks.join(timeout_s=WAIT_S)
        assert names == ["p1"]
        assert node.pods.count("create") == 1


async def test_a_command_sent_while_the_server_is_away_arrives_later(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node, await Client.connect(nats_server.url) as client:
        down = node.connection.changed
        await nats_server.kill()
        await asyncio.wait_for(down.wait(), WAIT_S)
        names: list[str] = []

        async def create() -> None:
            names.append((await client.node("n1").pod_create(PodSpec(id="p1"))).pod_id)

        async with Tasks() as tasks:
            tasks.spawn(create(), name="create")
            await nats_server.start()
            assert await tasks.join(timeout_s=WAIT_S)
        assert names == ["p1"]
        assert node.pods.count("create") == 1


async def test_a_node_that_does_not_come_back_is_named_after_an_outage(nats_server: NatsServer) -> None:
    async with await Client.connect(nats_server.url) as client:
        await nats_server.kill()
        await nats_server.start()
        with pytest.raises(UnavailableError, match="No node named n1"):
            await client.node("n1").pod_start("p1", deadline_s=0.1)


@pytest.mark.invented_events
async def test_the_embedded_server_keeps_port_and_events_over_a_crash(short_dir: Path) -> None:
    async with EmbeddedNats(short_dir / "store") as server:
        url, pid = server.url, server.pid
        async with running(url, short_dir) as node, await Client.connect(url) as client:
            await node.emit()
            await node.all_published()
            await server.kill()
            await server.start()
            assert (server.url, server.pid != pid) == (url, True)
            await node.emit()
            await node.all_published()
            async with client.events(since="all", follow=False) as events:
                assert [event.sequence async for event in events] == ["1", "2"]
        await server.stop()
        await server.stop()  # harmless
        assert server.pid is None


async def test_an_embedded_server_that_cannot_start_says_why(short_dir: Path) -> None:
    with pytest.raises(UnavailableError, match="Parse error"):
        await EmbeddedNats(short_dir / "store", config="nonsense {").start()
    with pytest.raises(UnavailableError, match="did not come up"):
        await EmbeddedNats(short_dir / "store", binary=Path("/bin/true")).start()


async def test_the_embedded_server_ends_with_its_parent(short_dir: Path) -> None:
    import sys

    script = """
import asyncio, os, pathlib, signal, sys
from vcnode.bus.embedded import EmbeddedNats
async def main():
    server = EmbeddedNats(pathlib.Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(short_dir)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # gone already
        await parent.wait()
        return
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), WAIT_S)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        await parent.wait()
