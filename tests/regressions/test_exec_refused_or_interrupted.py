"""An exec that was refused by a stopping node must be sent again; one that ran and was interrupted must not.

The first was answered as final although nothing had been done; the second, ended by a pod.stop, as one that
may be repeated, so that the same command id ran it twice.
"""

from __future__ import annotations

from tests.unit.handlers.fakes import World
from vcnode.errors import AbortedError
from vcnode.models import wire

EXEC = b'{"pod_id": "p1", "container_id": "c1", "cmd": {"args": ["date"]}}'
HEADERS = {wire.COMMAND_ID: "c-1"}


async def test_an_exec_refused_by_a_stopping_node_may_be_sent_again() -> None:
    world = World()
    world.dispatcher.drain()
    outcome = await world.dispatcher.dispatch("container.exec", HEADERS, EXEC)
    assert (outcome.code, outcome.retryable) == ("unavailable", True)
    assert world.pods.count("exec") == 0


async def test_an_exec_that_a_stop_has_ended_is_not_run_again() -> None:
    world = World()
    world.pods.errors["exec"] = AbortedError("Pod p1 was stopped while a command ran in it.")
    first = await world.dispatcher.dispatch("container.exec", HEADERS, EXEC)
    world.pods.errors.clear()
    again = await world.dispatcher.dispatch("container.exec", HEADERS, EXEC)
    assert (first.code, first.retryable) == ("aborted", False)
    assert again.body == first.body
    assert again.headers[wire.DUPLICATE] == "true"
    assert world.pods.count("exec") == 1
