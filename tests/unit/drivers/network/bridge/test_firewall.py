import ipaddress
import json

import pytest

from tests.support.netns import private_network
from vcnode.drivers.network.bridge import firewall
from vcnode.drivers.network.bridge.firewall import Nft, Published
from vcnode.drivers.network.ipam import Subnets
from vcnode.errors import NetworkError
from vcnode.models.network import Endpoint, NetworkConfig, NetworkModel, PortMapping
from vcnode.models.vm import NetworkAttachment

SUBNETS = Subnets(ipaddress.IPv4Network("10.119.0.0/16"), ipaddress.IPv6Network("fd00::/64"))
ATTACHMENT = NetworkAttachment(
    model=NetworkModel.BRIDGE,
    vm_id="vm-1234567890ab",
    config=NetworkConfig(
        ports=(PortMapping(host=8080, container=80), PortMapping(host=53, container=53, protocol="udp"))
    ),
    endpoints=(Endpoint(id="x-0", name="eth0", mac="", addresses=("10.119.0.2/17", "fd00::2/113")),),
)


def test_ports_are_elements_that_name_their_vm():
    lines = firewall.publish("t", ATTACHMENT).splitlines()
    assert lines[0] == 'add element inet t tcp4 { 8080 comment "vm-1234567890ab" : 10.119.0.2 . 80 }'
    assert {line.split()[4] for line in lines} == {"tcp4", "tcp6", "udp4", "udp6"}
    assert firewall.publish("t", ATTACHMENT.model_copy(update={"config": NetworkConfig()})) == ""


def test_a_listing_is_read_with_and_without_comments():
    listing = {
        "nftables": [
            {"metainfo": {}},
            {"map": {"name": "tcp4", "elem": [[{"elem": {"val": 80, "comment": "vm-1"}}, "x"], [81, "x"]]}},
            {"map": {"name": "udp4"}},
        ]
    }
    assert firewall.parse(json.dumps(listing)) == [
        Published("tcp4", 80, "vm-1"),
        Published("tcp4", 81, ""),
    ]


@pytest.mark.root
async def test_the_kernel_takes_the_table_and_gives_its_ports_back():
    nft = Nft.find()
    assert nft is not None
    with private_network():
        for masquerade in (True, False):
            await nft.load(firewall.base("vcnode-x", "vb-x", SUBNETS, masquerade=masquerade), timeout_s=10)
        await nft.load(firewall.publish("vcnode-x", ATTACHMENT), timeout_s=10)
        published = await nft.published("vcnode-x", timeout_s=10)
        assert {(p.map, p.port) for p in published} == {
            ("tcp4", 8080),
            ("tcp6", 8080),
            ("udp4", 53),
            ("udp6", 53),
        }
        assert {p.vm_id for p in published} == {ATTACHMENT.vm_id}
        await nft.load(firewall.withdraw("vcnode-x", published), timeout_s=10)
        assert await nft.published("vcnode-x", timeout_s=10) == []
        for _ in range(2):
            await nft.drop("vcnode-x", timeout_s=10)
        assert await nft.published("vcnode-x", timeout_s=10) == []
        with pytest.raises(NetworkError, match="nftables refused"):
            await nft.load("add element inet vcnode-x tcp4 { 1 : 1.2.3.4 . 5 }\n", timeout_s=10)


async def test_a_program_that_is_not_there_is_an_error_of_ours():
    with pytest.raises(NetworkError, match="could not be executed"):
        await Nft("/nonexistent/nft").load("x", timeout_s=1)


async def test_a_program_that_hangs_is_killed(tmp_path):
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    with pytest.raises(NetworkError, match="not answered"):
        await Nft(str(program)).load("x", timeout_s=0.1)
