"""The systemd unit and the Dockerfile."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/vcnode.service"
CAPABILITIES = (
    "SYS_ADMIN NET_ADMIN NET_RAW SYS_CHROOT DAC_OVERRIDE DAC_READ_SEARCH CHOWN FOWNER FSETID MKNOD KILL "
    "SETUID SETGID SETPCAP SETFCAP SYS_PTRACE SYS_RESOURCE IPC_LOCK"
)
UNSETTABLE = (
    # Each of these makes a mount namespace. Source: systemd, src/core/execute.c, exec_needs_mount_namespace.
    "ProtectSystem ProtectHome ProtectProc ProtectControlGroups ProtectKernelTunables ProtectKernelModules "
    "ProtectKernelLogs PrivateTmp PrivateDevices PrivateMounts PrivateIPC ProcSubset RootDirectory "
    "ReadOnlyPaths InaccessiblePaths BindPaths TemporaryFileSystem "
    "ProtectHostname User DynamicUser PrivateUsers PrivateNetwork IPAddressDeny RestrictNamespaces "
    "DevicePolicy DeviceAllow ProtectClock MemoryDenyWriteExecute RestrictSUIDSGID "
    "NoNewPrivileges SystemCallFilter"
)
"""Options that are usual for services and wrong for this one."""


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    unit = tmp_path / "vcnode.service"
    # What it starts is not installed on this host.
    unit.write_text(
        re.sub("ExecStart=.*", "ExecStart=/bin/true", (ROOT / "deploy/systemd/vcnode.service").read_text())
    )
    result = subprocess.run(
        [analyze, "verify", unit], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in result.stderr.splitlines() if "vcnode.service" in line]
    assert ours == []


def test_pods_survive_a_restart_of_the_unit() -> None:
    text = (ROOT / "deploy/systemd/vcnode.service").read_text()
    for line in ("KillMode=process", "Delegate=yes", "RuntimeDirectoryPreserve=yes"):
        assert f"\n{line}\n" in text


def settings_of(section: str) -> dict[str, str]:
    """What the unit sets in one section."""
    _, _, rest = UNIT.read_text().partition(f"\n[{section}]\n")
    lines = rest.partition("\n[")[0].splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_unit_gives_up_what_it_can() -> None:
    service = settings_of("Service")
    assert service["CapabilityBoundingSet"].split() == [f"CAP_{name}" for name in CAPABILITIES.split()]
    assert service["RestrictAddressFamilies"].split() == [
        f"AF_{name}" for name in ("UNIX", "INET", "INET6", "NETLINK", "PACKET", "VSOCK")
    ]
    wanted = {
        "LockPersonality": "yes",
        "RestrictRealtime": "yes",
        "SystemCallArchitectures": "native",
        "KeyringMode": "private",
        "UMask": "0027",
        "StateDirectoryMode": "0750",
        "RuntimeDirectoryMode": "0750",
    }
    assert {name: service.get(name) for name in wanted} == wanted
    assert "AmbientCapabilities" not in service


def test_a_page_says_what_each_capability_of_the_unit_is_for() -> None:
    page = (ROOT / "docs/threat-model.md").read_text()
    assert [name for name in CAPABILITIES.split() if f"CAP_{name}" not in page] == []


@pytest.mark.parametrize("option", UNSETTABLE.split())
def test_what_would_break_pods_is_not_set_and_the_unit_says_so(option: str) -> None:
    assert option not in settings_of("Service")
    comments = [line for line in UNIT.read_text().splitlines() if line.startswith("#   ")]
    assert any(re.search(rf"\b{option}\b", line) for line in comments)


def test_what_the_image_copies_is_there() -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (ROOT / "deploy/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed
