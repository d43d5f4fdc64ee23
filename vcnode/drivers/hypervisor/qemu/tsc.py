"""The rate of the host's time stamp counter, which a guest under TCG must be told.

A guest kernel measures its TSC against the PIT. Under TCG on a busy host that measurement fails more often
than not, and on ``microvm`` with ACPI no other tick reaches the guest (QEMU 7.2 routes IRQ 0 nowhere), so
the kernel waits for ever, silently, before its console is up (seen in 2 of 3 boots). Under TCG the guest
reads the host's own counter, so the kernel parameter ``tsc_early_khz`` can say what the guest would have
measured.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""``rdtsc; shl $32, %rdx; or %rdx, %rax; ret``"""

MIN_BASELINE_S = 0.05
"""Time between two samples: the error of one is below 1 µs, so the rate is right to about 20 ppm."""


class Sample(NamedTuple):
    """The counter and the clock at one moment."""

    ticks: int
    clock_ns: int


def measure_khz() -> int | None:
    """Measure the rate in kHz; takes `MIN_BASELINE_S`. Blocking: call it in a thread.

    Returns:
        None where the counter cannot be read, or does not run at one rate: another architecture, a CPU
        without ``constant_tsc``, or a host that forbids executable anonymous memory.
    """
    if platform.machine() != "x86_64" or not _constant():
        return None
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_RDTSC)
            return _measure(page)
    except OSError:
        return None


def rate_khz(first: Sample, second: Sample) -> int:
    """The rate between two samples of increasing time."""
    return round((second.ticks - first.ticks) * 1_000_000 / (second.clock_ns - first.clock_ns))


def _measure(page: mmap.mmap) -> int:
    code = ctypes.c_char.from_buffer(page)
    try:
        rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        first = _sample(rdtsc)
        time.sleep(MIN_BASELINE_S)  # the baseline of a measurement, nothing is waited for
        return rate_khz(first, _sample(rdtsc))
    finally:
        del code  # the page can only be unmapped once nobody points into it


def _sample(rdtsc: Callable[[], int]) -> Sample:
    """The quickest of a few readings: one that was interrupted in between takes longer."""

    def reading() -> tuple[int, Sample]:
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = rdtsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        return after - before, Sample(ticks, (before + after) // 2)

    return min(reading() for _ in range(16))[1]


def _constant() -> bool:
    """Whether all counters of the host run at one rate and in sleep states as well."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
            return {"constant_tsc", "nonstop_tsc"} <= flags
    return False
