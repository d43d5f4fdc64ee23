"""Real spares and clones: what pods get of them, and what two of them share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.drivers.hypervisor.qemu import templates as qemu_templates
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.events import Event
from vcnode.models.pod import Cmd, ContainerSpec, HypervisorType, PodSpec, PodState
from vcnode.node import Node, database_of, running
from vcnode.settings import NatsSettings, PoolSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

LIMIT_S = 180.0
FACTS = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; head -c 16 /dev/urandom | base64; date +%s"
DIRTY = "head -c 60000000 /dev/urandom > /tmp/dirty && sync && rm /tmp/dirty"


def settings_of(name: str, guest_image: Path, place: Path, **more: Any) -> Settings:
    """A node without NATS below *place*."""
    return Settings(
        node_name=name,
        state_dir=place / "s",
        run_dir=place / "r",
        guest_dir=guest_image,
        allowed_roots=(place,),
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
        **more,
    )


async def until_ready(node: Node, count: int) -> None:
    """Wait until so many spares wait."""
    async with asyncio.timeout(LIMIT_S):
        while sum(status.ready for status in node.pods.pool.statuses()) != count:
            await node.pods.pool.changed.wait()
            node.pods.pool.changed.clear()


def loaded_ram(node: Node, key: str) -> Path:
    """The memory that clones map."""
    hypervisor = node.drivers.hypervisors[HypervisorType.QEMU]
    return Path(f"/proc/self/fd/{hypervisor._sources._store.load(key).ram_fd}")


async def in_guest(node: Node, pod_id: str, script: str) -> list[str]:
    options = ExecOptions(cmd=Cmd(args=("/bin/sh", "-c", script)), timeout_s=60)
    result = await node.pods.exec(pod_id, None, options, Call(f"x-{time.monotonic_ns()}", "container.exec"))
    assert result.exit_code == 0, result
    return result.stdout.raw.decode().split()


async def test_spares_become_pods_that_share_nothing_but_the_template(guest_image: Path, short_dir: Path):
    settings = settings_of("spares", guest_image, short_dir, pool=(PoolSettings(spares=1),))
    make_busybox(short_dir / "box")
    box = ContainerSpec(id="c", image="box", cmd=Cmd(args=("sleep", "1000")))
    async with running(settings) as node:
        await until_ready(node, 1)
        await node.images.import_("box", str(short_dir / "box"), Call("import", "image.import"))
        (template,) = (settings.state_dir / "templates").iterdir()
        before = qemu_templates._digest_ram(template / "ram")
        in_use = loaded_ram(node, template.name)
        assert qemu_templates._digest_ram(in_use) == before
        facts = []
        phases = {}
        try:
            for pod_id in ("p1", "p2"):  # the first one's spare has not rehearsed, the second one's has
                await until_ready(node, 1)
                spec = PodSpec(id=pod_id, containers=(box,))
                status = await node.pods.run(spec, Call(f"run-{pod_id}", "pod.run"))
                assert status.state is PodState.RUNNING
                assert "pool" in status.phases_ms, status.phases_ms
                assert not {"qemu", "boot"} & set(status.phases_ms), status.phases_ms
                phases[pod_id] = status.phases_ms
                facts.append(await in_guest(node, pod_id, FACTS))
                assert abs(float(facts[-1][3]) - time.time()) < 5
            for mine, other in zip(facts[0][:3], facts[1][:3], strict=True):
                assert mine
                assert mine != other
            await in_guest(node, "p1", DIRTY)
            assert qemu_templates._digest_ram(template / "ram") == before
            assert qemu_templates._digest_ram(in_use) == before
        finally:
            for pod_id in ("p1", "p2"):
                await node.pods.delete(pod_id, True, Call(f"delete-{pod_id}", "pod.delete"))
    assert list((settings.run_dir / "vms").iterdir()) == []
    assert phases_told(settings) == phases


async def test_each_clone_finds_its_own_image_in_the_disk_that_its_template_knew(
    guest_image: Path, short_dir: Path
) -> None:
    """What the template's guest has read of that disk, and how large that was, plays no part any more."""
    settings = settings_of("slots", guest_image, short_dir)
    sums = {}
    for name, mib in (("one", 2), ("two", 9)):
        make_busybox(short_dir / name)
        content = os.urandom(mib << 20)
        (short_dir / name / "big").write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()

    def container(container_id: str, image: str) -> ContainerSpec:
        return ContainerSpec(id=container_id, image=image, cmd=Cmd(args=("sleep", "1000")))

    def call(verb: str) -> Call:
        return Call(f"{verb}-{time.monotonic_ns()}", verb)

    async def sum_in(node: Node, pod_id: str, container_id: str) -> str:
        options = ExecOptions(cmd=Cmd(args=("sha256sum", "/big")), timeout_s=60)
        result = await node.pods.exec(pod_id, container_id, options, call("container.exec"))
        assert result.exit_code == 0, result
        return result.stdout.raw.decode().split()[0]

    pods = {
        "p1": (container("a", "one"), container("b", "two"), container("c", "one")),
        "p2": (container("a", "two"), container("b", "one")),
    }
    images = {(pod_id, c.id): str(c.image) for pod_id, containers in pods.items() for c in containers}
    async with running(settings) as node:
        for name in sums:
            await node.images.import_(name, str(short_dir / name), call("image.import"))
        for pod_id, containers in pods.items():
            spec = PodSpec(id=pod_id, containers=containers, template="require")
            status = await node.pods.run(spec, call("pod.run"))
            assert "boot" not in status.phases_ms, status.phases_ms
        for (pod_id, container_id), image in images.items():
            assert await sum_in(node, pod_id, container_id) == sums[image], (pod_id, container_id)
        slots = {pod_id: node.pods._parts.live[pod_id].vm.record.slot_digest for pod_id in pods}
        assert None not in slots.values()
        assert len(set(slots.values())) == 2
    async with running(settings) as node:  # which takes over what runs
        for (pod_id, container_id), image in images.items():
            assert await sum_in(node, pod_id, container_id) == sums[image], (pod_id, container_id)
        for container_id in "ac":
            await node.pods.delete_container("p1", container_id, True, call("container.delete"))
        await node.pods.create_container("p1", container("d", "one"), call("container.create"))
        await node.pods.start_container("p1", "d", call("container.start"))
        assert await sum_in(node, "p1", "d") == sums["one"]
        for pod_id in pods:
            await node.pods.delete(pod_id, True, call("pod.delete"))


def phases_told(settings: Settings) -> dict[str, dict[str, float]]:
    """The milliseconds of each phase in the pods' ``pod.started``."""
    with contextlib.closing(sqlite3.connect(database_of(settings))) as database:
        rows = database.execute("SELECT event FROM outbox").fetchall()
    events = [Event.model_validate_json(text) for (text,) in rows]
    return {event.subject: event.data["phases_ms"] for event in events if event.kind == "pod.started"}
