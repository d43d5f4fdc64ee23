"""vcnode.drivers.hypervisor.qemu.hugepages."""

from __future__ import annotations

from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import hugepages
from vcnode.errors import ResourceExhaustedError, UnsupportedError

MEMINFO = """\
MemTotal: 100 kB
HugePages_Free: {free}
HugePages_Rsvd: 10
Hugepagesize: 2048 kB
"""


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "meminfo"
    monkeypatch.setattr(hugepages, "MEMINFO", path)
    return path


def test_enough_is_what_is_free_and_promised_to_nobody(meminfo: Path):
    meminfo.write_text(MEMINFO.format(free=138))
    hugepages.require(256)
    assert hugepages.page_mib() == 2
    with pytest.raises(ResourceExhaustedError, match="257 MiB of huge pages are needed and 256 MiB are free"):
        hugepages.require(257)


def test_a_kernel_without_huge_pages(meminfo: Path):
    meminfo.write_text("MemTotal: 100 kB\n")
    with pytest.raises(UnsupportedError):
        hugepages.require(1)
