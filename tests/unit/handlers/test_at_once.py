"""Reads are answered at once, and what is remembered for them is never stale."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.unit.handlers.fakes import NOW, World, pod_status
from vcnode.errors import InvalidArgumentError, NotFoundError
from vcnode.handlers.decode import MAX_REMEMBERED_BYTES, decode_again
from vcnode.handlers.routes import AT_ONCE
from vcnode.models import wire
from vcnode.models.commands import COMMANDS, PodName
from vcnode.models.pod import PodState, PodStatus


def test_nothing_that_changes_something_is_answered_at_once() -> None:
    assert {"pod.status", "pod.list", "node.ping"} <= AT_ONCE
    assert not any(COMMANDS[verb].mutates for verb in AT_ONCE)


def test_an_error_is_a_reply_too() -> None:
    world = World()
    world.pods.errors["status"] = NotFoundError("There is no pod p1.", pod_id="p1")
    outcome = world.dispatcher.answer("pod.status", {wire.COMMAND_ID: "c-1"}, b'{"pod_id": "p1"}')
    assert (outcome.code, outcome.headers[wire.COMMAND_ID]) == ("not_found", "c-1")
    assert world.counter.done == [("pod.status", "not_found")]


def test_a_deadline_that_has_passed_is_told() -> None:
    late = {wire.DEADLINE: (NOW - timedelta(seconds=1)).isoformat()}
    assert World().dispatcher.answer("node.ping", late, b"").code == "deadline_exceeded"


def test_the_same_small_body_is_read_once_and_a_bad_one_every_time() -> None:
    body = b'{"pod_id": "p1"}'
    assert decode_again(PodName, body) is decode_again(PodName, body)
    padded = body + b" " * MAX_REMEMBERED_BYTES
    assert decode_again(PodName, padded) is not decode_again(PodName, padded)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError):
            decode_again(PodName, b'{"pod_id": "P 1"}')


def test_a_copy_of_a_reply_has_json_of_its_own() -> None:
    ready = pod_status()
    assert PodStatus.model_validate_json(ready.encoded) == ready
    running = ready.model_copy(update={"state": PodState.RUNNING})
    assert PodStatus.model_validate_json(running.encoded).state is PodState.RUNNING
    assert ready.encoded is ready.encoded
