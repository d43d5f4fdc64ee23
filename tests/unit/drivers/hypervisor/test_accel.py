"""vcnode.drivers.hypervisor.qemu.accel: KVM is believed only after a guest ran; the answer is remembered."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import accel, probe
from vcnode.drivers.hypervisor.qemu.accel import Build, Choice
from vcnode.errors import HypervisorError

VERSION = 'echo "QEMU emulator version 7.2.22 (Debian)"'


def fake_qemu(tmp_path: Path, probing: str) -> Path:
    """A QEMU that tells its version, counts its probes, and does as *probing* says."""
    path = tmp_path / "qemu"
    count = tmp_path / "count"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ {VERSION}; exit 0; }}\necho probe >> {count}\n{probing}\n'
    )
    path.chmod(0o755)
    return path


def probes(tmp_path: Path) -> int:
    count = tmp_path / "count"
    return len(count.read_text().splitlines()) if count.exists() else 0


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A /dev/kvm that opens, whatever this host has."""
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    monkeypatch.setattr(accel, "KVM_DEVICE", device)
    return device


async def choose(path: Path, wanted: str, state_dir: Path, *, timeout_s: float = 10) -> Choice:
    build = await accel.find_build(str(path))
    return await accel.choose(wanted, build, state_dir=state_dir, timeout_s=timeout_s)  # type: ignore[arg-type]


async def test_the_build_has_its_version(tmp_path: Path):
    build = await accel.find_build(str(fake_qemu(tmp_path, "")))
    assert (build.path, build.version) == (str(tmp_path / "qemu"), "7.2.22")


async def test_another_build_has_another_key(tmp_path: Path):
    path = fake_qemu(tmp_path, "exit 1")
    before = await accel.find_build(str(path))
    fake_qemu(tmp_path, "exit 22")
    assert (await accel.find_build(str(path))).key != before.key


async def test_a_missing_qemu_says_what_to_install():
    with pytest.raises(HypervisorError, match="qemu-system-x86"):
        await accel.find_build("no-such-qemu")


@pytest.mark.parametrize("script", ["exit 0", "echo hello"])
async def test_something_that_is_not_qemu_is_refused(tmp_path: Path, script: str):
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    with pytest.raises(HypervisorError, match="is not QEMU"):
        await accel.find_build(str(path))


async def test_kvm_that_runs_a_guest_is_used_and_remembered(tmp_path: Path, kvm: Path):
    path = fake_qemu(tmp_path, f"exit {probe.EXIT_CODE}")
    for wanted in ("auto", "auto", "kvm"):
        assert (await choose(path, wanted, tmp_path / "state")).accelerator == "kvm"
    assert probes(tmp_path) == 1


async def test_kvm_that_aborts_falls_back_and_says_why(tmp_path: Path, kvm: Path):
    path = fake_qemu(tmp_path, 'echo "failed to set MSR 0x10a" >&2; kill -ABRT $$')
    first = await choose(path, "auto", tmp_path / "state")
    assert first.accelerator == "tcg"
    assert "signal 6" in first.reason
    assert "failed to set MSR 0x10a" in first.reason
    again = await choose(path, "auto", tmp_path / "state")
    assert again.accelerator == "tcg"
    assert str(tmp_path / "state" / accel.MEMORY_FILE) in again.reason
    assert probes(tmp_path) == 1


async def test_kvm_that_spins_is_killed_at_the_deadline(tmp_path: Path, kvm: Path):
    path = fake_qemu(tmp_path, "exec sleep 1000")
    choice = await choose(path, "auto", tmp_path / "state", timeout_s=0.05)
    assert choice.accelerator == "tcg"
    assert "did not end within 0.05 s" in choice.reason


async def test_kvm_by_order_tries_again_and_fails_with_the_cure(tmp_path: Path, kvm: Path):
    path = fake_qemu(tmp_path, "exit 1")
    await choose(path, "auto", tmp_path / "state")
    with pytest.raises(HypervisorError, match=r"Set qemu\.accel to auto or tcg"):
        await choose(path, "kvm", tmp_path / "state")
    assert probes(tmp_path) == 2
    fake_qemu(tmp_path, f"exit {probe.EXIT_CODE}")
    assert (await choose(path, "kvm", tmp_path / "state")).accelerator == "kvm"


