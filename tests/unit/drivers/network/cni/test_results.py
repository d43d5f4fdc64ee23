"""What CNI plugins answer, of all versions, and what is no answer."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.drivers.network.cni import results

V031: dict[str, Any] = {
    "cniVersion": "0.3.1",
    "interfaces": [
        {"name": "cni0", "mac": "00:11:22:33:44:55"},
        {"name": "eth0", "mac": "02:11:22:33:44:55", "sandbox": "/run/netns/x"},
    ],
    "ips": [
        {"version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1},
        {"version": "6", "address": "fd00:1::5/64", "interface": 1},
        {"version": "4", "address": "10.1.0.1/16", "interface": 0},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00:1::1"}],
    "dns": {
        "nameservers": ["10.1.0.1", "bad"],
        "domain": "example.com",
        "search": ["a.b", ""],
        "options": ["ndots:2"],
    },
}


def parse(raw: object) -> results.Result:
    return results.parse_result(json.dumps(raw).encode())[1]


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_all_versions_become_one_model(version: str) -> None:
    result = parse(V031 | {"cniVersion": version})
    assert [ip.address for ip in result.addresses_of("eth0")] == ["10.1.0.5/16", "fd00:1::5/64"]
    assert result.routes is not None
    assert [(r.dst, r.gw) for r in result.routes] == [("0.0.0.0/0", None), ("::/0", "fd00:1::1")]
    assert result.dns is not None
    dns = result.dns.config()
    assert (dns.servers, dns.search, dns.options) == (("10.1.0.1",), ("example.com", "a.b"), ("ndots:2",))


def test_fields_of_1_1() -> None:
    result = parse(
        {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "eth0", "mtu": 1400, "sandbox": "/x", "socketPath": "", "pciID": ""}],
            "routes": [
                {
                    "dst": "10.0.0.0/8",
                    "gw": "",
                    "priority": 7,
                    "mtu": 1300,
                    "advmss": 1,
                    "table": 3,
                    "scope": 0,
                }
            ],
        }
    )
    assert result.interfaces is not None
    assert result.interfaces[0].mtu == 1400
    assert result.routes is not None
    assert (result.routes[0].gw, result.routes[0].priority) == (None, 7)


def test_null_is_as_good_as_absent() -> None:
    assert (
        parse({"cniVersion": "1.0.0", "interfaces": None, "ips": None, "routes": None, "dns": None}).ips
        is None
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "not a JSON object"),
        ({}, "cniVersion"),
        ({"cniVersion": "2.0.0"}, "its cniVersion is '2.0.0'"),
        ({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.300/8"}]}, r"ips\.0\.address"),
        ({"cniVersion": "1.0.0", "ips": [{"address": 7}]}, r"ips\.0\.address"),
        ({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.3/8", "interface": 0}]}, "not listed"),
        ({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.3/8"}] * 257}, "ips"),
        ({"cniVersion": "1.0.0", "interfaces": {"name": "x"}}, "interfaces"),
        ({"cniVersion": "1.0.0", "routes": [{"dst": "nowhere"}]}, r"routes\.0\.dst"),
        ({"cniVersion": "1.0.0", "routes": [{"dst": "0.0.0.0/0", "gw": "x"}]}, r"routes\.0\.gw"),
    ],
)
def test_nonsense_is_refused_in_words(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(raw)


@pytest.mark.parametrize("data", [b"", b"null", b"{", b"\xff\xfe", b"[" * 200_000, b'{"cniVersion": NaN}'])
def test_bytes_that_are_no_result(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        results.parse_result(data)


leaves = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1.5,
        "",
        "eth0",
        "10.0.0.1",
        "10.0.0.1/8",
        "::/0",
        "fe80::1%eth0/64",
        "\0",
        [],
        {},
    ]
)
json_values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.sampled_from(["name", "0"]), leaves)
fields = st.sampled_from(
    ["address", "gateway", "interface", "name", "sandbox", "mac", "dst", "gw", "nameservers"]
)
entries = st.lists(st.dictionaries(fields, json_values, max_size=4), max_size=3)


@given(
    st.fixed_dictionaries(
        {"cniVersion": st.sampled_from(["0.3.1", "1.1.0", "7"])},
        optional={
            "interfaces": entries | json_values,
            "ips": entries | json_values,
            "routes": entries | json_values,
            "dns": st.dictionaries(fields, json_values, max_size=3) | json_values,
        },
    )
)
def test_any_json_is_a_result_or_refused(raw: dict[str, Any]) -> None:
    try:
        _, result = results.parse_result(json.dumps(raw).encode())
    except ValueError:
        return
    result.addresses_of("eth0")
    if result.dns is not None:
        result.dns.config()


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_or_taken(data: bytes) -> None:
    results.parse_failure(data)
    for parser in (results.parse_result, results.parse_spoken):
        with contextlib.suppress(ValueError):
            parser(data)


def test_failure_of_a_plugin_is_one_bounded_line() -> None:
    failure = results.parse_failure(
        b'{"code": 7, "msg": "bad\\u0007\\nthing", "details": "' + b"x" * 5000 + b'"}'
    )
    assert failure is not None
    assert failure.code == 7
    assert failure.words.startswith("bad thing; xxx")
    assert len(failure.words) <= results.MAX_WORDS + 1
    assert results.parse_failure(b'{"msg": "no code"}') is None


def test_versions_that_a_plugin_speaks() -> None:
    assert results.parse_spoken(b'{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}') == (
        "0.4.0",
        "1.0.0",
    )
    with pytest.raises(ValueError, match="supportedVersions"):
        results.parse_spoken(b'{"cniVersion": "1.0.0"}')
