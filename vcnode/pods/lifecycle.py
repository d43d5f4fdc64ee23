"""What may happen to a pod and to a container, and what it becomes. Pure.

Pods::

     ready ----+                                   pause
               | start             started       ------->
     stopped --+-------> starting ---------> running      paused
               |          |    |               |  <-------  |
     failed ---+          |    | stop          |   resume   |
     (nothing left over)  |    |               | stop       | stop
                          |    +-----------> stopping <-----+
                  stopped |                    |
                 (undone) +----> stopped <-----+ stopped

     starting, running, paused, stopping, failed ---- fail ----> failed

``starting`` and ``stopping`` last as long as their command holds the pod's lock. A pod that is found in one
of them while nobody holds the lock was left half-way (a restart, a full disk): stop and delete finish that.

Containers::

     ready ---+             pause
              | start      ------->
              +----> running       paused
              |        |   <-------  |
     stopped -+        | exit resume | exit
        ^--------------+-------------+
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from vcnode.errors import FailedPreconditionError
from vcnode.models.pod import ContainerState, PodState

_P = PodState
_C = ContainerState


class PodStep(StrEnum):
    """What happens to a pod."""

    START = "start"
    STARTED = "started"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    STOPPED = "stopped"
    FAIL = "fail"


class ContainerStep(StrEnum):
    """What happens to a container."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    EXIT = "exit"


POD_STEPS: Mapping[tuple[PodState, PodStep], PodState] = {
    (_P.READY, PodStep.START): _P.STARTING,
    (_P.STOPPED, PodStep.START): _P.STARTING,
    (_P.FAILED, PodStep.START): _P.STARTING,
    (_P.STARTING, PodStep.STARTED): _P.RUNNING,
    (_P.STARTING, PodStep.STOP): _P.STOPPING,
    (_P.STARTING, PodStep.STOPPED): _P.STOPPED,
    (_P.STARTING, PodStep.FAIL): _P.FAILED,
    (_P.RUNNING, PodStep.PAUSE): _P.PAUSED,
    (_P.RUNNING, PodStep.STOP): _P.STOPPING,
    (_P.RUNNING, PodStep.FAIL): _P.FAILED,
    (_P.PAUSED, PodStep.RESUME): _P.RUNNING,
    (_P.PAUSED, PodStep.STOP): _P.STOPPING,
    (_P.PAUSED, PodStep.FAIL): _P.FAILED,
    (_P.STOPPING, PodStep.STOP): _P.STOPPING,
    (_P.STOPPING, PodStep.STOPPED): _P.STOPPED,
    (_P.STOPPING, PodStep.FAIL): _P.FAILED,
    (_P.FAILED, PodStep.FAIL): _P.FAILED,
}
"""All that may happen to a pod; what is not here may not."""

CONTAINER_STEPS: Mapping[tuple[ContainerState, ContainerStep], ContainerState] = {
    (_C.READY, ContainerStep.START): _C.RUNNING,
    (_C.STOPPED, ContainerStep.START): _C.RUNNING,
    (_C.RUNNING, ContainerStep.PAUSE): _C.PAUSED,
    (_C.RUNNING, ContainerStep.EXIT): _C.STOPPED,
    (_C.PAUSED, ContainerStep.RESUME): _C.RUNNING,
    (_C.PAUSED, ContainerStep.EXIT): _C.STOPPED,
}
"""All that may happen to a container; what is not here may not."""

POD_HAS_VM = frozenset({_P.RUNNING, _P.PAUSED})
"""States in which a pod's VM is up and nobody is changing that."""
POD_DELETABLE = frozenset(_P) - POD_HAS_VM
"""States in which a pod may be deleted without being stopped first."""
POD_TAKES_CONTAINERS = frozenset({_P.READY, _P.RUNNING, _P.STOPPED, _P.FAILED})
"""States in which containers may be added to a pod and removed from it."""
CONTAINER_ALIVE = frozenset({_C.RUNNING, _C.PAUSED})
"""States in which a container has a main process."""

S = TypeVar("S", PodState, ContainerState)


def next_pod_state(pod_id: str, state: PodState, step: PodStep, verb: str) -> PodState:
    """The state after *step*.

    Raises:
        FailedPreconditionError: *step* may not happen in *state*; names the states in which *verb* may.
    """
    found = POD_STEPS.get((state, step))
    if found is None:
        allowed = [s for s, other in POD_STEPS if other is step]
        raise FailedPreconditionError.state(f"Pod {pod_id}", state, allowed, verb)
    return found


def next_container_state(name: str, state: ContainerState, step: ContainerStep, verb: str) -> ContainerState:
    """The state after *step*; *name* is ``<pod>/<container>``. Raises as `next_pod_state`."""
    found = CONTAINER_STEPS.get((state, step))
    if found is None:
        allowed = [s for s, other in CONTAINER_STEPS if other is step]
        raise FailedPreconditionError.state(f"Container {name}", state, allowed, verb)
    return found


def require(what: str, state: S, allowed: frozenset[S], verb: str) -> None:
    """See that *what* is in one of *allowed*.

    Raises:
        FailedPreconditionError: It is not; names the states that would do.
    """
    if state not in allowed:
        raise FailedPreconditionError.state(what, state, allowed, verb)
