"""Huge pages that an operator has set aside, of the host's default size. Source: Linux, hugetlbpage.rst."""

from __future__ import annotations

import re
from pathlib import Path

from vcnode.errors import ResourceExhaustedError, UnsupportedError

MEMINFO = Path("/proc/meminfo")


def _read(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", MEMINFO.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def page_mib() -> int:
    """Size of a huge page in MiB; 0 when the host's kernel has none."""
    return _read("Hugepagesize") // 1024


def require(mem_size_mib: int) -> None:
    """See that there are huge pages for a VM of that size.

    Raises:
        UnsupportedError: The host's kernel has none.
        ResourceExhaustedError: Too few are free.
    """
    page = page_mib()
    if not page:
        raise UnsupportedError("huge_pages: this host's kernel has no huge pages (CONFIG_HUGETLBFS).")
    free_mib = (_read("HugePages_Free") - _read("HugePages_Rsvd")) * page
    if free_mib < mem_size_mib:
        raise ResourceExhaustedError(
            f"huge_pages: {mem_size_mib} MiB of huge pages are needed and {free_mib} MiB are free; set more"
            " aside with 'sysctl vm.nr_hugepages'.",
            wanted_mib=mem_size_mib,
            available_mib=free_mib,
        )
