"""What can never start is refused when it is created."""

from __future__ import annotations

import pytest

from tests.unit.pods.world import pod
from vcnode.errors import InvalidArgumentError
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.network import NetworkModel
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType, SshdConfig
from vcnode.pods import admission


def test_what_can_only_boot_cannot_require_a_template() -> None:
    spec = pod(template="require", hypervisor_config=HypervisorConfig(cpu_model="max"))
    hypervisor = DriverInfo(type="mock", capabilities=())
    with pytest.raises(InvalidArgumentError, match=r"^pod\.template: cannot be 'require'"):
        admission._check_boots(spec, AgentType.MOCK, hypervisor)
    admission._check_boots(spec.model_copy(update={"template": "auto"}), AgentType.MOCK, hypervisor)


def test_an_agent_over_the_network_needs_one() -> None:
    spec = pod(agent_type=AgentType.SSHD)
    with pytest.raises(InvalidArgumentError, match=r"^pod\.network_model: gives the guest no address"):
        admission._check_reachable(spec, AgentType.SSHD, NetworkModel.NOOP)
    admission._check_reachable(spec, AgentType.SSHD, NetworkModel.BRIDGE)
    known = spec.model_copy(update={"agent_config": AgentConfig(sshd=SshdConfig(server="10.0.0.2"))})
    admission._check_reachable(known, AgentType.SSHD, NetworkModel.NOOP)
