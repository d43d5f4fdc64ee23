"""All pairs of state and step."""

from __future__ import annotations

import itertools

import pytest

from vcnode.errors import FailedPreconditionError
from vcnode.models.pod import ContainerState, PodState
from vcnode.pods.lifecycle import (
    CONTAINER_STEPS,
    POD_DELETABLE,
    POD_HAS_VM,
    POD_STEPS,
    ContainerStep,
    PodStep,
    next_container_state,
    next_pod_state,
    require,
)

POD_TABLE = {
    "ready": {"start": "starting"},
    "stopped": {"start": "starting"},
    "failed": {"start": "starting", "fail": "failed"},
    "starting": {"started": "running", "stop": "stopping", "stopped": "stopped", "fail": "failed"},
    "running": {"pause": "paused", "stop": "stopping", "fail": "failed"},
    "paused": {"resume": "running", "stop": "stopping", "fail": "failed"},
    "stopping": {"stop": "stopping", "stopped": "stopped", "fail": "failed"},
}
CONTAINER_TABLE = {
    "ready": {"start": "running"},
    "stopped": {"start": "running"},
    "running": {"pause": "paused", "exit": "stopped"},
    "paused": {"resume": "running", "exit": "stopped"},
}


@pytest.mark.parametrize(("state", "step"), list(itertools.product(PodState, PodStep)))
def test_each_step_of_a_pod_leads_where_the_diagram_says_or_is_refused(
    state: PodState, step: PodStep
) -> None:
    expected = POD_TABLE[state].get(step)
    if expected is not None:
        assert next_pod_state("p1", state, step, "verb") == expected
        return
    with pytest.raises(FailedPreconditionError) as caught:
        next_pod_state("p1", state, step, "the verb")
    assert caught.value.details["state"] == state
    assert caught.value.details["allowed"] == sorted(s for s, row in POD_TABLE.items() if step in row)
    assert "p1" in caught.value.message
    assert "the verb" in caught.value.message


@pytest.mark.parametrize(("state", "step"), list(itertools.product(ContainerState, ContainerStep)))
def test_each_step_of_a_container_leads_where_the_diagram_says_or_is_refused(
    state: ContainerState, step: ContainerStep
) -> None:
    expected = CONTAINER_TABLE[state].get(step)
    if expected is not None:
        assert next_container_state("p1/c1", state, step, "verb") == expected
        return
    with pytest.raises(FailedPreconditionError, match="Container p1/c1"):
        next_container_state("p1/c1", state, step, "verb")


def test_the_tables_hold_nothing_else() -> None:
    assert len(POD_STEPS) == sum(len(row) for row in POD_TABLE.values())
    assert len(CONTAINER_STEPS) == sum(len(row) for row in CONTAINER_TABLE.values())


def test_a_pod_is_deletable_exactly_when_it_has_no_vm_that_runs() -> None:
    assert set(PodState) == POD_DELETABLE | POD_HAS_VM
    assert not POD_DELETABLE & POD_HAS_VM


def test_require_names_what_would_do() -> None:
    require("Pod p1", PodState.READY, frozenset({PodState.READY}), "x")
    with pytest.raises(FailedPreconditionError) as caught:
        require("Pod p1", PodState.READY, frozenset({PodState.RUNNING, PodState.PAUSED}), "x")
    assert caught.value.details == {"state": "ready", "allowed": ["paused", "running"]}
