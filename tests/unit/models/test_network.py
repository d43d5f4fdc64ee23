import json

import pytest
from pydantic import ValidationError

from vcnode.models.network import NetworkConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"networks": ["blue", "blue"]},
        {"networks": ["Blue"]},
        {"ports": [{"host": 80, "container": 1}, {"host": 80, "container": 2}]},
        {"ports": [{"host": 0, "container": 1}]},
        {"ports": [{"host": 80, "container": 1, "protocol": "sctp"}]},
        {"rate_mbit": {"ingress": 0}},
        {"rate_mbit": 10},
        {"interworking": "vhost"},
        {"netns_path": "relative"},
        {"dns": {"servers": ["name"]}},
        {"dns": {"search": ["a b"]}},
        {"dns": {"hosts": {"db": "x"}}},
        {"bridge": "br0"},
    ],
)
def test_a_wrong_network_is_refused(wrong):
    with pytest.raises(ValidationError):
        NetworkConfig.model_validate_json(json.dumps(wrong))


def test_the_same_port_of_two_protocols_is_fine():
    config = NetworkConfig.model_validate_json(
        '{"ports": [{"host": 53, "container": 53}, {"host": 53, "container": 53, "protocol": "udp"}],'
        ' "interworking": "macvtap", "dns": {"servers": ["fd00:0::1"]}}'
    )
    assert config.dns.servers == ("fd00::1",)
