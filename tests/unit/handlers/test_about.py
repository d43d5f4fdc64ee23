"""Log lines say what they are about: of commands from their headers to their last line, and of own work."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.handlers.fakes import NOW, Counter, FakeFleet, FakeStreams
from tests.unit.handlers.fakes import World as FakeWorld
from tests.unit.pods.world import World, container, pod
from vcnode import logs
from vcnode.drivers.agent.mock.agent import MockSession
from vcnode.errors import ResourceExhaustedError, UnsupportedError
from vcnode.handlers.about import about
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.services import Services
from vcnode.models import wire
from vcnode.models.commands import COMMANDS
from vcnode.models.pod import PodSpec, RestartPolicy

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {wire.COMMAND_ID: "c-1", "traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
OF_COMMANDS = ("verb", "command_id", "trace_id")


class Lines(io.StringIO):
    """What a node has logged, as JSON lines."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def write(self, text: str) -> int:
        self._more.set()
        return super().write(text)

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def marks(self, beginning: str) -> dict[str, str]:
        """What the last line that begins so is about."""
        line = [line for line in self.all() if line["event"].startswith(beginning)][-1]
        return {k: line[k] for k in (*OF_COMMANDS, "pod_id", "container_id") if k in line}

    async def until(self, beginning: str) -> dict[str, str]:
        """The same, once there is such a line."""
        while not any(line["event"].startswith(beginning) for line in self.all()):
            self._more.clear()
            await self._more.wait()
        return self.marks(beginning)


@pytest.fixture
def lines() -> Lines:
    made = Lines()
    logs.configure(form="json", level="info", stream=made)
    return made


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    built = await World(tmp_path).start()
    yield built
    await built.close()


def dispatcher_of(world: World) -> Dispatcher:
    services = Services(
        pods=world.pods,
        images=world.images,
        node=FakeWorld().node,
        fleet=FakeFleet("n1"),
        streams=FakeStreams(),
        sessions=FakeStreams(),
    )
    return Dispatcher(
        services,
        world.journal,
        max_concurrent=8,
        max_request_bytes=1 << 20,
        observer=Counter(),
        clock=lambda: NOW,
        tasks=world.tasks,
    )


async def run(world: World, spec: PodSpec) -> None:
    body = json.dumps({"pod": spec.model_dump(mode="json", exclude_unset=True)}).encode()
    outcome = await dispatcher_of(world).dispatch("pod.run", HEADERS, body)
    assert outcome.ok, outcome.body


def kill_container(world: World) -> None:
    (guest,) = world.guests.by_vm_id.values()
    guest.signal("c1", 9, everyone=False)


async def test_lines_of_a_command_carry_its_id_its_trace_and_its_pod(world: World, lines: Lines) -> None:
    await run(world, pod())
    every = {"verb": "pod.run", "command_id": "c-1", "trace_id": TRACE_ID, "pod_id": "p1"}
    assert lines.marks("Pod p1: created") == every
    assert lines.marks("Pod p1: starting -> running") == every


async def test_lines_of_a_pod_that_the_node_has_named_carry_that_name(world: World, lines: Lines) -> None:
    outcome = await dispatcher_of(world).dispatch("pod.create", HEADERS, b'{"pod": {}}')
    pod_id = json.loads(outcome.body)["pod_id"]
    assert lines.marks(f"Pod {pod_id}: created")["pod_id"] == pod_id


async def test_the_line_of_a_failed_command_names_its_pod_and_container(world: World, lines: Lines) -> None:
    await run(world, pod())
    body = b'{"pod_id": "p1", "container_id": "c9"}'
    assert not (await dispatcher_of(world).dispatch("container.start", HEADERS, body)).ok
    marks = {"command_id": "c-1", "trace_id": TRACE_ID, "pod_id": "p1", "container_id": "c9"}
    assert lines.marks("container.start failed") == {"verb": "container.start", **marks}


async def test_so_do_those_of_commands_that_are_answered_at_once_or_not_even_begun(
    world: World, lines: Lines
) -> None:
    dispatcher = dispatcher_of(world)
    marks = {"command_id": "c-1", "trace_id": TRACE_ID}
    assert not dispatcher.answer("pod.status", HEADERS, b'{"pod_id": "p9"}').ok
    assert lines.marks("pod.status failed") == {"verb": "pod.status", "pod_id": "p9", **marks}
    dispatcher.refuse("pod.start", HEADERS, ResourceExhaustedError("Too many commands."))
    assert lines.marks("pod.start failed") == {"verb": "pod.start", **marks}


async def test_what_becomes_of_a_pod_later_is_not_the_command_that_started_it(
    world: World, lines: Lines
) -> None:
    await run(world, pod())
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id, "It was killed.")
    assert await lines.until("Pod p1: running -> failed") == {"pod_id": "p1"}


async def test_lines_of_a_restart_name_what_is_restarted_and_no_command(tmp_path: Path, lines: Lines) -> None:
    world = await World(tmp_path, "agent.start_container:2=fail").start()
    world.pods.start_restarts()
    await run(world, pod(containers=[container(restart_policy=RestartPolicy.ALWAYS)]))
    kill_container(world)
    names = {"pod_id": "p1", "container_id": "c1"}
    assert await lines.until("Container p1/c1 could not be restarted") == names
    await world.close()


async def test_lines_about_an_end_that_cannot_be_saved_name_the_container(world: World, lines: Lines) -> None:
    await run(world, pod())
    world.plan.failing = ("commit",)
    kill_container(world)
    names = {"pod_id": "p1", "container_id": "c1"}
    assert await lines.until("Pod p1: the end of container c1 cannot be saved yet") == names
    assert await lines.until("Pod p1: cannot save, next try in") == names
    world.plan.failing = ()


async def test_lines_of_a_recovery_name_the_pod(world: World, lines: Lines) -> None:
    await run(world, pod())
    await world.crash()
    await world.start("hypervisor.recover:1=fail")
    await world.pods.recover()
    assert lines.marks("Pod p1: its VM cannot be taken over") == {"pod_id": "p1"}
    assert lines.marks("Pod p1: running -> failed") == {"pod_id": "p1"}


async def test_lines_of_who_follows_logs_name_the_pod(
    world: World, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def follow_logs(*_: object, **__: object) -> None:
        raise UnsupportedError("No logs here.")

    monkeypatch.setattr(MockSession, "follow_logs", follow_logs)
    await run(world, pod())
    assert await lines.until("Pod p1: its guest agent gives no logs") == {"pod_id": "p1"}


@pytest.mark.parametrize(
    ("verb", "fields", "found"),
    [
        ("pod.run", {"pod": {"id": "p1"}}, {"pod_id": "p1"}),
        ("pod.run", {"pod": {}}, {}),
        ("pod.stop", {"pod_id": "p1"}, {"pod_id": "p1"}),
        ("container.stop", {"pod_id": "p1", "container_id": "c1"}, {"pod_id": "p1", "container_id": "c1"}),
        ("node.info", {}, {}),
    ],
)
def test_a_request_names_what_it_is_about(verb: str, fields: Any, found: dict[str, str]) -> None:
    assert about(COMMANDS[verb].request.model_validate(fields)) == found
