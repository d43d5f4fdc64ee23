import pytest

from vcnode.drivers.base import Network
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.errors import InvalidArgumentError, NetworkError
from vcnode.models.network import NetworkConfig, PortMapping, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest

REQUEST = NetworkRequest(pod_id="p", vm_id="vm-1")


async def test_it_makes_nothing_and_removes_nothing():
    network: Network = NoopNetwork()
    await network.open()
    planned = network.plan(REQUEST, ())
    attachment = await network.attach(planned, timeout_s=1)
    assert attachment is planned
    assert (attachment.netns_path, attachment.namespace, attachment.endpoints) == (None, None, ())
    assert list(await network.open_taps(attachment)) == []
    await network.recover(attachment, timeout_s=1)
    for _ in range(2):
        await network.detach(attachment, timeout_s=1)
    assert network.info.type == "noop"
    assert NetworkAttachment.model_validate_json(attachment.model_dump_json()) == attachment
    await network.close()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (NetworkConfig(networks=("blue",)), "pod.network.networks"),
        (NetworkConfig(netns_path="/run/netns/x"), "pod.network.netns_path"),
        (NetworkConfig(ports=(PortMapping(host=80, container=80),)), "pod.network.ports"),
        (NetworkConfig(rate_mbit=RateMbit(egress=1)), "pod.network.rate_mbit"),
    ],
    ids=["networks", "netns_path", "ports", "rate_mbit"],
)
def test_what_needs_an_interface_is_refused(config, field):
    with pytest.raises(InvalidArgumentError) as caught:
        NoopNetwork().check(config)
    assert caught.value.details["violations"][0]["field"] == field


@pytest.mark.parametrize("operation", ["attach", "open_taps", "detach", "prepare", "recover"])
async def test_planned_faults_happen(operation):
    network = NoopNetwork(FaultPlan.parse(f"network.{operation}:1=fail"))
    attachment = network.plan(REQUEST, ())
    call = {
        "prepare": network.prepare("vm-1", 0, timeout_s=1),
        "attach": network.attach(attachment, timeout_s=1),
        "open_taps": network.open_taps(attachment),
        "recover": network.recover(attachment, timeout_s=1),
        "detach": network.detach(attachment, timeout_s=1),
    }
    for name, work in call.items():
        if name == operation:
            with pytest.raises(NetworkError):
                await work
        else:
            await work
