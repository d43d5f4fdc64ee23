"""vcnode.drivers.faults: the grammar, and what each action does at which call."""

from __future__ import annotations

import asyncio

import pytest

from vcnode.drivers import base
from vcnode.drivers.audit import Auditable
from vcnode.drivers.faults import OPERATIONS, FaultPlan, Rule, parse_rule
from vcnode.errors import AgentError, HypervisorError, InvalidArgumentError, NetworkError, StorageError


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("hypervisor.launch:2=fail", Rule("hypervisor.launch", 2, 2, "fail")),
        ("agent.execute:*=delay(0.2)", Rule("agent.execute", 1, None, "delay", 0.2)),
        ("vm:1=die", Rule("vm", 1, 1, "die")),
        ("vm:1=die(2)", Rule("vm", 1, 1, "die", 2.0)),
        ("vm.stop:3-=hang", Rule("vm.stop", 3, None, "hang")),
        ("vm.stop:-3=hang", Rule("vm.stop", 1, 3, "hang")),
        ("vm.stop:2-3=hang", Rule("vm.stop", 2, 3, "hang")),
        ("  network.attach : 1 = fail ", Rule("network.attach", 1, 1, "fail")),
    ],
)
def test_rules_that_are_understood(text: str, rule: Rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nonsense", "plan looks like"),
        ("hypervisor.launch=fail", "plan looks like"),
        ("hypervisor.lauch:1=fail", "did you mean 'hypervisor.launch'"),
        ("x:1=fail", "operations are"),
        ("vm.stop:0=fail", "counted from 1"),
        ("vm.stop:3-2=fail", "counted from 1"),
        ("vm.stop:-=fail", "use N, N-"),
        ("vm.stop:one=fail", "use N, N-"),
        ("vm.stop:1=explode", "use fail, delay"),
        ("vm.stop:1=delay", "needs its seconds"),
        ("vm.stop:1=delay()", "not a number of seconds"),
        ("vm.stop:1=delay(-1)", "not a number of seconds"),
        ("vm.stop:1=delay(nan)", "not a number of seconds"),
        ("vm.stop:1=delay(86401)", "not a number of seconds"),
        ("vm.stop:1=fail(2)", "nothing in parentheses"),
        ("vm:1=fail", "only 'die'"),
    ],
)
def test_bad_rules_are_refused_with_what_would_be_right(text: str, hint: str):
    with pytest.raises(InvalidArgumentError, match="faults") as caught:
        FaultPlan.parse(f"vm:1=die; {text}")
    assert hint in caught.value.message
    assert caught.value.details["violations"][0]["field"] == "faults"


@pytest.mark.parametrize("text", ["", " ", ";", " ; ; "])
async def test_an_empty_plan_does_nothing(text: str):
    plan = FaultPlan.parse(text)
    await plan.hit("vm.stop")
    assert plan.rules == ()
    assert plan.calls == {"vm.stop": 1}


async def test_only_the_chosen_calls_fail():
    plan = FaultPlan.parse("vm.stop:2-3=fail")
    outcomes = []
    for _ in range(4):
        try:
            await plan.hit("vm.stop")
            outcomes.append("ok")
        except HypervisorError:
            outcomes.append("failed")
    assert outcomes == ["ok", "failed", "failed", "ok"]


async def test_operations_are_counted_apart():
    plan = FaultPlan.parse("vm.stop:2=fail")
    await plan.hit("vm.stop")
    await plan.hit("vm.pause")
    with pytest.raises(HypervisorError, match=r"call 2 of vm\.stop"):
        await plan.hit("vm.stop")


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("hypervisor.launch", HypervisorError),
        ("vm.pause", HypervisorError),
        ("agent.execute", AgentError),
        ("network.attach", NetworkError),
        ("storage.share", StorageError),
    ],
)
async def test_fail_raises_what_the_driver_would(operation: str, error: type[Exception]):
    with pytest.raises(error):
        await FaultPlan.parse(f"{operation}:*=fail").hit(operation)


async def test_hang_lasts_until_it_is_cancelled():
    hanging = asyncio.ensure_future(FaultPlan.parse("vm.stop:1=hang").hit("vm.stop"))
    done, _ = await asyncio.wait({hanging}, timeout=0.01)
    assert not done
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_delay_then_fail_happen_in_the_order_written():
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(HypervisorError):
        await FaultPlan.parse("vm.stop:1=delay(0.02); vm.stop:1=fail").hit("vm.stop")
    assert loop.time() - started >= 0.019


async def test_die_ends_the_vm_that_the_call_is_about():
    plan = FaultPlan.parse("agent.execute:1=die(1.5)")
    died: list[tuple[str, float]] = []
    plan.on_die(lambda vm_id, seconds: died.append((vm_id, seconds)))
    await plan.hit("agent.execute", vm_id="vm-1")
    assert died == [("vm-1", 1.5)]


async def test_die_without_a_vm_fails_the_call():
    with pytest.raises(NetworkError):
        await FaultPlan.parse("network.attach:1=die").hit("network.attach")


async def test_an_unknown_operation_is_a_bug_of_the_driver():
    with pytest.raises(ValueError, match=r"agent\.explode"):
        await FaultPlan().hit("agent.explode")


def test_every_operation_is_a_call_of_a_protocol():
    owners = {
        "hypervisor": (base.Hypervisor, base.Templating, Auditable),
        "vm": (base.Vm, base.Measurable),
        "agent": (base.GuestSession, base.GuestAgent),
        "network": (base.Network, Auditable),
        "storage": (base.Storage, Auditable),
    }
    for operation in OPERATIONS - {"vm", "hypervisor.clone"}:  # a clone is a kind of launch
        owner, _, verb = operation.partition(".")
        assert any(hasattr(protocol, verb) for protocol in owners[owner]), operation
