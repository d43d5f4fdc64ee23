"""vcnode.drivers.hypervisor.qemu.tsc: the rate of the host's counter."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import tsc
from vcnode.drivers.hypervisor.qemu.tsc import Sample, measure_khz, rate_khz


def test_the_rate_between_two_samples():
    assert rate_khz(Sample(1_000, 500), Sample(1_000 + 2_400_000, 500 + 1_000_000)) == 2_400_000


def test_two_measurements_agree():
    first, second = measure_khz(), measure_khz()
    if first is None or second is None:
        pytest.skip("this host's counter cannot be measured")
    assert abs(first - second) / first < 1e-3


def test_another_architecture_has_no_such_counter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert measure_khz() is None


def test_a_counter_that_changes_its_rate_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu tsc constant_tsc\n")
    monkeypatch.setattr(tsc, "Path", lambda _: tmp_path / "cpuinfo")
    assert measure_khz() is None


def test_a_host_that_forbids_executable_memory(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(tsc.mmap, "mmap", refuse)
    assert measure_khz() is None
