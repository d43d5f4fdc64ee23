"""What a process takes of its host, from /proc."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import usage
from vcnode.drivers.hypervisor.qemu.cgroup import Cgroup
from vcnode.drivers.hypervisor.qemu.process import read_stat

MIB = 1 << 20


def mapping(start: int, size: int, permissions: str, pss_kib: int) -> str:
    return (
        f"{start:x}-{start + size:x} {permissions} 00000000 00:01 1234  /memfd:x (deleted)\n"
        f"Size: {size >> 10} kB\nRss: {pss_kib + 5} kB\nPss: {pss_kib} kB\nSwapPss: 7 kB\nVmFlags: rd wr\n"
    )


def test_the_guests_memory_is_told_from_the_rest_by_its_size() -> None:
    smaps = "".join(
        [
            mapping(0x1000, 128 * MIB, "rwxp", 100),  # translated code, by chance of the same size
            mapping(0x20000000, 128 * MIB, "rw-p", 4000),
            mapping(0x40000000, 128 * MIB, "rw-p", 30),
            mapping(0x60000000, 4096, "r--p", 2),
        ]
    )
    assert usage.proportional(smaps, 128 * MIB) == (4000 * 1024, 132 * 1024)
    assert usage.proportional(smaps, 64 * MIB) == (0, 4132 * 1024)
    assert usage.proportional("", 64 * MIB) is None


def measured(memory: bool = True, mem_size_mib: int = 3, **interfaces: str) -> usage.VmStats:
    stat = read_stat(os.getpid())
    assert stat is not None
    return usage.read(
        os.getpid(),
        stat.start_ticks,
        Cgroup(None),
        mem_size_mib=mem_size_mib,
        interfaces=interfaces,
        memory=memory,
    )


def test_memory_of_a_real_process_is_where_it_was_touched() -> None:
    before = measured()
    size, page_bytes = 77 * MIB, mmap.PAGESIZE
    with mmap.mmap(-1, size + 2 * page_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as guest:
        # Pages without access around it, as QEMU has them, or the kernel may join it with its neighbours.
        begin = ctypes.c_char.from_buffer(guest)
        for at in (ctypes.addressof(begin), ctypes.addressof(begin) + page_bytes + size):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at), page_bytes, 0) == 0
        del begin  # it can only be unmapped once nobody points into it
        for page in range(page_bytes, page_bytes + 8 * MIB, page_bytes):
            guest[page] = 1
        found = measured(mem_size_mib=77)
    assert found.guest_pss_bytes is not None
    assert 8 * MIB <= found.guest_pss_bytes < 10 * MIB  # huge pages round it up
    assert found.overhead_bytes is not None
    assert before.overhead_bytes is not None
    assert abs(found.overhead_bytes - before.overhead_bytes) < 4 * MIB
    assert found.pss_bytes == found.guest_pss_bytes + found.overhead_bytes
    assert found.resident_bytes > found.guest_pss_bytes
    assert found.cpu.usage_us > 0
    assert found.thread_count >= 1


def test_shares_are_looked_for_only_when_they_are_wanted() -> None:
    found = measured(memory=False)
    assert (found.pss_bytes, found.overhead_bytes) == (None, None)
    assert found.resident_bytes > 0


def test_interfaces_have_their_names_in_the_guest() -> None:
    (found,) = measured(lo="eth7").interfaces
    assert found.name == "eth7"
    assert found.received_bytes == found.sent_bytes


def test_a_process_that_is_gone_or_another_one_has_no_numbers() -> None:
    stat = read_stat(os.getpid())
    assert stat is not None
    with pytest.raises(usage.GoneError):
        usage.read(
            os.getpid(), stat.start_ticks + 1, Cgroup(None), mem_size_mib=1, interfaces={}, memory=False
        )
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(usage.GoneError):
        usage.read(child.pid, 1, Cgroup(None), mem_size_mib=1, interfaces={}, memory=False)


def test_the_cgroup_has_the_say_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 11\nuser_usec 5\nsystem_usec 6\n")
    (tmp_path / "memory.current").write_text("4096\n")
    stat = read_stat(os.getpid())
    assert stat is not None
    found = usage.read(
        os.getpid(), stat.start_ticks, Cgroup(tmp_path), mem_size_mib=1, interfaces={}, memory=False
    )
    assert (found.cpu.usage_us, found.cgroup_mem_bytes) == (11, 4096)
