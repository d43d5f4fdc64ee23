"""Which accelerator really runs guests on this host.

``/dev/kvm`` that opens proves nothing: there are hosts where it opens, tells its API version and creates a
VM, and then QEMU aborts with one CPU model and spins for ever with the others; and there are hosts where a
few instructions run, and a kernel does not get to the end of its boot. So ``auto`` runs a few instructions
(`probe`) under KVM with a deadline, and then boots the guest image; it remembers the answer for this boot of
the host, this QEMU, this ``/dev/kvm`` and this guest image.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vcnode.drivers.hypervisor.qemu import probe
from vcnode.drivers.hypervisor.qemu.machines import ARCHITECTURES, Architecture
from vcnode.drivers.hypervisor.qemu.process import spawn
from vcnode.errors import HypervisorError

log = logging.getLogger(__name__)

X86_64 = ARCHITECTURES["x86_64"]
KVM_DEVICE = Path("/dev/kvm")
MEMORY_FILE = "accelerator.json"
"""In the state directory."""
VERSION_LIMIT_S = 10.0
KILL_WAIT_S = 5.0
GUEST_LIMIT_S = 8.0
"""For a boot of the guest image under KVM, which takes a second."""
GUEST_WORD = "vcnode-probe"
GUEST_PARAMS = (
    "console=ttyS0 quiet panic=-1 reboot=t rdinit=/usr/bin/busybox -- "
    f'sh -c "echo {GUEST_WORD}; busybox reboot -f"'
)
"""The guest says a word, and ends."""

Accelerator = Literal["kvm", "tcg"]


@dataclass(frozen=True, slots=True)
class Build:
    """One build of QEMU."""

    path: str
    """Absolute, links resolved."""
    version: str
    """Such as ``7.2.22``."""
    key: str
    """Differs between any two builds."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The accelerator to use, and why."""

    accelerator: Accelerator
    reason: str
    """One sentence for the operator."""


