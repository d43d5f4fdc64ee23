"""The mock hypervisor: the whole life of VMs without a VM."""

from vcnode.drivers.hypervisor.mock.driver import MockHypervisor, MockVm
from vcnode.drivers.hypervisor.mock.world import MockMachine, MockWorld

__all__ = ["MockHypervisor", "MockMachine", "MockVm", "MockWorld"]
