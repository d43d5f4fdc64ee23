"""SIGKILL of real node agents at chosen side effects with real VMs: what mocks cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartNats
from tests.faults.lives import Died, Host, hosts
from tests.faults.test_killed_nodes import check
from vcnode.cli.demo.busybox import make_root
from vcnode.drivers.hypervisor.qemu.process import named
from vcnode.pods.marks import mark_of
from vcnode.settings import Settings

pytestmark = [pytest.mark.nats, pytest.mark.vm, pytest.mark.timeout(300)]

POINTS = [
    ("storage.make_vm_dir:1=kill(after)",),
    ("hypervisor.launch:1=kill(after)",),
    ("hypervisor.launch:1=kill(after)", "hypervisor.kill:1=kill"),
    ("agent.connect:1=kill(after)",),
    ("storage.share:1=kill(after)",),
    ("storage.listen:1=kill(after)",),
    ("agent.create_container:1=kill(after)", "storage.remove_vm_dir:1=kill"),
    ("agent.start_container:1=kill(after)",),
    ("store.finish:1=kill",),
    ("agent.execute:1=kill(after)", "agent.connect:1=kill(after)"),
    ("store.finish:2=kill",),
    ("vm.stop:1=kill",),
    ("vm.stop:1=kill(after)", "store.change:1=kill"),
    ("storage.remove_vm_dir:1=kill(after)",),
]
"""Where a life dies, and where the next one does."""


@pytest.fixture
async def host(start_nats: StartNats, guest_image: Path, short_dir: Path) -> AsyncIterator[Host]:
    """One host for all of it: the template that its first pods leave makes the starts of the others quick."""
    server = await start_nats()
    roots = short_dir / "roots"
    roots.mkdir()
    make_root(roots / "app")
    (roots / "data").mkdir()
    settings = {
        "guest_dir": str(guest_image),
        "allowed_roots": [str(roots)],
        "network": "noop",  # the host's own is left alone
        "qemu": {"accel": "tcg"},
    }
    async with hosts(server.url, settings, short_dir) as make:
        yield make("h")


async def template_of(host: Host) -> None:
    """Wait until the node has saved the template that its first pod made it learn."""
    templates = Path(host.settings["state_dir"], "templates")
    async with asyncio.timeout(120):
        while not any(path.name[0] != "." for path in templates.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # another process makes it, and nothing tells when


def commands(host: Host, number: int) -> list[tuple[str, str, dict[str, Any]]]:
    """A pod's life, with ids of its own."""
    mounts = [{"source": "data", "destination": "/data"}]
    main = {"id": "main", "image": "app", "cmd": {"args": ["/bin/sleep", "100000"]}, "mounts": mounts}
    side = {"id": "side", "image": "app", "cmd": {"args": ["/bin/sleep", "100000"]}}
    script = ["/bin/sh", "-c", f"echo t{number} >> /data/log"]
    exec_body = {"pod_id": "web", "container_id": "main", "cmd": {"args": script}}
    spec = {
        "id": "web",
        "resources": {"mem_size_mib": 128},
        "volumes": [{"mount_tag": "data", "host_path": f"{host.path.parent}/roots/data"}],
        "sockets": [{"name": "port", "host_path": f"{host.path.parent}/roots/port.sock"}],
        "containers": [side, main],
    }
    return [
        (f"run-{number}", "pod.run", {"pod": spec}),
        (f"exec-{number}", "container.exec", exec_body),
        (f"stop-{number}", "pod.stop", {"pod_id": "web", "grace_s": 1}),
        (f"delete-{number}", "pod.delete", {"pod_id": "web"}),
    ]


async def test_a_node_killed_in_the_life_of_a_real_pod_loses_and_leaves_nothing(host: Host) -> None:
    mark = mark_of(Settings(node_name=host.name, state_dir=Path(host.settings["state_dir"])))
    for number, deaths in enumerate([(), *POINTS]):
        where = " then ".join(deaths) or "without a fault"
        done = 0
        try:
            await host.start(*deaths[:1])
            if number == 0:
                app = {"name": "app", "path": f"{host.path.parent}/roots/app"}
                assert "digest" in await host.ask("import", "image.import", app)
            for command in commands(host, number):
                await host.ask(*command)
                done += 1
        except Died:
            assert host.ended is not None
            assert host.ended.result() == signal.SIGKILL, host.tail()
        assert (done == 4) == (not deaths), f"{where}: {host.answers.keys()}\n{host.tail()}"
        if not deaths:
            await template_of(host)
        if deaths[1:]:
            with contextlib.suppress(Died):
                await host.start(deaths[1])
            assert host.ended is not None
            await asyncio.wait({host.ended}, timeout=30)
            assert host.ended.done(), f"{where}: it did not die again\n{host.tail()}"
            assert host.ended.result() == signal.SIGKILL, where
        if deaths:
            await host.start()
        await check(host, where)
        for pod in (await host.read("pod.list"))["pods"]:
            body = {"pod_id": pod["pod_id"], "force": True}
            assert (await host.ask(f"gone-{number}", "pod.delete", body)).get("existed"), where
        audit = await host.read("node.audit")
        assert [h for h in audit["holdings"] if h["pod_id"] or h["orphan"]] == [], where
        assert await host.stop() == 0, where
        assert named(mark) == [], where
        log = Path(host.path.parent, "roots/data/log")
        assert not Path(host.path.parent, "roots/port.sock").exists(), where
        effects = log.read_text().split().count(f"t{number}") if log.exists() else 0
        assert effects <= 1, f"{where}: the exec had its effect {effects} times"
        if host.answers.get(f"exec-{number}", {}).get("exit_code") == 0:
            assert effects == 1, where
        host.asked.clear()
    events = await host.events()
    assert [int(e["sequence"]) for e in events] == list(range(1, len(events) + 1))
