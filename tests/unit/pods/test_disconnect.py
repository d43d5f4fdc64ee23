"""``on_disconnect``: who is paused or stopped when, who goes on, and that no restart forgets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.unit.pods.world import World, container, pod
from vcnode.errors import AbortedError, InvalidArgumentError
from vcnode.models.pod import ContainerSpec, OnDisconnect, PodSpec, PodState, RestartPolicy
from vcnode.models.records import PodRecord, Restarts
from vcnode.models.vm import Watchdog
from vcnode.pods.contact import Contact
from vcnode.pods.disconnect import Verdict, judge

NOW = datetime(2030, 1, 1, tzinfo=UTC)
STOP, PAUSE = OnDisconnect(action="stop", after_s=60), OnDisconnect(action="pause", after_s=60)
LEASE_S = 30.0


def record(rule: OnDisconnect, state: PodState, **fields: object) -> PodRecord:
    return PodRecord.model_validate(
        {
            "pod_id": "p1",
            "spec": PodSpec(id="p1", on_disconnect=rule),
            "hypervisor_type": "mock",
            "agent_type": "mock",
            "network_model": "noop",
            "state": state,
            "created_at": NOW,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("rule", "state", "fields", "silent_s", "expected"),
    [
        (OnDisconnect(), "running", {}, 1e9, Verdict()),
        (STOP, "running", {}, 0.0, Verdict(None, 60.0)),
        (STOP, "running", {}, 59.0, Verdict(None, 1.0)),
        (STOP, "running", {}, 60.0, Verdict("stop")),
        (STOP, "starting", {}, 60.0, Verdict("stop")),
        (STOP, "paused", {}, 60.0, Verdict("stop")),
        (STOP, "stopping", {}, 60.0, Verdict()),
        (STOP, "stopped", {}, 60.0, Verdict()),
        (STOP, "ready", {}, 60.0, Verdict()),
        (STOP, "failed", {}, 60.0, Verdict()),
        (STOP, "failed", {"restarts": Restarts(at=NOW)}, 60.0, Verdict("stop")),
        (PAUSE, "running", {}, 60.0, Verdict("pause")),
        (PAUSE, "starting", {}, 60.0, Verdict()),
        (PAUSE, "paused", {"resumes": True}, 60.0, Verdict()),
        (PAUSE, "paused", {"resumes": True}, 1.0, Verdict("resume", 59.0)),
        (PAUSE, "paused", {}, 1.0, Verdict(None, 59.0)),
        (OnDisconnect(action="stop", after_s=1), "running", {}, 29.0, Verdict(None, 1.0)),
    ],
)
def test_the_verdict(
    rule: OnDisconnect, state: str, fields: dict[str, object], silent_s: float, expected: Verdict
) -> None:
    assert judge(record(rule, PodState(state), **fields), silent_s=silent_s, lease_s=LEASE_S) == expected


@pytest.mark.parametrize("fields", [{"action": "stop"}, {"action": "keep", "after_s": 5.0}, {"after_s": 5.0}])
def test_seconds_go_with_an_action(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="after_s"):
        OnDisconnect.model_validate(fields)


def test_when_a_pod_has_ended_for_certain() -> None:
    slow = ContainerSpec(id="c", rootfs="/r", cmd={"args": ("x",)}, stop_timeout_s=20.0)  # type: ignore[arg-type]
    assert PodSpec(containers=(slow,)).ends_after_s is None
    assert PodSpec(containers=(slow,), on_disconnect=STOP).ends_after_s == 60 + 20 + 30
    assert PodSpec(containers=(slow,), on_disconnect=PAUSE).ends_after_s == 60 + 30
    assert PodSpec(on_disconnect=STOP).ends_after_s == 60 + 10 + 30  # what is added later gets the default


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    built = await World(tmp_path).start()
    built.pods.disconnects.start()
    yield built
    await built.close()


async def silence(world: World, seconds: float) -> None:
    """Let time pass without NATS."""
    world.boot_s += seconds
    world.pods.disconnects.look()


async def heard(world: World) -> None:
    """NATS is there."""
    world.contact.note(world.boot_s)


async def until(world: World, state: PodState, pod_id: str = "p1") -> None:
    while world.pods.status(pod_id).state is not state or world.pods.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_a_pod_is_stopped_once_its_time_is_over_and_stays_so(world: World) -> None:
    await world.pods.run(pod(on_disconnect=STOP), world.call())
    await world.pods.run(pod("other"), world.call())
    await silence(world, 59)
    await asyncio.sleep(0)
    assert world.pods.status("p1").state is PodState.RUNNING
    await silence(world, 1)
    await until(world, PodState.STOPPED)
    assert world.pods.status("p1").reason == "Its node had no NATS for 60 s (on_disconnect)."
    assert world.plan.calls["agent.signal_container"] == 1  # it was asked first
    await heard(world)
    await asyncio.sleep(0.01)
    assert world.pods.status("p1").state is PodState.STOPPED
    assert world.pods.status("other").state is PodState.RUNNING
    assert (await world.kinds("p1"))[-2:] == ["pod.stopping", "pod.stopped"]


async def test_news_of_nats_begin_the_time_anew(world: World) -> None:
    await world.pods.run(pod(on_disconnect=STOP), world.call())
    await silence(world, 59)
    await heard(world)
    await silence(world, 59)
    await asyncio.sleep(0.01)
    assert world.pods.status("p1").state is PodState.RUNNING


async def test_a_pod_is_paused_and_runs_again_with_nats(world: World) -> None:
    await world.pods.run(pod(on_disconnect=PAUSE), world.call())
    await silence(world, 60)
    await until(world, PodState.PAUSED)
    assert world.pods.status("p1").reason == "Its node had no NATS for 60 s (on_disconnect)."
    await heard(world)
    await until(world, PodState.RUNNING)
    assert world.pods.status("p1").reason is None
    assert (await world.kinds("p1"))[-2:] == ["pod.paused", "pod.resumed"]


async def test_what_somebody_has_paused_stays_paused(world: World) -> None:
    await world.pods.run(pod(on_disconnect=PAUSE), world.call())
    await world.pods.run(pod("other", on_disconnect=PAUSE), world.call())
    await world.pods.pause("other", world.call())
    await silence(world, 60)
    await until(world, PodState.PAUSED)
    await world.pods.pause("p1", world.call())  # asked for, now that it is paused already
    await heard(world)
    await asyncio.sleep(0.01)
    assert world.pods.status("p1").state is PodState.PAUSED
    assert world.pods.status("other").state is PodState.PAUSED


async def test_a_start_under_way_is_overtaken(tmp_path: Path) -> None:
    world = await World(tmp_path, "agent.start_container:1=hang").start()
    world.pods.disconnects.start()
    starting = asyncio.ensure_future(world.pods.run(pod(on_disconnect=STOP), world.call("pod.run")))
    while world.plan.calls["agent.start_container"] == 0:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await silence(world, 60)
    with pytest.raises(AbortedError, match="no NATS for too long"):
        await starting
    await until(world, PodState.STOPPED)
    assert world.leaks == []
    await world.close()


async def test_time_goes_on_while_the_node_agent_is_away(world: World) -> None:
    await world.pods.run(pod(on_disconnect=STOP), world.call())
    await world.pods.run(pod("second", on_disconnect=PAUSE), world.call())
    world.boot_s += 10
    await heard(world)
    await asyncio.to_thread(world.contact.save)
    await world.crash()
    world.boot_s += 60
    await world.start()
    await world.pods.recover()
    world.pods.disconnects.start()
    await heard(world)  # too late for the one, in time for the other
    await until(world, PodState.STOPPED)
    await until(world, PodState.RUNNING, "second")


async def test_a_pod_that_ended_meanwhile_is_not_restarted_when_its_time_is_over(world: World) -> None:
    spec = pod(on_disconnect=STOP, restart_policy=RestartPolicy.ALWAYS)
    await world.pods.run(spec, world.call())
    await asyncio.to_thread(world.contact.save)
    await world.crash()
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id, "Its watchdog ended it.")
    world.boot_s += 60
    await world.start()
    await world.pods.recover()
    world.pods.disconnects.start()
    world.pods.start_restarts()
    await world.until_event("pod.restart_cancelled")
    assert world.pods.status("p1").state is PodState.FAILED
    assert world.pods.status("p1").restart_at is None
    assert world.leaks == []


async def test_a_pause_that_fails_is_tried_again(tmp_path: Path) -> None:
    world = await World(tmp_path, "vm.pause:1=fail").start()
    world.pods.disconnects.start()
    await world.pods.run(pod(on_disconnect=PAUSE), world.call())
    await silence(world, 60)
    while world.plan.calls["vm.pause"] == 0 or world.pods.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert world.pods.status("p1").state is PodState.RUNNING
    await asyncio.sleep(0)
    await silence(world, 1)
    await until(world, PodState.PAUSED)
    await world.close()


async def test_guests_know_until_when_they_may_run_and_are_told_in_time(world: World) -> None:
    await world.pods.run(pod(on_disconnect=STOP), world.call())
    await world.pods.run(pod("other", on_disconnect=PAUSE), world.call())
    stops, pauses = (
        world.guests.by_vm_id[world.pods._parts.live[p].vm.record.vm_id] for p in ("p1", "other")
    )
    # From before its containers ran:
    assert (stops.watchdog, pauses.watchdog) == (
        Watchdog(after_s=65.0, grace_s=10.0),
        None,
    )

    async def told(calls: int, seconds: float) -> None:
        while world.plan.calls["agent.set_watchdog"] < calls:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert world.plan.calls["agent.set_watchdog"] == calls
        assert stops.watchdog == Watchdog(after_s=seconds, grace_s=10.0)

    await told(1, 65.0)
    for _ in range(2):
        world.boot_s += 10
        await heard(world)
    await told(2, 65.0)  # not at every renewal
    await silence(world, 10)
    await told(2, 65.0)
    await silence(world, 10)
    await told(2, 65.0)  # nothing new to say: it ends with the last contact


async def test_a_rule_quicker_than_the_lease_is_refused(world: World) -> None:
    quick = OnDisconnect(action="stop", after_s=29)
    with pytest.raises(InvalidArgumentError, match=r"pod.on_disconnect.after_s.*at least 30"):
        await world.pods.run(pod(on_disconnect=quick), world.call())


def test_a_contact_of_another_boot_or_none_counts_from_now(tmp_path: Path) -> None:
    path = tmp_path / "contact.json"
    now = 50.0
    contact = Contact.open(path, clock=lambda: now)
    contact.note(40.0)
    contact.save()
    assert contact.at_s == 50.0  # never back
    now = 70.0
    assert Contact.open(path, clock=lambda: now).at_s == 50.0
    for content in ('{"boot_id": "another", "at_s": 1.0}', "{", "[]", '{"boot_id": 1}'):
        path.write_text(content)
        assert Contact.open(path, clock=lambda: now).silent_s == 0.0
    assert Contact(None, clock=lambda: now).save() is None  # type: ignore[func-returns-value]
    nowhere = Contact(tmp_path / "missing" / "x.json", clock=lambda: now)
    nowhere.save()  # said in the log; the older contact counts
    assert not (tmp_path / "missing").exists()
    assert container().stop_timeout_s == 10.0
