"""The life of containers in one real VM, chapter by chapter: the node agent over it comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.errors import FailedPreconditionError
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, ContainerResources, ContainerSpec, PodSpec, PodState
from vcnode.models.probes import Probe, Probes
from vcnode.models.signals import signal_number
from vcnode.models.stats import PodStatsOf
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

LIMIT_S = 120.0
_numbers = itertools.count(1)


class Rig:
    """One pod on one host; the node agent can be restarted."""

    def __init__(self, settings: Settings, box: Path) -> None:
        self.settings = settings
        self.box = box
        self.node: Node

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        """A node agent for a block; the pod stays."""
        async with running(self.settings) as self.node:
            yield

    def call(self, verb: str = "test") -> Call:
        """A command of its own."""
        return Call(f"cmd-{next(_numbers)}", verb)

    def container(self, container_id: str, *args: str, **fields: object) -> ContainerSpec:
        """A container of busybox."""
        given = {"id": container_id, "rootfs": str(self.box), "cmd": Cmd(args=args), **fields}
        return ContainerSpec.model_validate(given, strict=False)

    async def start(self, container_id: str, *args: str, **fields: object) -> None:
        """Add a container and start it."""
        spec = self.container(container_id, *args, **fields)
        await self.node.pods.create_container("p1", spec, self.call())
        await self.node.pods.start_container("p1", container_id, self.call())

    async def until_ready(self, container_id: str, *, ready: bool) -> None:
        """Wait until a container is ready, or is not."""
        changed = asyncio.Event()
        with self.node.pods._ledger.listening("p1", changed.set):
            while self.node.pods.container_status("p1", container_id).ready is not ready:
                await changed.wait()
                changed.clear()

    async def shell(self, script: str, container_id: str | None = "main") -> str:
        """What a shell prints in a container, or in the guest."""
        options = ExecOptions(cmd=Cmd(args=("/bin/sh", "-c", script)), timeout_s=60)
        result = await self.node.pods.exec("p1", container_id, options, self.call())
        assert result.exit_code == 0, result
        return result.stdout.raw.decode().strip()


async def test_a_life(guest_image: Path, short_dir: Path) -> None:
    make_busybox(short_dir / "box")
    settings = Settings(
        node_name="life",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(short_dir,),
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
    )
    rig = Rig(settings, short_dir / "box")
    spec = PodSpec(id="p1", template="never", containers=(rig.container("main", "sleep", "infinity"),))
    try:
        async with rig.agent():
            await rig.node.pods.run(spec, rig.call("pod.run"))
            await pause(rig)
        async with rig.agent():
            await resume(rig)
            await freeze(rig)
            await limits(rig)
            await shrink(rig)
            await signals_and_waits(rig)
            await list_processes(rig)
            await stats(rig)
            await readiness(rig)
            await liveness(rig)
            await go_away(rig)
        async with rig.agent():
            await come_back(rig)
            await grow(rig)
            await stop_paused(rig)
    finally:
        async with rig.agent():
            await rig.node.pods.delete("p1", True, rig.call("pod.delete"))
    assert list((settings.run_dir / "vms").iterdir()) == []


async def pause(rig: Rig) -> None:
    """A paused pod refuses what needs its guest."""
    await rig.shell("date -s @1000000000", None)  # as if the clock had stood for long
    status = await rig.node.pods.pause("p1", rig.call("pod.pause"))
    assert status.state is PodState.PAUSED
    with pytest.raises(FailedPreconditionError, match="resume it first"):
        await rig.shell("true")


async def resume(rig: Rig) -> None:
    """A paused pod is adopted at once, and has the right time when it is resumed."""
    assert rig.node.pods.status("p1").state is PodState.PAUSED
    await rig.node.pods.resume("p1", rig.call("pod.resume"))
    assert abs(float(await rig.shell("date +%s")) - time.time()) < 2


async def freeze(rig: Rig) -> None:
    """A paused container uses no CPU, whatever it tries, and goes on where it stood."""
    await rig.start("busy", "sh", "-c", "while true; do true; done")
    await rig.node.pods.pause_container("p1", "busy", rig.call())
    usage = "grep usage_usec /sys/fs/cgroup/containers/busy/cpu.stat"
    before = await rig.shell(usage, None)
    assert await rig.shell(usage, None) == before
    await rig.node.pods.resume_container("p1", "busy", rig.call())
    while await rig.shell(usage, None) == before:  # bounded by the test's limit
        pass
    await rig.node.pods.pause_container("p1", "busy", rig.call())
    assert (await rig.node.pods.stop_container("p1", "busy", None, rig.call())).exit_code == 143
    await rig.node.pods.delete_container("p1", "busy", False, rig.call())


async def limits(rig: Rig) -> None:
    """Limits change under a running container; what it uses cannot be taken away."""
    files = "cd /sys/fs/cgroup/containers/fed; cat memory.max pids.max cpu.max cpu.weight | tr '\\n' ' '"
    hold = "dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>/dev/null; touch /tmp/full; exec sleep infinity"
    await rig.start("fed", "sh", "-c", hold, resources={"cpu_shares": 512, "pids_limit": 9})
    while not await rig.shell("ls /tmp | grep full; true", "fed"):
        pass  # bounded by the test's limit
    update = partial(rig.node.pods.update_container, "p1", "fed")
    with pytest.raises(FailedPreconditionError, match=r"uses 2[0-9] MiB now"):
        await update(ContainerResources(mem_limit_mib=16), rig.call())
    assert await rig.shell(files, None) == "max 9 max 100000 20"
    status = await update(
        ContainerResources(mem_limit_mib=48, pids_limit=None, cpu_quota_us=20_000, cpu_shares=1024),
        rig.call(),
    )
    assert (status.resources.mem_limit_mib, status.resources.pids_limit) == (48, None)
    assert await rig.shell(files, None) == "50331648 max 20000 100000 39"


async def shrink(rig: Rig) -> None:
    """What a pod gives back is the host's, and the guest has so much less."""
    total = "grep MemTotal /proc/meminfo | tr -dc 0-9"
    before = int(await rig.shell(total, None))
    with pytest.raises(FailedPreconditionError, match="can spare"):
        await rig.node.pods.resize("p1", 128, rig.call("pod.resize"))
    status = await rig.node.pods.resize("p1", 208, rig.call("pod.resize"))
    assert status.mem_size_mib == 208
    assert before - int(await rig.shell(total, None)) == 48 << 10
    await rig.node.pods.delete_container("p1", "fed", True, rig.call())


