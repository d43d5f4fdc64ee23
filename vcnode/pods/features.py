"""What containers and commands want of the agent in their guest, and whether it has that. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from vcnode.errors import UnsupportedError
from vcnode.models.node import DriverInfo
from vcnode.models.pod import (
    AgentConfig,
    AgentType,
    Cmd,
    ContainerResources,
    ContainerSpec,
    PodSpec,
)
from vcnode.models.probes import Probes
from vcnode.pods.policy import Denial, require
from vcnode.settings import PolicySettings

PRIVILEGES = "privileges"
"""Capability of an agent: resource limits, capabilities and no_new_privileges of processes."""


def capabilities_of(info: DriverInfo, config: AgentConfig) -> Set[str]:
    """What an agent can do in a pod of that configuration."""
    found = set(info.capabilities)
    if info.type == AgentType.HYPERSTART and config.hyperstart.dialect == "clearcontainers":
        found.add(PRIVILEGES)
    return found


def check_container(spec: ContainerSpec, info: DriverInfo, config: AgentConfig, where: str) -> None:
    """See that the agent can do what a container wants.

    Raises:
        UnsupportedError: It cannot; names the field, which begins with *where*.
    """
    _check(_of_container(spec), info, config, where)


def check_cmd(cmd: Cmd, info: DriverInfo, config: AgentConfig, where: str) -> None:
    """The same for a command."""
    _check(_of_cmd(cmd), info, config, where)


def check_pod(spec: PodSpec, info: DriverInfo) -> None:
    """The same for what a pod itself wants."""
    if spec.on_disconnect.action != "keep":
        _check([("on_disconnect.action", "watchdog")], info, spec.agent_config, "pod")


def check_policy(info: DriverInfo, config: AgentConfig, policy: PolicySettings, where: str) -> None:
    """See that the agent can keep containers to the capabilities that the node's policy allows.

    Raises:
        PermissionDeniedError: There is such a policy, and processes have all of them.
    """
    if policy.capabilities is not None and PRIVILEGES not in capabilities_of(info, config):
        message = f"processes have all capabilities in guests with agent_type {info.type}"
        require([Denial("policy.capabilities", where, message)])


def _check(wanted: Iterable[tuple[str, str]], info: DriverInfo, config: AgentConfig, where: str) -> None:
    has = capabilities_of(info, config)
    for name, capability in wanted:
        if capability not in has:
            field = f"{where}.{name}"
            raise UnsupportedError(f"{field}: agent_type {info.type} cannot do that.", field=field)


def _of_container(spec: ContainerSpec) -> Iterator[tuple[str, str]]:
    """Fields that are set, and the capabilities that they need."""
    if spec.image is not None:
        yield "image", "images"
    if spec.readonly_rootfs:
        yield "readonly_rootfs", "readonly"
    if spec.resources != ContainerResources():
        yield "resources", "limits"
    if spec.secrets:
        yield "secrets", "secrets"
    if spec.mounts:
        yield "mounts", "mounts"
    if spec.probes != Probes():
        yield "probes", "probes"
    for name, capability in _of_cmd(spec.cmd):
        yield f"cmd.{name}", capability


def _of_cmd(cmd: Cmd) -> Iterator[tuple[str, str]]:
    if cmd.rlimits:
        yield "rlimits", PRIVILEGES
    if cmd.capabilities is not None:
        yield "capabilities", PRIVILEGES
    if cmd.no_new_privileges and "no_new_privileges" in cmd.model_fields_set:
        yield "no_new_privileges", PRIVILEGES
