from vcnode.drivers.network.bridge import names

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