async def grow(rig: Rig) -> None:
    """A pod has its size still when the node agent was away, and can have all of its memory again."""
    assert rig.node.pods.status("p1").mem_size_mib == 208
    total = "grep MemTotal /proc/meminfo | tr -dc 0-9"
    before = int(await rig.shell(total, None))
    await rig.node.pods.resize("p1", 256, rig.call("pod.resize"))
    assert int(await rig.shell(total, None)) - before == 48 << 10


async def signals_and_waits(rig: Rig) -> None:
    """A signal that was given by name reaches its handler; who waits is woken by the exit."""
    await rig.start("sig", "sh", "-c", "trap 'exit 7' 37; touch /tmp/ready; while true; do sleep 0.1; done")
    wait = asyncio.ensure_future(rig.node.pods.wait_container("p1", "sig", "exited"))
    while not await rig.shell("ls /tmp", "sig"):
        pass  # bounded by the test's limit
    await rig.node.pods.kill_container("p1", "sig", signal_number("SIGRTMIN+3"), False, rig.call())
    reply = await wait
    assert reply.container is not None
    assert reply.container.exit_code == 7
    await rig.node.pods.delete_container("p1", "sig", False, rig.call())


async def stats(rig: Rig) -> None:
    """Each container is told with its own use and limits, by the guest, and the VM by the host."""
    limits = {"mem_limit_mib": 32, "pids_limit": 9}
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=4; while true; do true; done"
    await rig.start("busy", "sh", "-c", script, resources=limits)
    first = await rig.node.pods.stats(PodStatsOf(pod_id="p1"), rig.call())
    async with asyncio.timeout(LIMIT_S):
        while True:
            request = PodStatsOf(pod_id="p1", after=first.time, interval_s=0.2)
            found = await rig.node.pods.stats(request, rig.call())
            busy = next(each for each in found.containers if each.container_id == "busy")
            done = busy.pid_count == 1  # dd has ended
            if done and busy.cpu.usage_us > 200_000 and busy.memory.used_bytes > 4 << 20:
                break
    assert (found.time - first.time).total_seconds() >= 0.2
    assert (busy.memory.limit_bytes, busy.pid_limit, busy.pid_count) == (32 << 20, 9, 1)
    assert busy.block is not None
    main = next(each for each in found.containers if each.container_id == "main")
    assert (main.memory.limit_bytes, main.pid_limit, main.pid_count) == (None, None, 1)
    assert found.guest is not None
    assert found.guest.mem_total_bytes < 256 << 20
    assert (
        found.guest.cpu.usage_us > busy.cpu.usage_us / 2
    )  # by ticks of 10 ms, which are lost when it is busy
    vm = found.vm
    assert vm is not None
    assert vm.cpu.usage_us > busy.cpu.usage_us / 2
    # All that this guest has touched is its own, for it was booted; QEMU has some more for itself.
    assert 30 << 20 < (vm.guest_pss_bytes or 0) <= 256 << 20
    assert 5 << 20 < (vm.overhead_bytes or 0) < 256 << 20
    await rig.node.pods.stop_container("p1", "busy", 0, rig.call())
    await rig.node.pods.delete_container("p1", "busy", False, rig.call())