async def test_tcg_by_order_tries_nothing(tmp_path: Path, kvm: Path):
    assert (await choose(fake_qemu(tmp_path, "exit 1"), "tcg", tmp_path / "state")).accelerator == "tcg"
    assert probes(tmp_path) == 0


async def test_without_a_device_nothing_is_tried_or_remembered(tmp_path: Path, kvm: Path):
    kvm.unlink()
    choice = await choose(fake_qemu(tmp_path, "exit 33"), "auto", tmp_path / "state")
    assert choice.accelerator == "tcg"
    assert "There is no" in choice.reason
    assert probes(tmp_path) == 0
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", json.dumps({"key": "old"}).encode()])
async def test_a_memory_that_is_broken_or_of_another_boot_is_ignored(
    tmp_path: Path, kvm: Path, content: bytes
):
    (tmp_path / accel.MEMORY_FILE).write_bytes(content)
    path = fake_qemu(tmp_path, f"exit {probe.EXIT_CODE}")
    assert (await choose(path, "auto", tmp_path)).accelerator == "kvm"
    assert probes(tmp_path) == 1


async def test_a_state_directory_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, kvm: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "state").write_text("a file")
    path = fake_qemu(tmp_path, f"exit {probe.EXIT_CODE}")
    assert (await choose(path, "auto", tmp_path / "state")).accelerator == "kvm"
    assert "will be tried again" in caplog.text


@pytest.mark.vm
async def test_the_probes_guest_runs_on_the_real_qemu():
    build: Build = await accel.find_build("qemu-system-x86_64")
    assert await accel.try_accelerator("tcg", build.path, timeout_s=30) is None


def test_the_probes_guest_is_an_elf_file_with_a_pvh_entry():
    elf = probe.guest_elf()
    assert elf[:7] == b"\x7fELF\x01\x01\x01"
    assert struct.unpack_from("<I", elf, 24)[0] == probe.LOAD_ADDRESS
    assert struct.pack("<III4sI", 4, 4, 18, b"Xen\0", probe.LOAD_ADDRESS) in elf


@pytest.mark.parametrize(
    ("boots", "accelerator", "reason"),
    [
        ('echo vcnode-probe >"${console#file:}"', "kvm", "ran a test guest"),
        (
            "echo KVM internal error. Suberror: 1; exec sleep 100",
            "tcg",
            "did not come up within 1 s. It says: KVM int",
        ),
        ('echo panic >"${console#file:}"', "tcg", "The guest image under kvm ended too early"),
    ],
    ids=["boots", "hangs", "panics"],
)
async def test_kvm_must_boot_the_guest_image_too(
    tmp_path: Path, kvm: Path, monkeypatch: pytest.MonkeyPatch, boots: str, accelerator: str, reason: str
) -> None:
    """There are hosts where a few instructions run under KVM, and no kernel boots."""
    monkeypatch.setattr(accel, "GUEST_LIMIT_S", 1.0)
    find = 'for word; do [ "$before" = -serial ] && console=$word; before=$word; done'
    path = fake_qemu(tmp_path, f"{find}\n[ -z $console ] && exit {probe.EXIT_CODE}\n{boots}")
    files = tmp_path / "vmlinux", tmp_path / "initrd"
    build = await accel.find_build(str(path))
    for attempt in ("without an image", "with one", "again"):
        if attempt == "with one":
            for file in files:
                file.touch()
        choice = await accel.choose("auto", build, state_dir=tmp_path / "state", timeout_s=10, guest=files)
        if attempt == "without an image":
            assert choice.accelerator == "kvm"
        else:
            assert choice.accelerator == accelerator
            assert reason in choice.reason
    assert probes(tmp_path) == 3  # twice the few instructions, once the image
