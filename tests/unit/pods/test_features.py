"""What containers want of agents, and which field is named when an agent lacks it."""

from __future__ import annotations

import pytest

from tests.unit.pods.world import container, pod
from vcnode.drivers.agent.hyperstart import HyperstartAgent
from vcnode.drivers.agent.native import NativeAgent
from vcnode.errors import PermissionDeniedError, UnsupportedError
from vcnode.models.pod import (
    AgentConfig,
    Cmd,
    ContainerResources,
    HyperConfig,
    OnDisconnect,
    Rlimit,
)
from vcnode.models.probes import Probe, Probes
from vcnode.models.secrets import SecretFile
from vcnode.pods import features
from vcnode.settings import PolicySettings

PLAIN, FORK = AgentConfig(), AgentConfig(hyperstart=HyperConfig(dialect="clearcontainers"))
NATIVE, HYPERSTART = NativeAgent().info, HyperstartAgent().info
PRIVILEGES = [
    Cmd(args=("x",), capabilities=("CAP_KILL",)),
    Cmd(args=("x",), rlimits=(Rlimit(type="core", soft=0, hard=0),)),
    Cmd(args=("x",), no_new_privileges=True),
]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": "app"}, "image"),
        ({"readonly_rootfs": True}, "readonly_rootfs"),
        ({"resources": ContainerResources(pids_limit=5)}, "resources"),
        ({"secrets": (SecretFile(name="a", file="/s/a"),)}, "secrets"),
        ({"probes": Probes(liveness=Probe.model_validate({"tcp": {"port": 1}}))}, "probes"),
        ({"cmd": PRIVILEGES[0]}, "cmd.capabilities"),
        ({"cmd": PRIVILEGES[1]}, "cmd.rlimits"),
        ({"cmd": PRIVILEGES[2]}, "cmd.no_new_privileges"),
    ],
)
def test_the_field_that_an_agent_cannot_do_is_named(fields: dict[str, object], named: str) -> None:
    spec = container("c1", **fields)
    features.check_container(spec, NATIVE, PLAIN, "pod.containers[0]")
    with pytest.raises(UnsupportedError) as caught:
        features.check_container(spec, HYPERSTART, PLAIN, "pod.containers[0]")
    assert caught.value.details["field"] == f"pod.containers[0].{named}"


def test_what_every_agent_with_containers_can_do_is_allowed() -> None:
    cmd = Cmd(args=("x",), user="1", group="2", workdir="/tmp", no_new_privileges=False)
    features.check_container(container("c1", cmd=cmd, stdin=True, tty=True), HYPERSTART, PLAIN, "container")


@pytest.mark.parametrize("cmd", PRIVILEGES)
def test_the_fork_of_hyperstart_has_privileges(cmd: Cmd) -> None:
    features.check_cmd(cmd, HYPERSTART, FORK, "cmd")
    with pytest.raises(UnsupportedError):
        features.check_cmd(cmd, HYPERSTART, PLAIN, "cmd")


def test_a_guest_that_cannot_end_itself_is_not_relied_on() -> None:
    rule = pod(on_disconnect=OnDisconnect(action="stop", after_s=60))
    features.check_pod(rule, NATIVE)
    features.check_pod(pod(), HYPERSTART)
    with pytest.raises(UnsupportedError, match="on_disconnect"):
        features.check_pod(rule, HYPERSTART)


def test_a_policy_about_capabilities_keeps_out_guests_that_have_them_all() -> None:
    strict = PolicySettings(capabilities=("CAP_KILL",))
    features.check_policy(NATIVE, PLAIN, strict, "pod.agent_type")
    features.check_policy(HYPERSTART, PLAIN, PolicySettings(), "pod.agent_type")
    features.check_policy(HYPERSTART, FORK, strict, "pod.agent_type")
    with pytest.raises(PermissionDeniedError) as caught:
        features.check_policy(HYPERSTART, PLAIN, strict, "pod.agent_type")
    assert caught.value.details["rule"] == "policy.capabilities"
