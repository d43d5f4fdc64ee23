"""What the node makes of what probes say."""

from __future__ import annotations

import asyncio

from tests.unit.pods.world import World, container, pod
from vcnode.drivers.base import ContainerHealth
from vcnode.models.pod import ContainerState, RestartPolicy
from vcnode.models.probes import ExecAction, Probe, Probes, TcpAction


def probe(*args: str, **timing: float) -> Probe:
    timing = {"period_s": 0.1, "timeout_s": 0.1, "failure_threshold": 1} | timing
    return Probe(exec=ExecAction(args=args), **timing)  # type: ignore[arg-type]


async def until_ready(world: World, ready: bool = True) -> None:
    while world.pods.container_status("p1", "c1").ready is not ready:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_container_without_probes_is_ready_while_it_runs(world: World) -> None:
    status = await world.pods.run(pod(), world.call())
    assert status.ready
    assert status.containers[0].ready
    assert not (await world.pods.pause_container("p1", "c1", world.call())).ready
    assert not world.pods.status("p1").ready
    assert (await world.pods.resume_container("p1", "c1", world.call())).ready
    assert not (await world.pods.pause("p1", world.call())).ready
    assert (await world.pods.resume("p1", world.call())).ready
    assert not (await world.pods.stop_container("p1", "c1", 0, world.call())).ready
    assert not world.pods.status("p1").ready


async def test_a_container_is_ready_when_its_probes_say_so(world: World) -> None:
    probes = Probes(startup=Probe(tcp=TcpAction(port=80)), readiness=probe("true"))
    status = await world.pods.run(pod(containers=[container(probes=probes)]), world.call())
    assert status.state == "running"
    await until_ready(world)
    assert world.pods.status("p1").ready
    assert (await world.until_event("container.ready")).data["ready"] is True


async def test_readiness_that_fails_is_told_and_ends_nothing(world: World) -> None:
    await world.pods.run(pod(containers=[container(probes=Probes(readiness=probe("true")))]), world.call())
    await until_ready(world)
    live = world.pods._parts.live["p1"]
    watcher = world.pods._watcher
    await watcher._container_health(live, ContainerHealth("c1", ready=False))
    await watcher._container_health(live, ContainerHealth("c1", ready=False))
    await watcher._container_health(live, ContainerHealth("absent", ready=False))
    assert (await world.kinds()).count("container.unready") == 1
    assert world.pods.container_status("p1", "c1").state is ContainerState.RUNNING


async def test_liveness_that_fails_ends_the_container_and_its_policy_starts_it_again(world: World) -> None:
    world.pods.start_restarts()
    spec = container(
        probes=Probes(liveness=probe("sleep", "infinity")), restart_policy=RestartPolicy.ON_FAILURE
    )
    await world.pods.run(pod(containers=[spec]), world.call())
    event = await world.until_event("container.exited")
    assert event.data["reason"] == "Its liveness probe failed: no answer within 0.1 s"
    assert event.data["exit_code"] == 143
    await world.until_event("container.started", 2)
    assert world.pods.container_status("p1", "c1").restart_count == 1


async def test_what_probes_found_while_nobody_listened_is_learnt(world: World) -> None:
    await world.pods.run(pod(containers=[container(probes=Probes(readiness=probe("true")))]), world.call())
    await until_ready(world)
    await world.close()
    (guest,) = world.guests.by_vm_id.values()
    health = guest.containers["c1"].health
    health.pause()
    health.ready = False
    await world.start()
    await world.pods.recover()
    assert not world.pods.container_status("p1", "c1").ready
    assert (await world.kinds())[-2:] == ["container.unready", "node.recovered"]
