"""The typed client: a method for every command, which sends exactly the command's request."""

from __future__ import annotations

import inspect
import json
import typing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.unit.handlers.fakes import World, pod_status
from vcnode.client import NodeClient
from vcnode.client.requests import NobodyListensError
from vcnode.client.streams import StreamMethods
from vcnode.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NodeError,
    UnavailableError,
)
from vcnode.models import wire
from vcnode.models.commands import COMMANDS
from vcnode.models.pod import Cmd, ContainerResources, ContainerSpec, EnvVar, PodSpec, PodState
from vcnode.models.sessions import ContainerCopyIn, ContainerCopyOut, SessionExec
from vcnode.models.subjects import Subjects
from vcnode.models.volumes import Volume


class Message:
    """A reply."""

    def __init__(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.data = data
        self.headers = headers


class DirectRequester:
    """Hands requests straight to a dispatcher, and notes them."""

    actor: str | None = None

    def __init__(self) -> None:
        self.world = World()
        self.sent: list[tuple[str, dict[str, Any], dict[str, str], float]] = []
        self.error: Exception | None = None
        self.reply: Message | None = None

    async def request(self, subject: str, body: bytes, headers: dict[str, str], *, timeout_s: float) -> Any:
        self.sent.append((subject, json.loads(body or b"{}"), headers, timeout_s))
        if self.error is not None:
            raise self.error
        if self.reply is not None:
            return self.reply
        kept = {name: value for name, value in headers.items() if name != wire.DEADLINE}  # other clocks
        verb = subject.split(".", 3)[3]
        outcome = await self.world.dispatcher.dispatch(verb, kept, body)
        return Message(outcome.body, outcome.headers)


@pytest.fixture
def requester() -> DirectRequester:
    return DirectRequester()


@pytest.fixture
def node(requester: DirectRequester) -> NodeClient:
    return NodeClient(requester, Subjects(), "n1")  # type: ignore[arg-type]


CALLS: dict[str, tuple[Any, ...]] = {
    "pod.create": (PodSpec(id="p1"),),
    "pod.run": (PodSpec(id="p1"),),
    "pod.exec": ("p1", ["true"]),
    "container.create": ("p1", ContainerSpec(image="busybox")),
    "container.update": ("p1", "c1", ContainerResources(pids_limit=9)),
    "pod.resize": ("p1", 128),
    "pod.attach_volume": ("p1", Volume(mount_tag="data", host_path="/srv/data")),
    "pod.detach_volume": ("p1", "data"),
    "container.exec": ("p1", "c1", Cmd(args=("true",))),
    "container.copy_in": (ContainerCopyIn(pod_id="p1", container_id="c1", path="/a"),),
    "container.copy_out": (ContainerCopyOut(pod_id="p1", container_id="c1", path="/a"),),
    "session.exec": (SessionExec(pod_id="p1", cmd=Cmd(args=("true",))),),
    "session.resume": ("0" * 32,),
    "session.close": ("0" * 32,),
    "session.list": (),
    "image.import": ("busybox", "/srv/x"),
    "image.pull": ("registry.example/app:1",),
    "image.status": ("busybox",),
    "image.remove": ("busybox",),
    "pod.list": (),
    "container.list": (),
    "image.list": (),
    "node.audit": (),
    "node.info": (),
    "node.ping": (),
    "pod.release": ("r-0123456789abcdef01234567",),
    "pod.bid": (PodSpec(id="p1"),),
    "node.label": ({"zone": "a"},),
    "node.cordon": (),
    "node.uncordon": (),
    "node.drain": (),
}


def arguments(verb: str) -> tuple[Any, ...]:
    return CALLS.get(verb, ("p1",) if verb.startswith("pod.") else ("p1", "c1"))


def test_every_command_has_a_method_and_the_other_way_round() -> None:
    methods = {name for name, _ in inspect.getmembers(NodeClient, inspect.isfunction) if name[0] != "_"}
    streams = {name for name in vars(StreamMethods) if name[0] != "_"}
    assert methods - {"enqueue", "follow_logs", "follow_stats"} - streams == {
        verb.replace(".", "_") for verb in COMMANDS
    }


@pytest.mark.parametrize("verb", sorted(COMMANDS))
async def test_a_method_sends_its_command_and_gives_its_reply(
    node: NodeClient, requester: DirectRequester, verb: str
) -> None:
    method = getattr(node, verb.replace(".", "_"))
    reply = await method(*arguments(verb))
    assert isinstance(reply, COMMANDS[verb].reply)
    assert typing.get_type_hints(method)["return"] is COMMANDS[verb].reply
    [(subject, _, headers, timeout_s)] = requester.sent
    assert subject == f"vcnode.rpc.n1.{verb}"
    assert (wire.COMMAND_ID in headers) == COMMANDS[verb].mutates
    assert wire.DEADLINE not in headers
    assert timeout_s > COMMANDS[verb].default_timeout_s


async def test_stats_are_followed_until_the_pod_stops(node: NodeClient, requester: DirectRequester) -> None:
    found = []
    async for sample in node.follow_stats("p1", guest=False, interval_s=5):
        found.append(sample.time)
        if len(found) == 2:
            requester.world.pods.errors["stats"] = FailedPreconditionError("It does not run.")
    asked = [(body.get("after"), body.get("interval_s"), body["guest"]) for _, body, _, _ in requester.sent]
    assert len(found) == 2
    assert [after is None for after, _, _ in asked] == [True, False, False]
    assert {(interval_s, guest) for _, interval_s, guest in asked} == {(5, False)}
    with pytest.raises(FailedPreconditionError):
        await anext(node.follow_stats("p1"))


async def test_options_become_headers(node: NodeClient, requester: DirectRequester) -> None:
    before = datetime.now(UTC)
    await node.pod_start("p1", command_id="job-1", deadline_s=7, expected_revision=3)
    [(_, _, headers, timeout_s)] = requester.sent
    assert headers[wire.COMMAND_ID] == "job-1"
    assert headers[wire.EXPECTED_REVISION] == "3"
    deadline = datetime.fromisoformat(headers[wire.DEADLINE])
    assert timedelta(seconds=6) < deadline - before < timedelta(seconds=9)
    assert 7 < timeout_s < 15


async def test_what_the_caller_did_not_give_is_not_sent(node: NodeClient, requester: DirectRequester) -> None:
    await node.pod_create(PodSpec(id="p1", labels={"a": "b"}))
    await node.pod_stop("p1")
    await node.pod_list(states=[PodState.RUNNING])
    bodies = [body for _, body, _, _ in requester.sent]
    assert bodies[0] == {"pod": {"id": "p1", "labels": {"a": "b"}}}
    assert bodies[1] == {"pod_id": "p1"}
    assert bodies[2] == {"labels": {}, "states": ["running"]}


async def test_exec_takes_words_or_a_whole_command(node: NodeClient, requester: DirectRequester) -> None:
    result = await node.container_exec("p1", "c1", ["cat", "-"], stdin=b"\xff", timeout_s=5)
    assert result.stdout.raw == b"\xff"
    env = (EnvVar(var="A", value="b"),)
    await node.container_exec("p1", "c1", Cmd(args=("env",), envs=env), deadline_s=3)
    (_, first, first_headers, _), (_, second, second_headers, _) = requester.sent
    assert first["cmd"] == {"args": ["cat", "-"]}
    assert first["stdin"]["encoding"] == "base64"
    assert second["cmd"]["envs"] == [{"var": "A", "value": "b"}]
    first_deadline = datetime.fromisoformat(first_headers[wire.DEADLINE])
    second_deadline = datetime.fromisoformat(second_headers[wire.DEADLINE])
    assert first_deadline - second_deadline > timedelta(seconds=25)  # its own time limit, and a margin


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda node: node.pod_status("No!"), "pod_id"),
        (lambda node: node.pod_stop("p1", grace_s=-1), "grace_s"),
        (lambda node: node.container_kill("p1", "c1", signal=99), "signal"),
        (lambda node: node.image_import("busybox", "relative"), "path"),
        (lambda node: node.container_exec("p1", "c1", ["a\0b"]), "args[0]"),
    ],
)
async def test_a_bad_value_is_refused_before_anything_is_sent(
    node: NodeClient, requester: DirectRequester, call: Any, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await call(node)
    assert caught.value.details["violations"][0]["field"] == field
    assert not requester.sent


def test_a_name_that_no_node_can_have_is_refused(requester: DirectRequester) -> None:
    for name in ("", "a.b", "*", ">", "N1", "n1 "):
        with pytest.raises(InvalidArgumentError):
            NodeClient(requester, Subjects(), name)  # type: ignore[arg-type]


async def test_an_absent_node_is_named(node: NodeClient, requester: DirectRequester) -> None:
    requester.error = NobodyListensError("Nobody listens on x.")
    with pytest.raises(UnavailableError, match="No node named n1") as caught:
        await node.node_ping()
    assert caught.value.details["node"] == "n1"


async def test_a_time_out_says_with_which_id_to_ask_again(
    node: NodeClient, requester: DirectRequester
) -> None:
    requester.error = TimeoutError()
    with pytest.raises(DeadlineExceededError) as caught:
        await node.pod_start("p1")
    assert caught.value.details["command_id"] == requester.sent[0][2][wire.COMMAND_ID]


async def test_a_reply_that_is_not_understood_is_an_error(
    node: NodeClient, requester: DirectRequester
) -> None:
    requester.reply = Message(b'{"pod_id": 1}')
    with pytest.raises(NodeError, match="not what this version"):
        await node.pod_status("p1")


async def test_unknown_fields_of_a_reply_are_ignored(node: NodeClient, requester: DirectRequester) -> None:
    fields = json.loads(pod_status("p1").model_dump_json()) | {"new_in_2040": 1}
    requester.reply = Message(json.dumps(fields).encode())
    assert (await node.pod_status("p1")).pod_id == "p1"


async def test_an_error_of_another_service_is_still_an_error(
    node: NodeClient, requester: DirectRequester
) -> None:
    requester.reply = Message(b"", {wire.SERVICE_ERROR: "nope", wire.SERVICE_ERROR_CODE: "418"})
    with pytest.raises(NodeError, match=r"nope \(error 418\)"):
        await node.pod_status("p1")


async def test_an_error_with_hostile_details_is_still_that_error(
    node: NodeClient, requester: DirectRequester
) -> None:
    body = {"code": "not_found", "message": "No.", "details": {"message": "x", "self": 1}, "error_id": "e1"}
    requester.reply = Message(
        json.dumps(body).encode(), {wire.SERVICE_ERROR: "No.", wire.SERVICE_ERROR_CODE: "404"}
    )
    with pytest.raises(NodeError.__mro__[1]) as caught:
        await node.pod_status("p1")
    assert caught.value.code == "not_found"
    assert caught.value.details["error_id"] == "e1"


async def test_a_limit_that_is_lifted_is_sent_as_null(node: NodeClient, requester: DirectRequester) -> None:
    await node.container_update("p1", "c1", ContainerResources(pids_limit=None, cpu_shares=9))
    assert requester.sent[-1][1]["resources"] == {"pids_limit": None, "cpu_shares": 9}


async def test_who_follows_asks_again_soon_when_the_node_agent_was_killed(
    node: NodeClient, requester: DirectRequester
) -> None:
    """It cannot say so: only the end of the request tells."""
    requester.error = TimeoutError()
    with pytest.raises(DeadlineExceededError):
        await anext(node.follow_logs("p1", "c1"))
    with pytest.raises(DeadlineExceededError):
        await anext(node.follow_stats("p1", interval_s=2.0))
    (_, logs, _, logs_limit), (_, _, _, stats_limit) = requester.sent
    assert logs["wait_s"] < logs_limit <= 30
    assert 2 < stats_limit <= 60
