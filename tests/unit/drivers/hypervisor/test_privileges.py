"""A user for each VM, without any right."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vcnode.drivers.hypervisor.qemu import privileges
from vcnode.drivers.hypervisor.qemu.files import VmFiles
from vcnode.errors import FailedPreconditionError, HypervisorError, ResourceExhaustedError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, ContainerSpec, HypervisorType, PodSpec, PodState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import VmRecord
from vcnode.models.volumes import Volume
from vcnode.pods.shares import check_can_share, shares_host_dirs

BASE = 2_000_000_000
POD = PodRecord(
    pod_id="p1",
    spec=PodSpec(id="p1"),
    hypervisor_type=HypervisorType.QEMU,
    agent_type=AgentType.NATIVE,
    network_model=NetworkModel.NOOP,
    state=PodState.RUNNING,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)


def test_users_are_distinct_and_follow_from_the_vm() -> None:
    first = privileges.choose("vm-a", BASE, 4, ())
    assert privileges.choose("vm-a", BASE, 4, ()) == first
    taken: set[int] = set()
    for _ in range(4):
        taken.add(privileges.choose("vm-a", BASE, 4, taken))
    assert taken == set(range(BASE, BASE + 4))
    with pytest.raises(ResourceExhaustedError, match="All 4 user ids"):
        privileges.choose("vm-a", BASE, 4, taken)


def test_processes_show_who_has_an_id() -> None:
    assert os.geteuid() in privileges.users()


@pytest.mark.root
@pytest.mark.parametrize(("groups", "shown"), [((), ""), ((4_321,), "4321 ")])
def test_what_is_started_has_nothing_left(groups: tuple[int, ...], shown: str) -> None:
    argv = [*privileges.prefix(privileges.find_setpriv(), BASE, groups), "cat", "/proc/self/status"]
    done = subprocess.run(argv, capture_output=True, check=True, text=True)
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["Uid"].split() == lines["Gid"].split() == [str(BASE)] * 4
    assert lines["Groups"].strip(" \t") == shown.strip()
    assert {int(lines[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert lines["NoNewPrivs"].strip() == "1"


def test_a_host_without_setpriv_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HypervisorError, match="util-linux"):
        privileges.find_setpriv()


def test_kvm_is_opened_through_its_group_only_where_that_is_needed(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    for mode, groups in ((0o660, [device.stat().st_gid]), (0o666, []), (0o600, [])):
        device.chmod(mode)
        assert privileges.kvm_groups(device) == groups
    assert privileges.kvm_groups(tmp_path / "none") == []


def test_files_must_be_readable_for_all(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_text("x")
    os.close(privileges.open_for_all(file))
    file.chmod(0o600)
    with pytest.raises(HypervisorError, match="chmod"):
        privileges.open_for_all(file)


@pytest.mark.root
def test_a_user_may_go_through_its_directory_and_open_its_fifos(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("not yours")
    (tmp_path / "note").chmod(0o600)
    VmFiles(tmp_path).make_fifos(BASE)
    script = (
        "test -w console.in && test -r console.out && ! cat note 2>/dev/null && ! touch x 2>/dev/null && ! ls"
    )
    argv = [*privileges.prefix(privileges.find_setpriv(), BASE, ()), "sh", "-c", script]
    assert subprocess.run(argv, cwd=tmp_path, capture_output=True).returncode == 0


def test_a_directory_of_the_host_is_refused_to_a_vm_without_rights() -> None:
    record = VmRecord(vm_id="vm-1", uuid="u", directory="/d", type=HypervisorType.QEMU, uid=BASE)
    spec = ContainerSpec.model_validate({"id": "c", "rootfs": "/srv/a", "cmd": {"args": ("a",)}})
    container = ContainerRecord.model_validate({"spec": spec, "created_at": "2026-01-01T00:00:00Z"})
    pod = POD
    with pytest.raises(FailedPreconditionError, match="stop and start"):
        check_can_share(record, container, pod)
    check_can_share(record.model_copy(update={"uid": None}), container, pod)


def test_so_is_a_volume_that_is_one() -> None:
    record = VmRecord(vm_id="vm-1", uuid="u", directory="/d", type=HypervisorType.QEMU, uid=BASE)
    pod = POD.model_copy(update={"volumes": (Volume(mount_tag="v", host_path="/srv/v"),)})
    mounts = ({"source": "v", "destination": "/v"},)
    spec = ContainerSpec.model_validate({"id": "c", "image": "i", "mounts": mounts})
    container = ContainerRecord.model_validate({"spec": spec, "created_at": "2026-01-01T00:00:00Z"})
    with pytest.raises(FailedPreconditionError, match="/srv/v"):
        check_can_share(record, container, pod)
    assert shares_host_dirs(pod)
    disk = pod.model_copy(update={"volumes": (Volume(mount_tag="v", device="/srv/v", fs="ext4"),)})
    check_can_share(record, container, disk)
    assert not shares_host_dirs(disk)
