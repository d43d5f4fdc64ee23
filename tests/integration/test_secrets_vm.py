"""A secret on its way into a real guest: seen there, and nowhere on the host."""

from __future__ import annotations

import base64
import logging
import time
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.network import NetworkModel
from vcnode.models.pod import Cmd, ContainerSpec, EnvVar, PodSpec
from vcnode.models.secrets import Sealed, SecretFile
from vcnode.models.xkeys import CurveKey
from vcnode.node import Node, running
from vcnode.pods.outbox import Outbox
from vcnode.settings import NatsSettings, PolicySettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

MARKER = "MARKER-77aa01"


def seal(key: str) -> Sealed:
    sender = CurveKey.make()
    box = base64.b64encode(sender.seal(MARKER.encode(), key)).decode()
    return Sealed(to=key, sender=sender.public, data=box)


async def said(node: Node, script: str) -> str:
    options = ExecOptions(cmd=Cmd(args=("/bin/sh", "-c", script)), timeout_s=60)
    call = Call(f"x-{time.monotonic_ns()}", "container.exec")
    result = await node.pods.exec("p1", "c", options, call)
    return result.stdout.raw.decode() + result.stderr.raw.decode()


def command_lines() -> bytes:
    """Those of all processes, and their environments where they can be read."""
    found = b""
    for name in ("cmdline", "environ"):
        for file in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                found += file.read_bytes()
            except OSError:  # it ended meanwhile, or is none of ours
                continue
    return found


async def test_a_secret_is_in_the_guest_and_nowhere_else(
    guest_image: Path, short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = short_dir / "secrets"
    secrets.mkdir()
    (secrets / "db").write_text("from the host\n")
    make_busybox(short_dir / "box")
    settings = Settings(
        node_name="veiled",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(short_dir,),
        metrics_address="",
        network=NetworkModel.NOOP,
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=180),
        policy=PolicySettings(secret_dirs=(secrets,)),
    )
    async with running(settings) as node:
        key = node.service.info().xkeys[0]
        envs = (EnvVar(var="A", sealed=seal(key)), EnvVar(var="B", file=str(secrets / "db")))
        container = ContainerSpec(
            id="c",
            rootfs=str(short_dir / "box"),
            readonly_rootfs=True,
            cmd=Cmd(args=("sleep", "1000"), envs=envs),
            secrets=(SecretFile(name="token", sealed=seal(key), mode=0o440),),
        )
        spec = PodSpec(id="p1", template="never", containers=(container,))
        await node.pods.run(spec, Call("run", "pod.run"))
    # Another process of the node agent: the key is that of the state directory.
    async with running(settings) as node:
        try:
            assert await said(node, "echo $A; echo $B; cat /run/secrets/token") == (
                f"{MARKER}\nfrom the host\n{MARKER}"
            )
            assert await said(node, "stat -c '%a %u %n' /run/secrets /run/secrets/*") == (
                "755 0 /run/secrets\n440 0 /run/secrets/token\n"
            )
            told = await said(
                node, "echo x > /run/secrets/token; rm /run/secrets/token; chmod 777 /run/secrets"
            )
            assert told.count("Read-only file system") == 3
            assert MARKER.encode() not in command_lines()
            kept = [f for f in short_dir.rglob("*") if f.is_file() and not f.is_socket()]
            assert any(f.name.startswith("node.db") for f in kept)
            for file in kept:
                assert MARKER.encode() not in file.read_bytes(), file
            events = await Outbox(node.pods._parts.ledger._store, retention_s=1).since(0, 1000)
            assert events
            assert MARKER not in "".join(event.model_dump_json() for event in events) + caplog.text
        finally:
            await node.pods.delete("p1", True, Call("delete", "pod.delete"))