async def find_build(binary: str, *, package: str = "qemu-system-x86") -> Build:
    """Find QEMU and ask for its version.

    Raises:
        HypervisorError: It is missing or does not run; says what to install.
    """
    path = shutil.which(binary)
    if path is None:
        raise HypervisorError(
            f"QEMU ({binary}) was not found; install it (Debian, Ubuntu: {package}) or set qemu.binary."
        )
    try:
        result = await asyncio.to_thread(
            subprocess.run,
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HypervisorError(f"{path} --version does not run.") from exc
    line = result.stdout.partition("\n")[0]
    found = re.search(r"version (\d+(?:\.\d+)+)", line)
    if found is None:
        raise HypervisorError(f"{path} --version answers {line[:80]!r}, which is not QEMU.")
    return _identify(path, found[1], line)


def _identify(path: str, version: str, line: str) -> Build:
    real = os.path.realpath(path)
    stat = os.stat(real)
    return Build(real, version, f"{line} {stat.st_size} {stat.st_mtime_ns}")


async def choose(
    wanted: Literal["auto", "kvm", "tcg"],
    build: Build,
    *,
    state_dir: Path,
    timeout_s: float,
    arch: Architecture = X86_64,
    guest: tuple[Path, Path] | None = None,
) -> Choice:
    """Choose the accelerator; with ``auto`` and ``kvm`` KVM is tried, unless the answer is remembered.

    Args:
        wanted: What the settings say.
        build: QEMU.
        state_dir: Where the answer is kept.
        timeout_s: For the test guest of a few instructions.
        arch: Of the host.
        guest: Kernel and initramfs of the guest image, which KVM must boot as well, if they are there.

    Raises:
        HypervisorError: ``kvm`` was asked for and does not work; says why.
    """
    if wanted == "tcg":
        return Choice("tcg", "TCG is used because the settings say so.")
    problem = kvm_unreachable()
    if problem is None:
        problem = await _remembered_problem(
            build, state_dir, timeout_s, arch, guest, ask_again=wanted == "kvm"
        )
    if problem is None:
        return Choice("kvm", "KVM ran a test guest.")
    if wanted == "kvm":
        raise HypervisorError(f"KVM cannot be used: {problem} Set qemu.accel to auto or tcg to run without.")
    return Choice("tcg", f"TCG is used, which is slow: {problem}")


def kvm_unreachable() -> str | None:
    """Why KVM cannot even be opened, as a sentence; None when it can, which proves nothing yet."""
    if not KVM_DEVICE.exists():
        return f"There is no {KVM_DEVICE} (no virtualization in the CPU or firmware, or no kvm module)."
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"{KVM_DEVICE} may not be opened by this user."
    return None


async def try_accelerator(
    accelerator: Accelerator, binary: str, *, timeout_s: float, arch: Architecture = X86_64
) -> str | None:
    """Boot the probe's guest under *accelerator*, as VMs are run.

    Returns:
        None when it ran, otherwise what happened, as a sentence. Nothing is left behind in any case.

    Raises:
        HypervisorError: QEMU could not be executed, or not be killed.
    """
    with tempfile.TemporaryDirectory(prefix="vcnode-probe-") as name:
        directory = Path(name)
        guest = directory / "guest"
        found = probe.of(arch.name)
        guest.write_bytes(found.guest)
        argv = probe_argv(accelerator, binary, guest, arch)
        in_time, exit_code, words = await _run(argv, directory, timeout_s)
    if not in_time:
        return f"The test guest under {accelerator} did not end within {timeout_s:g} s."
    if exit_code == found.exit_code:
        return None
    log.info("The test guest under %s ended with %s: %s", accelerator, exit_code, words)
    return f"The test guest under {accelerator} failed: {_how(exit_code)}{_quote(words)}"


async def try_guest_image(binary: str, kernel: Path, initrd: Path, *, timeout_s: float) -> str | None:
    """Boot the guest image under KVM until a program of it runs.

    Returns:
        None when one did, otherwise what happened, as a sentence. Nothing is left behind in any case.

    Raises:
        HypervisorError: QEMU could not be executed, or not be killed.
    """
    with tempfile.TemporaryDirectory(prefix="vcnode-probe-") as name:
        directory = Path(name)
        console = directory / "console"
        argv = [
            *(binary, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-machine", f"{X86_64.machines[0]},accel=kvm", "-cpu", "host", "-m", "256M"),
            *("-serial", f"file:{console}", "-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", GUEST_PARAMS),
        ]
        in_time, _, words = await _run(argv, directory, timeout_s)
        if console.exists() and GUEST_WORD in console.read_text(errors="replace").splitlines():
            return None
    how = "ended too early." if in_time else f"did not come up within {timeout_s:g} s."
    return f"The guest image under kvm {how}{_quote(words)}"


async def _run(argv: list[str], directory: Path, timeout_s: float) -> tuple[bool, int | None, str]:
    """Run QEMU for *timeout_s* at most; it is gone afterwards.

    Returns:
        Whether it ended in time, its exit code then, and what it wrote to its standard error.

    Raises:
        HypervisorError: It could not be executed, or not be killed.
    """
    with (directory / "stderr").open("wb+") as stderr:
        process = spawn(argv, stderr_fd=stderr.fileno(), fds=(), directory=directory)
        try:
            in_time = await process.ended_within(timeout_s)
            exit_code = await process.wait() if in_time else None
        finally:
            process.signal(signal.SIGKILL)
            ended = await process.ended_within(KILL_WAIT_S)
            process.release()
        if not ended:
            raise HypervisorError(f"The test guest's process {process.pid} survived SIGKILL.")
        stderr.seek(0)
        return in_time, exit_code, stderr.read(4096).decode("utf-8", "replace").strip()


def probe_argv(accelerator: Accelerator, binary: str, guest: Path, arch: Architecture = X86_64) -> list[str]:
    """The probe's command line: machine and CPU as in `argv`, and the device on which the guest ends."""
    return [
        *(binary, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", f"{arch.machines[0]},accel={accelerator}"),
        *("-cpu", "host" if accelerator == "kvm" else "max"),
        *("-m", "16M", "-kernel", str(guest)),
        *probe.of(arch.name).args,
    ]


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"QEMU was ended by signal {-exit_code}."
    return f"QEMU ended with code {exit_code}."


def _quote(words: str) -> str:
    line = words.partition("\n")[0][:160]
    return f" It says: {line}" if line else ""


async def _remembered_problem(
    build: Build,
    state_dir: Path,
    timeout_s: float,
    arch: Architecture,
    guest: tuple[Path, Path] | None,
    *,
    ask_again: bool,
) -> str | None:
    """Why KVM does not work, from the memory or by trying; *ask_again*: trust no bad news of the memory."""
    memory = state_dir / MEMORY_FILE
    bootable = guest if guest and arch is X86_64 and all(path.is_file() for path in guest) else None
    key = _key(build, bootable)
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(memory.read_text())
        if isinstance(kept, dict) and kept.get("key") == key:
            problem = kept.get("problem")
            if problem is None:
                return None
            if isinstance(problem, str) and not ask_again:
                return f"{problem} (Remembered; remove {memory} to try again.)"
    problem = await try_accelerator("kvm", build.path, timeout_s=timeout_s, arch=arch)
    if problem is None and bootable is not None:
        problem = await try_guest_image(build.path, *bootable, timeout_s=GUEST_LIMIT_S)
    try:
        write_memory(memory, key, problem)
    except OSError as exc:
        log.warning("Cannot write %s, so KVM will be tried again at the next start: %s", memory, exc)
    return problem


def write_memory(memory: Path, key: str, problem: str | None) -> None:
    """Keep the answer; the file is replaced as a whole. Raises OSError."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    fresh = memory.with_suffix(".tmp")
    fresh.write_text(json.dumps({"key": key, "problem": problem}, indent=1) + "\n")
    fresh.replace(memory)


def _key(build: Build, guest: tuple[Path, Path] | None) -> str:
    """Whatever changes this may change the answer: boot of the host, QEMU, kvm module, guest image."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    files = " ".join(f"{path} {path.stat().st_mtime_ns}" for path in guest or ())
    return f"{boot_id} {build.key} {KVM_DEVICE.stat().st_ctime_ns} {files}"
