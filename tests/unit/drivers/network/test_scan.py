"""Which interfaces can be wired to a VM together."""

from __future__ import annotations

import pytest

from vcnode.drivers.network.links import Link
from vcnode.drivers.network.scan import MAX_INTERFACES, Scanned, find_obstacle


def interface(index: int, *, mac: str = "02:00:00:00:00:01", **more: int) -> Scanned:
    link = {"kind": None, "loopback": False, "master": None, "alias": None} | more
    return Scanned(
        Link(index=index, name=f"eth{index}", mac=mac, mtu=1500, up=True, **link),  # type: ignore[arg-type]
        ("10.0.0.2/24",),
        (),
    )


def test_interfaces_side_by_side_can_be_wired() -> None:
    assert find_obstacle([interface(n) for n in range(MAX_INTERFACES)]) is None
    assert find_obstacle([interface(1), interface(2, lower=7), interface(3, master=8)]) is None


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ([interface(n) for n in range(MAX_INTERFACES + 1)], "more than 8 interfaces"),
        ([interface(1), interface(2, mac="")], "eth2, which is no Ethernet interface"),
        ([interface(1), interface(2, mac="00:00:00:00:00:00")], "eth2, which is no Ethernet interface"),
        ([interface(1), interface(2, lower=1)], "eth2 on top of eth1"),  # a VLAN
        ([interface(1, master=2), interface(2)], "eth2 on top of eth1"),  # a bond or a bridge
    ],
)
def test_what_cannot_be_wired_is_told(wanted: list[Scanned], problem: str) -> None:
    found = find_obstacle(wanted)
    assert found is not None
    assert problem in found
