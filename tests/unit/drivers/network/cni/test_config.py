"""Configurations of CNI networks: read, checked, and turned into what plugins get."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.drivers.network.cni import config
from vcnode.errors import NetworkError


def listed(**changes: Any) -> dict[str, Any]:
    plugins = [{"type": "bridge", "x": 1}, {"type": "portmap", "capabilities": {"portMappings": True}}]
    return {"name": "n", "cniVersion": "1.0.0", "plugins": plugins} | changes


def parse(conf: object) -> config.Network:
    return config.parse(json.dumps(conf).encode())


def test_single_configuration_is_a_list_of_one() -> None:
    network = parse({"name": "n", "cniVersion": "0.3.1", "type": "bridge"})
    assert [p.type for p in network.plugins] == ["bridge"]
    assert network.versions == ("0.3.1",)


def test_newest_version_that_the_configuration_allows_comes_first() -> None:
    network = parse(listed(cniVersion="0.4.0", cniVersions=["1.1.0", "0.4.0", "9.0.0"]))
    assert network.versions == ("1.1.0", "0.4.0")
    spoken = {"bridge": ["0.3.1", "0.4.0", "1.0.0"], "portmap": ["0.4.0"]}
    assert config.agree(network, spoken) == "0.4.0"


def test_versions_that_do_not_meet_are_told() -> None:
    network = parse(listed())
    with pytest.raises(NetworkError, match=r"wants version 1.0.0; bridge speaks 0.4.0; portmap speaks none"):
        config.agree(network, {"bridge": ["0.4.0"], "portmap": []})


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ([], "not a JSON object"),
        (listed(name="a/b"), "'name'"),
        (listed(name=7), "'name'"),
        (listed(cniVersion="0.2.0"), "'cniVersion' must be one of 0.3.1"),
        (listed(cniVersion=None), "'cniVersion'"),
        (listed(plugins=[]), "'plugins'"),
        (listed(plugins=[{"type": "x"}] * 33), "'plugins'"),
        (listed(plugins={"type": "x"}), "'plugins'"),
        (listed(plugins=["x"]), "'type'"),
        (listed(plugins=[{"type": "../../bin/sh"}]), "'type'"),
        (listed(plugins=[{"type": ".."}]), "'type'"),
    ],
)
def test_what_is_wrong_is_told(conf: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(conf)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|not JSON"):
        config.parse(b'{"name":' + b"[" * 200_000)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_network_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        config.parse(data)


def test_plugin_gets_name_version_and_what_it_declares() -> None:
    network = parse(listed(cniVersions=["1.0.0"]))
    runtime = {"portMappings": [{"hostPort": 1}], "bandwidth": {}}
    bridge, portmap = network.plugins
    assert config.configure(network, bridge, "1.0.0", runtime=runtime) == {
        "type": "bridge",
        "x": 1,
        "name": "n",
        "cniVersion": "1.0.0",
    }
    conf = config.configure(network, portmap, "1.0.0", runtime=runtime, previous={"ips": []})
    assert conf["runtimeConfig"] == {"portMappings": [{"hostPort": 1}]}
    assert conf["prevResult"] == {"ips": []}
    assert "runtimeConfig" not in portmap.conf


def test_capability_that_is_false_is_not_declared() -> None:
    plugin = parse(listed(plugins=[{"type": "x", "capabilities": {"a": False, "b": 1, "c": True}}])).plugins[
        0
    ]
    assert plugin.capabilities == {"c"}


def test_kept_network_is_the_same_again() -> None:
    network = parse(listed(disableCheck="true", disableGC=True, cniVersions=["0.4.0"]))
    assert config.from_json(json.loads(json.dumps(network.dump()))) == network
    assert network.disable_check
    assert network.disable_gc


def test_directory_is_read_in_order_and_bad_files_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "20-b.conflist").write_text(json.dumps(listed(name="b")))
    (tmp_path / "10-a.conf").write_text(json.dumps({"name": "a", "cniVersion": "0.4.0", "type": "ptp"}))
    (tmp_path / "30-b.json").write_text(json.dumps(listed(name="b", plugins=[{"type": "other"}])))
    (tmp_path / "05-bad.conflist").write_text("{")
    (tmp_path / "06-dir.conflist").mkdir()
    (tmp_path / "07-gone.conflist").symlink_to("nowhere")
    (tmp_path / "08-big.conf").write_bytes(b" " * (config.MAX_FILE_BYTES + 1))
    (tmp_path / "readme.txt").write_text("not one")
    found = config.load(tmp_path)
    assert [network.name for network in found.networks] == ["a", "b"]
    assert found.find(None).name == "a"
    assert found.find("b").plugins[0].type == "bridge"
    assert [problem.partition(": ")[2] for problem in found.problems] == [
        "not JSON.",
        "not a file.",
        "not a file.",
        f"larger than {config.MAX_FILE_BYTES} bytes.",
        "there is a network b in a file before it.",
    ]
    with pytest.raises(NetworkError, match="no CNI network c; configured: a, b"):
        found.find("c")


def test_directory_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    found = config.load(tmp_path / "none")
    with pytest.raises(NetworkError, match=r"configured: none. .*cannot be read: No such file"):
        found.find(None)
