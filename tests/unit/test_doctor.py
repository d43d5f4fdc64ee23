import asyncio
import os
from pathlib import Path

import pytest

from vcnode import doctor
from vcnode.doctor import Finding, examine
from vcnode.errors import UnavailableError
from vcnode.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        node_name="n", state_dir=tmp_path / "s", run_dir=tmp_path / "r", allowed_roots=(tmp_path,)
    )


async def collect(settings, probes=()) -> dict[str, Finding]:
    return {finding.check: finding async for finding in examine(settings, probes)}


async def test_every_check_reports_once_and_every_complaint_says_what_to_do(settings):
    findings = [finding async for finding in examine(settings)]
    assert len({finding.check for finding in findings}) == len(findings) == 14
    for finding in findings:
        assert finding.detail
        assert bool(finding.mend) == (finding.level != "ok"), finding


async def test_examination_changes_nothing(settings, tmp_path):
    await collect(settings)
    assert list(tmp_path.iterdir()) == []


async def test_probes_come_last_and_cannot_break_the_examination(settings, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.05)

    async def good():
        return Finding("good", "ok", "fine")

    async def bad():
        raise UnavailableError("NATS does not answer; start it.")

    async def silent():
        await asyncio.Event().wait()

    found = await collect(settings, [("bad", bad), ("silent", silent), ("good", good)])
    assert list(found)[-3:] == ["bad", "silent", "good"]
    assert (found["bad"].level, found["bad"].detail) == ("fail", "NATS does not answer; start it.")
    assert found["silent"].level == "fail"
    assert found["silent"].mend


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (doctor.check_python((3, 11, 0)), "ok"),
        (doctor.check_python((3, 10, 9)), "fail"),
        (doctor.check_kernel("6.1.0-28-amd64"), "ok"),
        (doctor.check_kernel("5.14.0"), "ok"),
        (doctor.check_kernel("5.4.0-generic"), "fail"),
        (doctor.check_kernel("odd"), "fail"),
        (doctor.check_capabilities("CapPrm:\t0\nCapEff:\t000001ffffffffff\n"), "ok"),
        (doctor.check_capabilities("CapEff:\t0000000000000000\n"), "fail"),
        (doctor.check_capabilities(""), "fail"),
        (doctor.check_mkfs("/usr/bin/mkfs.erofs"), "ok"),
        (doctor.check_mkfs(None), "warn"),
        (doctor.check_memory("MemTotal: 9 kB\nMemAvailable:    9999999 kB\n"), "ok"),
        (doctor.check_memory("MemAvailable: 1024 kB\n"), "warn"),
        (doctor.check_memory(""), "warn"),
        (doctor.check_socket_path(Path("/run/vcnode")), "ok"),
        (doctor.check_socket_path(Path("/run/" + "x" * 80)), "fail"),
    ],
)
def test_levels(finding, level):
    assert finding.level == level


def test_missing_capabilities_are_named():
    assert "CAP_MKNOD" in doctor.check_capabilities("CapEff:\t00000000002010ff\n").detail


ANSWERS = (
    '[ "$1" = -machine ] && printf "Supported:\\n{}  x\\n" || echo "QEMU emulator version 7.2.22 (Debian)"'
)


class TestQemu:
    @pytest.fixture
    def qemu(self, tmp_path):
        def make(script: str) -> str:
            path = tmp_path / "qemu"
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
            return str(path)

        return make

    async def test_missing_binary(self):
        assert (await doctor.check_qemu("/nonexistent/qemu")).level == "fail"

    @pytest.mark.parametrize(
        ("script", "level"),
        [
            (
                ANSWERS.format("microvm"),
                "ok",
            ),
            (
                ANSWERS.format("pc"),
                "fail",
            ),
            ('echo "QEMU emulator version 5.2.0"', "fail"),
            ("echo something else", "fail"),
            ("exit 1", "fail"),
        ],
        ids=["good", "no microvm", "old", "no version", "broken"],
    )
    async def test_answers(self, qemu, script, level):
        assert (await doctor.check_qemu(qemu(script))).level == level

    async def test_one_that_never_answers_is_given_up(self, qemu, monkeypatch):
        monkeypatch.setattr(doctor, "_TOOL_TIMEOUT_S", 0.2)
        assert (await doctor.check_qemu(qemu("exec sleep 60"))).level == "fail"


class TestCgroup:
    LINE = "41 31 0:38 / {} rw,relatime - cgroup2 cgroup2 rw\n"
    V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"

    @pytest.mark.parametrize(
        ("controllers", "level", "detail"),
        [
            ("cpuset cpu io memory hugetlb pids rdma", "ok", ""),
            ("hugetlb", "warn", "lacks cpu, io, memory, pids"),
            ("cpu pids", "warn", "lacks io, memory"),
            ("", "warn", "lacks"),
        ],
    )
    def test_controllers(self, tmp_path, controllers, level, detail):
        (tmp_path / "cgroup.controllers").write_text(controllers + "\n")
        finding = doctor.check_cgroup(self.V1 + self.LINE.format(tmp_path))
        assert finding.level == level
        assert detail in finding.detail

    def test_not_mounted(self):
        assert doctor.check_cgroup(self.V1).level == "warn"

    def test_unreadable(self, tmp_path):
        assert doctor.check_cgroup(self.LINE.format(tmp_path / "gone")).level == "warn"


class TestDirectories:
    def test_one_that_will_be_made_is_judged_by_its_parent(self, tmp_path):
        assert doctor.check_directory("state-dir", tmp_path / "a" / "b", 1).level == "ok"

    def test_file_in_its_place(self, tmp_path):
        (tmp_path / "f").touch()
        assert doctor.check_directory("state-dir", tmp_path / "f" / "x", 1).level == "fail"

    def test_little_space(self, tmp_path):
        assert doctor.check_directory("state-dir", tmp_path, 2**62).level == "warn"

    def test_not_writable(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert doctor.check_directory("state-dir", tmp_path, 1).level == "fail"


class TestRoots:
    def test_none_there(self, tmp_path):
        assert doctor.check_roots([tmp_path / "a"]).level == "warn"
        assert doctor.check_roots([]).level == "warn"

    @pytest.mark.parametrize(
        ("inner", "outer", "level"), [(0o755, 0o755, "warn"), (0o700, 0o755, "ok"), (0o755, 0o700, "ok")]
    )
    def test_reach_of_other_users_counts_on_the_whole_way(self, monkeypatch, inner, outer, level):
        root = Path("/outer/inner")

        def stat(path, **_):
            mode = {"/outer/inner": inner, "/outer": outer}.get(str(path), 0o755)
            return os.stat_result((0o040000 | mode, *[0] * 9))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", stat)
            finding = doctor.check_roots([root])
        assert finding.level == level
        assert ("chmod" in finding.mend) == (level == "warn")
