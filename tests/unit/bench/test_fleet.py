"""What `fleet` makes of the messages that it has counted."""

from __future__ import annotations

import math

import pytest

from bench.fleet import ACK_BYTES, Point, floor_placement, growth
from bench.traffic import Traffic, purpose_of


@pytest.mark.parametrize(
    ("subject", "purpose"),
    [
        ("vcnode.all.pod.bid.17", "call for bids"),
        ("vcnode.rpc.n1.pod.run", "pod.run"),
        ("vcnode.evt.n1.container.started.p1.main", "event"),
        ("$KV.vcnode-pods.n1.p1", "status of a pod"),
        ("$KV.vcnode-nodes.n1", "lease"),
        ("_INBOX.abc.def", "reply"),
        ("$JS.API.STREAM.INFO.KV_vcnode-nodes", "other"),
    ],
)
def test_every_message_has_a_purpose(subject: str, purpose: str) -> None:
    assert purpose_of(subject) == purpose


def test_the_floor_asks_as_often_and_as_much_as_placements_did() -> None:
    traffic = Traffic()
    for _ in range(2):  # placements
        traffic.note("vcnode.all.pod.bid.1", 100)
        for _ in range(3):
            traffic.note("_INBOX.a.b", 200)
        traffic.note("vcnode.rpc.n1.pod.run", 120)
        traffic.note("_INBOX.a.b", 200)
        for acknowledged in ("vcnode.evt.n1.pod.started.p1", "$KV.vcnode-pods.n1.p1", "$KV.vcnode-nodes.n1"):
            traffic.note(acknowledged, 1000)
            traffic.note("_INBOX.a.b", 200)
    assert floor_placement(traffic, 2) == {
        "requests": [(100, 200)] * 3 + [(120, 200), (1000, ACK_BYTES)],
        "puts": [1000],
    }


def test_growth_is_an_exponent() -> None:
    few, many = Point(100, rate=[50.0]), Point(10_000, rate=[5.0])
    assert growth([many, few]) == pytest.approx(0.5)
    assert not math.isnan(growth([few, Point(200, rate=[50.0])]))
