"""Routes: every command has a handler that takes and gives what the table of commands says."""

from __future__ import annotations

import inspect
import typing

import pytest

from tests.unit.handlers.fakes import World
from vcnode.handlers.lanes import ENDING, Lane
from vcnode.handlers.outcome import EXECUTING
from vcnode.handlers.routes import ROUTES
from vcnode.models.commands import BROADCAST, COMMANDS

REQUESTS = {
    "pod.create": b'{"pod": {"id": "p1"}}',
    "pod.run": b'{"pod": {"id": "p1"}}',
    "pod.exec": b'{"pod_id": "p1", "cmd": {"args": ["true"]}}',
    "container.exec": b'{"pod_id": "p1", "container_id": "c1", "cmd": {"args": ["true"]}}',
    "container.create": b'{"pod_id": "p1", "container": {"id": "c1", "image": "busybox"}}',
    "container.update": b'{"pod_id": "p1", "container_id": "c1", "resources": {"pids_limit": 9}}',
    "pod.attach_volume": b'{"pod_id": "p1", "volume": {"mount_tag": "data", "host_path": "/srv/data"}}',
    "pod.detach_volume": b'{"pod_id": "p1", "mount_tag": "data"}',
    "pod.resize": b'{"pod_id": "p1", "mem_size_mib": 128}',
    "container.copy_in": b'{"pod_id": "p1", "container_id": "c1", "path": "/a"}',
    "container.copy_out": b'{"pod_id": "p1", "container_id": "c1", "path": "/a"}',
    "session.exec": b'{"pod_id": "p1", "cmd": {"args": ["true"]}}',
    "session.resume": b'{"session_id": "%s"}' % (b"0" * 32),
    "session.close": b'{"session_id": "%s"}' % (b"0" * 32),
    "image.import": b'{"name": "busybox", "path": "/srv/busybox"}',
    "image.pull": b'{"reference": "registry.example/app:1"}',
    "image.status": b'{"name": "busybox"}',
    "image.remove": b'{"name": "busybox"}',
    "pod.release": b'{"reservation": "r-0123456789abcdef01234567"}',
    "pod.bid": b'{"pod": {"id": "p1"}}',
}


def request_for(verb: str) -> bytes:
    if verb in REQUESTS:
        return REQUESTS[verb]
    if verb.startswith("container.") and verb != "container.list":
        return b'{"pod_id": "p1", "container_id": "c1"}'
    return b'{"pod_id": "p1"}' if verb.startswith("pod.") and verb != "pod.list" else b""


def test_every_command_has_one_handler_and_the_other_way_round() -> None:
    assert ROUTES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_a_handler_is_typed_as_its_command(verb: str) -> None:
    handler = ROUTES[verb]
    hints = typing.get_type_hints(handler)
    assert hints["request"] is COMMANDS[verb].request
    assert hints["return"] is COMMANDS[verb].reply
    assert handler.__name__ == verb.replace(".", "_")
    if COMMANDS[verb].mutates:
        assert inspect.iscoroutinefunction(handler)


@pytest.mark.parametrize("verb", sorted(COMMANDS))
async def test_a_command_gives_a_reply_of_its_model(verb: str) -> None:
    outcome = await World().dispatcher.dispatch(verb, {}, request_for(verb))
    assert outcome.ok, outcome.body
    COMMANDS[verb].reply.model_validate_json(outcome.body)


def test_sets_of_verbs_name_commands_only() -> None:
    assert COMMANDS.keys() >= ENDING | EXECUTING | BROADCAST
    assert all(not COMMANDS[verb].mutates for verb in BROADCAST)
    assert {Lane.of(command) for command in COMMANDS.values()} == set(Lane)
