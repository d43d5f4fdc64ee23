"""What runs in a container."""

from __future__ import annotations

import pytest

from vcnode.errors import InvalidArgumentError
from vcnode.models.capabilities import ALL_CAPABILITIES, DEFAULT_CAPABILITIES
from vcnode.models.image import ImageConfig
from vcnode.models.pod import Cmd, ContainerSpec, EnvVar, Rlimit
from vcnode.pods.process import exec_process, guest_process

CONFIG = ImageConfig(
    entrypoint=("/bin/server",),
    cmd=("--serve",),
    env=(("PATH", "/bin"), ("MODE", "image")),
    workdir="/srv",
    user="web:www",
)


def of_image(**cmd: object) -> ContainerSpec:
    return ContainerSpec(id="c", image="app", cmd=Cmd(**cmd))  # type: ignore[arg-type]


def test_without_args_the_image_says_what_runs() -> None:
    process = guest_process(of_image(), CONFIG)
    assert process.args == ("/bin/server", "--serve")
    assert (process.user, process.group, process.workdir) == ("web", "www", "/srv")
    assert process.capabilities == DEFAULT_CAPABILITIES
    assert process.no_new_privileges


def test_args_replace_entrypoint_and_command_both() -> None:
    assert guest_process(of_image(args=("sh",)), CONFIG).args == ("sh",)


def test_without_args_and_without_a_command_of_the_image_there_is_nothing_to_run() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        guest_process(of_image())
    assert caught.value.details["violations"][0]["field"] == "cmd.args"


def test_the_later_variable_of_a_name_wins() -> None:
    envs = (EnvVar(var="MODE", value="1"), EnvVar(var="MODE", value="2"), EnvVar(var="NEW", value=""))
    process = guest_process(of_image(envs=envs), CONFIG)
    assert process.envs == (("PATH", "/bin"), ("MODE", "2"), ("NEW", ""))


@pytest.mark.parametrize(
    ("cmd", "user", "group"),
    [
        ({}, "web", "www"),
        ({"user": "bob"}, "bob", None),
        ({"user": "1000:1000"}, "1000", "1000"),
        ({"user": "bob", "group": "staff"}, "bob", "staff"),
        ({"group": "staff"}, "web", "staff"),
        ({"user": ":staff"}, "0", "staff"),
        ({"user": ""}, "web", "www"),
    ],
)
def test_user_and_group(cmd: dict[str, str], user: str, group: str | None) -> None:
    process = guest_process(of_image(args=("a",), **cmd), CONFIG)
    assert (process.user, process.group) == (user, group)


@pytest.mark.parametrize(
    ("cmd", "field"),
    [
        ({"user": "bob:staff", "group": "wheel"}, "cmd.group"),
        ({"capabilities": ("CAP_KILL", "CAP_FLY")}, "cmd.capabilities[1]"),
        ({"rlimits": (Rlimit(type="nofiles", soft=1, hard=1),)}, "cmd.rlimits[0].type"),
        ({"args": ("",)}, "cmd.args[0]"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_field(cmd: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        guest_process(of_image(**{"args": ("a",), **cmd}), CONFIG)
    assert caught.value.details["violations"][0]["field"] == field


def test_an_empty_list_of_capabilities_means_none() -> None:
    assert guest_process(of_image(args=("a",), capabilities=())).capabilities == ()


def test_exec_borrows_from_the_container_what_it_does_not_say() -> None:
    container = of_image(
        args=("main",), envs=(EnvVar(var="A", value="1"),), user="bob:staff", workdir="/w",
        capabilities=("CAP_KILL",),
    )  # fmt: skip
    process = exec_process(Cmd(args=("ls",), envs=(EnvVar(var="B", value="2"),)), container, CONFIG)
    assert process.args == ("ls",)
    assert dict(process.envs) == {"PATH": "/bin", "MODE": "image", "A": "1", "B": "2"}
    assert (process.user, process.group, process.workdir) == ("bob", "staff", "/w")
    assert process.capabilities == ("CAP_KILL",)
    assert exec_process(Cmd(args=("ls",), user="0"), container).user == "0"


def test_exec_never_gets_more_capabilities_than_the_container_by_default() -> None:
    container = of_image(args=("main",), capabilities=())
    assert exec_process(Cmd(args=("ls",)), container).capabilities == ()


def test_exec_in_the_guest_itself_may_do_everything() -> None:
    process = exec_process(Cmd(args=("ls",)), None)
    assert process.capabilities == ALL_CAPABILITIES
    assert len(ALL_CAPABILITIES) == len(set(ALL_CAPABILITIES)) == 41


def test_exec_needs_something_to_run() -> None:
    with pytest.raises(InvalidArgumentError):
        exec_process(Cmd(), None)
