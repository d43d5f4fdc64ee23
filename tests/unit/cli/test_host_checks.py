"""What ``vcnode doctor`` says of CNI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cni import Plugins, failure
from vcnode.cli.host_checks import check_cni, probes
from vcnode.models.network import NetworkModel
from vcnode.settings import CniSettings, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "net.d").mkdir()
    cni = CniSettings(conf_dir=tmp_path / "net.d", bin_dirs=(tmp_path / "bin",))
    return Settings(network=NetworkModel.CNI, state_dir=tmp_path / "state", cni=cni)


def configure(settings: Settings, name: str, *types: str) -> None:
    conf = {"cniVersion": "1.1.0", "name": name, "plugins": [{"type": kind} for kind in types]}
    (settings.cni.conf_dir / f"{name}.conflist").write_text(json.dumps(conf))


async def test_ready_networks_are_named(settings: Settings, tmp_path: Path) -> None:
    Plugins(tmp_path / "bin").write("good")
    configure(settings, "a", "good")
    configure(settings, "b", "good")
    finding = await check_cni(settings)
    assert (finding.level, finding.detail) == ("ok", "networks a, b; the first is the default")


async def test_what_is_wrong_with_one_is_a_warning(settings: Settings, tmp_path: Path) -> None:
    plugins = Plugins(tmp_path / "bin")
    plugins.write("good")
    plugins.write("busy", status=failure(50, "not now"))
    configure(settings, "a", "good")
    configure(settings, "b", "busy")
    configure(settings, "c", "missing")
    finding = await check_cni(settings)
    assert finding.level == "warn"
    assert "STATUS of CNI network b: plugin busy failed: not now." in finding.detail
    assert "plugin missing of network c is not installed" in finding.detail
    assert "containernetworking-plugins" in finding.mend


async def test_no_network_is_a_failure(settings: Settings) -> None:
    finding = await check_cni(settings)
    assert (finding.level, finding.detail) == ("fail", f"no network in {settings.cni.conf_dir}")


def test_only_nodes_that_use_cni_are_asked(settings: Settings) -> None:
    assert "cni" in dict(probes(settings))
    assert "cni" not in dict(probes(settings.model_copy(update={"network": NetworkModel.BRIDGE})))
