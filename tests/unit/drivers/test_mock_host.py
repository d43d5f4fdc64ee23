"""The host of mock drivers: what was made is there again, until the host boots."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vcnode.aio import Tasks
from vcnode.drivers import mock_host
from vcnode.drivers.mock_host import MockHost
from vcnode.models.call import Call
from vcnode.models.pod import Cmd, ContainerSpec, HypervisorType, PodSpec, PodState
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        node_name="n1",
        state_dir=tmp_path / "s",
        run_dir=tmp_path / "r",
        allowed_roots=(Path("/srv"),),
        hypervisor=HypervisorType.MOCK,
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
    )


async def run(node: Node, pod_id: str) -> None:
    sleep = ContainerSpec(id="c1", rootfs="/srv/app", cmd=Cmd(args=("sleep", "600")))
    await node.pods.run(PodSpec(id=pod_id, containers=(sleep,)), Call(f"run-{pod_id}", "pod.run"))


async def test_pods_of_a_mock_node_outlive_its_restart(settings: Settings) -> None:
    async with running(settings) as node:
        await run(node, "p1")
        before = node.pods.status("p1")
    async with running(settings) as node:
        after = node.pods.status("p1")
        assert after.state is PodState.RUNNING
        assert after.hypervisor == before.hypervisor
        assert (await node.pods.audit(repair=False)).orphan_count == 0
        await node.pods.delete("p1", True, Call("del", "pod.delete"))
        assert (await node.pods.audit(repair=False)).holdings == ()


async def test_a_boot_of_the_host_ends_its_vms(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings) as node:
        await run(node, "p1")
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(mock_host, "BOOT_ID", boot_id)
    async with running(settings) as node:
        assert node.pods.status("p1").state is PodState.FAILED


def test_a_file_that_cannot_be_read_is_an_empty_host(tmp_path: Path) -> None:
    path = tmp_path / "mock-host.json"
    path.write_text("{")
    host = MockHost(path)
    assert host.vms.alive == []
    host.save()
    assert MockHost(path).storage.empty


async def test_a_container_that_was_to_end_has_its_time_before_it_again(tmp_path: Path) -> None:
    from vcnode.drivers.agent.mock.guest import MockGuest
    from vcnode.models.vm import ContainerRoot, GuestContainer, GuestProcess

    host = MockHost(tmp_path / "mock-host.json")
    guest = host.guests.by_vm_id["vm-1"] = MockGuest()
    process = GuestProcess(args=("sleep", "0.01"))
    guest.create(
        GuestContainer(container_id="c1", root=ContainerRoot(shared_name="c1"), hostname="h", process=process)
    )
    guest.start("c1")
    host.save()
    async with Tasks():
        again = MockHost(tmp_path / "mock-host.json").guests.by_vm_id["vm-1"]
        ended = asyncio.Event()
        again.on_exit = lambda _: ended.set()
        assert again.containers["c1"].is_running
        await asyncio.wait_for(ended.wait(), 5)
        guest.power_off()
