"""Failpoints: where they kill, and that they are in nobody's way otherwise."""

from __future__ import annotations

import os
import signal

import pytest

from vcnode.drivers.audit import Auditable
from vcnode.drivers.failpoints import FailPoints
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor
from vcnode.drivers.watched import watched
from vcnode.errors import InvalidArgumentError
from vcnode.models.pod import HypervisorType
from vcnode.models.vm import VmRecord, VmSpec

SPEC = VmSpec(vm_id="vm-1", uuid="u", vcpu_count=1, mem_size_mib=128, directory="/d", shared_dir="/d/shared")
RECORD = VmRecord(vm_id="vm-1", uuid="u", directory="/d", type=HypervisorType.MOCK)


class Killed(BaseException):
    """In the place of the end of this process."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGKILL)
        raise Killed

    monkeypatch.setattr(os, "kill", killed)


def points(text: str) -> FailPoints:
    return FailPoints(FaultPlan.parse(text).rules)


def test_only_kill_and_trace_are_failpoints() -> None:
    assert not points("hypervisor.launch:1=fail; vm:1=die")
    assert points("hypervisor.launch:1=kill")
    assert points("*:*=trace")


@pytest.mark.parametrize(
    "plan", ["nothing.launch:1=kill", "store.:1=kill", "*:1=fail", "vm.stop:1=kill(now)"]
)
def test_what_is_no_failpoint_is_refused(plan: str) -> None:
    with pytest.raises(InvalidArgumentError):
        points(plan)


@pytest.mark.parametrize(("plan", "launched"), [("=kill", 1), ("=kill(after)", 2)])
async def test_the_call_is_killed_before_or_after_its_effect(kill: None, plan: str, launched: int) -> None:
    found = points(f"hypervisor.launch:2{plan}")
    real = MockHypervisor()
    driver = watched(real, "hypervisor", before=found.before, after=found.after)
    await driver.launch(SPEC, timeout_s=1)
    with pytest.raises(Killed):
        await driver.launch(SPEC.model_copy(update={"vm_id": "vm-2"}), timeout_s=1)
    assert len(real.world.machines) == launched


async def test_handles_are_watched_and_drivers_see_their_own(kill: None) -> None:
    found = points("vm.stop:1=kill")
    real = MockHypervisor(templates=True)
    driver = watched(real, "hypervisor", before=found.before, after=found.after)
    assert isinstance(driver, Auditable)
    assert driver.info == real.info
    await driver.launch(SPEC, timeout_s=1)
    vm = await driver.recover(RECORD, timeout_s=1)
    assert vm is not None
    assert vm.record == RECORD
    with pytest.raises(Killed):
        await vm.stop(grace_s=0)
    assert await driver.recover(RECORD.model_copy(update={"uuid": "x"}), timeout_s=1) is None


async def test_commits_are_named_after_what_they_do(kill: None) -> None:
    class Store:
        def __init__(self) -> None:
            self.done: list[str] = []

        async def write(self, work: object) -> str:
            self.done.append(work.__name__)  # type: ignore[attr-defined]
            return "written"

    def finish(tx: object) -> None:
        """Never called here."""

    store = Store()
    points("store.finish:2=kill(after)").guard(store)
    assert await store.write(finish) == "written"
    assert await store.write(lambda tx: None) == "written"
    with pytest.raises(Killed):
        await store.write(finish)
    assert store.done == ["finish", "<lambda>", "finish"]
