import pytest

from vcnode.drivers.base import Network
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.errors import NetworkError
from vcnode.models.vm import NetworkAttachment


async def test_it_makes_nothing_and_removes_nothing():
    network: Network = NoopNetwork()
    attachment = await network.attach("p", "vm-1", timeout_s=1)
    assert (attachment.netns_path, attachment.endpoints) == (None, ())
    assert list(await network.open_taps(attachment)) == []
    for _ in range(2):
        await network.detach(attachment, timeout_s=1)
    assert network.info.type == "noop"
    assert network.info.capabilities == ()
    assert NetworkAttachment.model_validate_json(attachment.model_dump_json()) == attachment


@pytest.mark.parametrize("operation", ["attach", "open_taps", "detach"])
async def test_planned_faults_happen(operation):
    network = NoopNetwork(FaultPlan.parse(f"network.{operation}:1=fail"))
    attachment = await NoopNetwork().attach("p", "vm-1", timeout_s=1)
    call = {
        "attach": network.attach("p", "vm-1", timeout_s=1),
        "open_taps": network.open_taps(attachment),
        "detach": network.detach(attachment, timeout_s=1),
    }
    for name, work in call.items():
        if name == operation:
            with pytest.raises(NetworkError):
                await work
        else:
            await work