async def list_processes(rig: Rig) -> None:
    """What a container shows of its processes can be printed, whatever it holds."""
    script = "sh -c 'sleep 98; true' \"$(printf 'evil\\033[2J\\377name')\" & sleep 99; true"
    await rig.start("many", "sh", "-c", script)
    while True:  # bounded by the test's limit
        reply = await rig.node.pods.processes("p1", "many", 10, rig.call())
        if {("sleep", "98"), ("sleep", "99")} <= {process.args[:2] for process in reply.processes}:
            break
    assert (reply.processes[0].container_pid, reply.processes[0].user) == (1, "root")
    shown = [arg for process in reply.processes for arg in process.args]
    assert any("evil" in arg for arg in shown)
    assert all(arg.isprintable() for arg in shown)
    few = await rig.node.pods.processes("p1", "many", 2, rig.call())
    assert (len(few.processes), few.total) == (2, 4)
    await rig.node.pods.delete_container("p1", "many", True, rig.call())


def probe(timeout_s: float = 20.0, **action: dict[str, object]) -> Probe:
    """A probe that is tried often, and fails at its first failure."""
    timing = {"period_s": 0.2, "timeout_s": timeout_s, "failure_threshold": 1}
    return Probe.model_validate({**action, **timing}, strict=False)


async def readiness(rig: Rig) -> None:
    """Ready when the server in the container answers as it should, and not before; also without a node."""
    script = "while test ! -e /tmp/go; do sleep 0.1; done; exec /bin/busybox httpd -f -p 8080 -h /tmp"
    probes = Probes(
        startup=Probe.model_validate({"tcp": {"port": 8080}, "period_s": 0.2, "failure_threshold": 999}),
        readiness=probe(http={"port": 8080, "path": "/index.html"}),
        liveness=probe(exec={"args": ["test", "-d", "/tmp"]}),
    )
    await rig.start("web", "sh", "-c", script, probes=probes)
    assert not rig.node.pods.container_status("p1", "web").ready
    await rig.shell("echo hello > /tmp/index.html; touch /tmp/go", "web")
    await rig.until_ready("web", ready=True)
    await rig.shell("rm /tmp/index.html", "web")
    await rig.until_ready("web", ready=False)
    await rig.shell("echo hello > /tmp/index.html", "web")
    await rig.until_ready("web", ready=True)
    await rig.node.pods.delete_container("p1", "web", True, rig.call())


async def liveness(rig: Rig) -> None:
    """A probe that hangs ends its container, which starts again; what the probe started is gone."""
    await rig.start(
        "sick",
        "sleep",
        "infinity",
        probes=Probes(liveness=probe(0.5, exec={"args": ["sh", "-c", "sleep 4711 & sleep 4711"]})),
        restart_policy="on-failure",
    )
    reply = await rig.node.pods.wait_container("p1", "sick", "exited")
    assert reply.container is not None
    assert reply.container.reason == "Its liveness probe failed: no answer within 0.5 s"
    assert reply.container.exit_code == 143
    assert (await rig.node.pods.wait_container("p1", "sick", "running")).container is not None
    assert rig.node.pods.container_status("p1", "sick").restart_count == 1
    await rig.node.pods.stop_container("p1", "sick", None, rig.call())
    assert "4711" not in await rig.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", None)
    await rig.node.pods.delete_container("p1", "sick", False, rig.call())


async def go_away(rig: Rig) -> None:
    """Things are about to happen while nobody listens."""
    script = "sleep 0.5; touch /tmp/late; exec sleep infinity"
    probes = Probes(readiness=probe(exec={"args": ["test", "-e", "/tmp/late"]}))
    await rig.start("late", "sh", "-c", script, probes=probes)
    await rig.start("brief", "sh", "-c", "sleep 0.5; exit 3", restart_policy="always")
    assert not rig.node.pods.container_status("p1", "late").ready


async def come_back(rig: Rig) -> None:
    """What probes found meanwhile is learnt; what ended is known to have ended, and starts again."""
    await rig.until_ready("late", ready=True)
    while not (status := rig.node.pods.container_status("p1", "brief")).restart_count:
        await rig.node.pods.wait_container("p1", "brief", "running" if status.restart_at else "exited")
    await rig.node.pods.stop_container("p1", "brief", None, rig.call())


async def stop_paused(rig: Rig) -> None:
    """A paused pod can be stopped, and started again."""
    await rig.node.pods.pause("p1", rig.call("pod.pause"))
    began = time.monotonic()
    assert (await rig.node.pods.stop("p1", None, rig.call("pod.stop"))).outcome == "forced"
    assert time.monotonic() - began < 5
