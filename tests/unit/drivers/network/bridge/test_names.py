import pytest

from vcnode.drivers.network.bridge import names
from vcnode.errors import FailedPreconditionError
from vcnode.models.network import Endpoint, NetworkModel
from vcnode.models.vm import NetworkAttachment

MARK = "vm-abcde"


def test_names_fit_and_lead_back_to_the_vm():
    vm_id = "vm-abcde1234567"
    for character in names.HOST_INTERFACES:
        name = names.host_interface(vm_id, character)
        assert len(name) == 15
        assert names.vm_of(name, MARK) == vm_id


def test_what_is_not_for_a_vm_of_the_node_is_told():
    bridges = [names.bridge(MARK, network) for network in (None, "blue", "x" * 64)]
    assert len(set(bridges)) == 3
    assert all(len(name) <= 15 and name.startswith(names.bridges(MARK)) for name in bridges)
    for name in (*bridges, "v0-fffff1234567", "veth0", "lo", "", "v0-abcde", "vm-abcde1234567"):
        assert names.vm_of(name, MARK) is None or name == "vm-abcde1234567"


def test_a_bridge_keeps_its_mac():
    assert names.bridge_mac("vb-abcde") == names.bridge_mac("vb-abcde") != names.bridge_mac("vb-abcdf")


def test_networks_whose_bridges_would_be_one_are_refused():
    """Otherwise who chooses a name chooses whose pods are reached."""
    mark = "vm-01234"
    found: dict[str, str] = {}
    pair: tuple[str, str] | None = None
    for number in range(1 << 16):
        name = f"n{number}"
        if (other := found.setdefault(names.bridge(mark, name), name)) != name:
            pair = (other, name)
            break
    assert pair is not None
    one, two = pair
    endpoint = Endpoint(id="x-0", name="eth0", mac="", network=one)
    held = [NetworkAttachment(model=NetworkModel.BRIDGE, vm_id="vm-1", endpoints=(endpoint,))]
    for wanted, others in (((two,), held), ((one, two), [])):
        with pytest.raises(FailedPreconditionError, match="choose another name"):
            names.check_networks(mark, wanted, others)
    names.check_networks(mark, (one,), held)
    names.check_networks(mark, ("n0", "n1"), held)
