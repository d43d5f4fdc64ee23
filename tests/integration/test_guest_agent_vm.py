"""What the guest agent does that only a real guest has: disks, memory, clock, power, and the port itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest_client import GuestClient, GuestError, container, process
from tests.integration.guest_vm import GuestVm, guest_vm
from tests.support import leaks
from vcnode.guest import protocol

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

BOOT_S = 120.0


class Qmp:
    """As much of QMP as a test needs: one command after another, events skipped."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.file = self.sock.makefile("rwb")
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer

    def wait_event(self, name: str) -> None:
        while json.loads(self.file.readline()).get("event") != name:
            continue

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture(scope="module")
def vm(guest_image: Path) -> Iterator[GuestVm]:
    with guest_vm(guest_image) as found:
        leaks.expected_children.add(found.process.pid)
        GuestClient.connect(found.agent_socket, timeout_s=BOOT_S).close()
        yield found
        leaks.expected_children.discard(found.process.pid)


@pytest.fixture
def guest(vm: GuestVm) -> Iterator[GuestClient]:
    with GuestClient.connect(vm.agent_socket) as client:
        yield client
        for container_id in client.states():
            client.call("delete_container", container_id=container_id)


@pytest.fixture
def own_vm(guest_image: Path) -> Iterator[GuestVm]:
    """A VM that the test may end."""
    with guest_vm(guest_image) as found:
        GuestClient.connect(found.agent_socket, timeout_s=BOOT_S).close()
        yield found


# -- limits ----------------------------------------------------------------------------------------


def test_a_container_over_its_memory_limit_is_killed_and_it_is_said(guest: GuestClient) -> None:
    hog = "x=0123456789abcdef; while true; do x=$x$x; done"
    guest.create("hog", "sh", "-c", hog, resources={"mem_limit_mib": 16})
    guest.call("start_container", container_id="hog")
    ended = guest.event("container_exited", container_id="hog")
    assert (ended["exit_code"], ended["oom_killed"]) == (137, True)
    assert guest.states()["hog"]["oom_killed"] is True


def test_the_smallest_memory_limit_still_starts_a_container(guest: GuestClient) -> None:
    guest.create("small", "sh", "-c", "echo fine; exit 4", resources={"mem_limit_mib": 4})
    guest.call("start_container", container_id="small")
    ended = guest.event("container_exited", container_id="small")
    assert (ended["exit_code"], ended["oom_killed"]) == (4, False)


def test_memory_that_runs_out_costs_who_takes_it_and_never_the_agent(own_vm: GuestVm) -> None:
    with GuestClient.connect(own_vm.agent_socket) as guest:
        of_all = (
            'cd /proc; for p in [0-9]*; do [ -n "$(cat $p/cmdline)" ] && cat $p/comm $p/oom_score_adj; done'
        )
        scores = guest.run("/bin/sh", "-c", of_all).text.split()
        assert scores.count("-1000") == 2, scores  # the agent and its forker
        assert scores[scores.index("sh") + 1] == "0", scores
        guest.create("hog", "sh", "-c", "while true; do tail /dev/zero; done")
        guest.call("start_container", container_id="hog")
        kills = 0
        while kills < 2:
            with contextlib.suppress(GuestError):  # there is no memory for it, or it is what was killed
                said = guest.run("/bin/grep", "oom_kill ", "/proc/vmstat").text.split()
                kills = int(said[1]) if said else kills
        assert guest.states()["hog"]["state"] == "running"


def test_a_fork_bomb_is_bounded_and_others_go_on(guest: GuestClient) -> None:
    guest.create(
        "bomb", "sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1000", resources={"pids_limit": 40}
    )
    guest.call("start_container", container_id="bomb")
    count = guest.run("/bin/sh", "-c", "cat /sys/fs/cgroup/containers/bomb/pids.current")
    assert 0 < int(count.text) <= 41
    # A command can still be run in it, and it can be deleted.
    assert guest.run("/bin/echo", "in", container_id="bomb").text == "in"
    guest.call("delete_container", container_id="bomb")
    assert guest.run("/bin/ls", "/sys/fs/cgroup/containers").text.count("bomb") == 0


def test_limits_are_in_the_cgroup(guest: GuestClient) -> None:
    limits = {
        "cpu_quota_us": 50_000,
        "cpu_period_us": 100_000,
        "cpu_shares": 1024,
        "mem_limit_mib": 32,
        "pids_limit": 10,
    }
    guest.create("limited", "true", resources=limits)
    names = "cpu.max cpu.weight memory.max memory.oom.group pids.max"
    found = guest.run("/bin/sh", "-c", f"cd /sys/fs/cgroup/containers/limited && cat {names}")
    assert found.text.splitlines() == ["50000 100000", "39", "33554432", "1", "10"]


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory, vm: GuestVm) -> Path:
    image = tmp_path_factory.mktemp("image") / "busybox.erofs"
    command = ["mkfs.erofs", str(image), str(vm.share / "busybox")]
    subprocess.run(command, check=True, capture_output=True)
    return image


@contextlib.contextmanager
def plugged(vm: GuestVm, image: Path, disk_id: str) -> Iterator[None]:
    """The image plugged in as a disk; it has to be free when it is unplugged."""
    qmp = Qmp(vm.qmp_socket)
    file = {"driver": "file", "filename": str(image)}
    try:
        qmp.call("blockdev-add", **{"driver": "raw", "node-name": disk_id, "read-only": True, "file": file})
        qmp.call(
            "device_add", driver="scsi-hd", id=f"dev-{disk_id}", bus="scsi0.0", drive=disk_id, serial=disk_id
        )
        yield
        qmp.call("device_del", id=f"dev-{disk_id}")
        qmp.wait_event("DEVICE_DELETED")
        qmp.call("blockdev-del", **{"node-name": disk_id})
    finally:
        qmp.close()


def test_an_image_is_the_root_under_a_writable_layer(guest: GuestClient, vm: GuestVm, erofs: Path) -> None:
    with plugged(vm, erofs, "d-one"):
        guest.create("image", "sleep", "1000", root={"disk_id": "d-one"})
        guest.call("start_container", container_id="image")
        found = guest.run("sh", "-c", "echo changed > /etc/passwd; cat /etc/passwd", container_id="image")
        assert found.text == "changed"
        assert guest.run("cat", "/proc/mounts", container_id="image").text.startswith("overlay / overlay rw")
        guest.call("delete_container", container_id="image")
        assert "sd" not in guest.run("/bin/ls", "/sys/block").text
    assert guest.run("/bin/cat", "/proc/mounts").text.count("/run/vcnode/") <= 1  # the share


def test_a_writable_layer_lasts_as_long_as_its_container(
    guest: GuestClient, vm: GuestVm, erofs: Path
) -> None:
    script = "test -e /mark && exit 9; touch /mark; exit 8"
    for disk_id in ("d-two", "d-three"):
        with plugged(vm, erofs, disk_id):
            guest.create("again", "sh", "-c", script, root={"disk_id": disk_id})
            for expected in (8, 9):
                guest.call("start_container", container_id="again")
                assert guest.event("container_exited", container_id="again")["exit_code"] == expected
            guest.call("delete_container", container_id="again")


def test_two_containers_share_a_disk(guest: GuestClient, vm: GuestVm, erofs: Path) -> None:
    with plugged(vm, erofs, "d-shared"):
        for name in ("first", "second"):
            guest.create(name, "sleep", "1000", root={"disk_id": "d-shared"})
            guest.call("start_container", container_id=name)
        guest.run("touch", "/only-first", container_id="first")
        guest.call("delete_container", container_id="first")
        assert "only-first" not in guest.run("ls", "/", container_id="second").text
        guest.call("delete_container", container_id="second")


def test_a_disk_that_comes_late_is_waited_for(guest: GuestClient, vm: GuestVm, erofs: Path) -> None:
    asked = guest.send("create_container", **container("late", "true", root={"disk_id": "d-late"}))
    guest.call("ping")
    with plugged(vm, erofs, "d-late"):
        guest.reply(asked)
        guest.call("delete_container", container_id="late")


def test_waiting_for_a_disk_ends_when_the_container_is_deleted(guest: GuestClient) -> None:
    asked = guest.send("create_container", **container("never", "true", root={"disk_id": "d-never"}))
    guest.call("delete_container", container_id="never")
    with pytest.raises(GuestError, match="not_found"):
        guest.reply(asked)
    assert guest.states() == {}
    assert guest.run("/bin/ls", "/sys/fs/cgroup/containers").text.count("never") == 0


def test_a_disk_that_is_no_file_system_leaves_nothing(
    guest: GuestClient, vm: GuestVm, tmp_path: Path
) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(os.urandom(1 << 20))
    with plugged(vm, garbage, "d-garbage"), pytest.raises(GuestError, match="internal"):
        guest.create("bad", "true", root={"disk_id": "d-garbage"})
    assert guest.states() == {}


# -- identity --------------------------------------------------------------------------------------


def configure(guest: GuestClient, **changed: Any) -> None:
    params = {
        "hostname": "pod-7",
        "time_ns": time.time_ns(),
        "entropy": base64.b64encode(os.urandom(64)).decode(),
        "machine_id": "0123456789abcdef" * 2,
        "interfaces": [],
    }
    guest.call("configure", **(params | changed))


def test_a_guest_takes_its_identity(guest: GuestClient) -> None:
    wanted = 1_900_000_000
    configure(guest, time_ns=wanted * 10**9)
    found = guest.run(
        "/bin/sh", "-c", "date +%s; hostname; cat /etc/machine-id /etc/hostname; cat /etc/hosts"
    )
    seconds, hostname, machine_id, from_file, *hosts = found.text.splitlines()
    assert wanted <= int(seconds) < wanted + 60
    assert (hostname, machine_id, from_file) == ("pod-7", "0123456789abcdef" * 2, "pod-7")
    assert "127.0.1.1\tpod-7" in hosts
    configure(guest)


@pytest.mark.parametrize(
    "changed",
    [
        {"hostname": "a b"},
        {"hostname": ""},
        {"hostname": "x" * 65},
        {"time_ns": -1},
        {"entropy": "!"},
        {"entropy": ""},
        {"machine_id": "XYZ"},
    ],
)
def test_a_bad_identity_is_refused(guest: GuestClient, changed: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match="invalid_argument"):
        configure(guest, **changed)


# -- the port --------------------------------------------------------------------------------------


def test_a_hang_up_ends_processes_and_keeps_containers(vm: GuestVm) -> None:
    with GuestClient.connect(vm.agent_socket) as first:
        first.create("stays", "sleep", "1000")
        first.call("start_container", container_id="stays")
        first.execute(process("sleep", "4321"), "stays")
    with GuestClient.connect(vm.agent_socket) as second:
        assert second.states()["stays"]["state"] == "running"
        assert "4321" not in second.run("ps", "-o", "args", container_id="stays").text
        second.call("delete_container", container_id="stays")


@pytest.mark.parametrize("length", [1, 11, 400])
def test_a_hang_up_in_the_middle_of_a_frame_is_overcome(vm: GuestVm, length: int) -> None:
    first = GuestClient.connect(vm.agent_socket)
    frame = protocol.encode_frame(protocol.REQUEST, 0, json.dumps({"id": 1, "pad": "x" * 1000}).encode())
    first.sock.setblocking(True)
    first.sock.sendall(frame[:length])
    first.close()
    with GuestClient.connect(vm.agent_socket) as second:
        assert second.call("ping") == {}


def test_many_reconnects_in_a_row(vm: GuestVm) -> None:
    for _ in range(10):
        with GuestClient.connect(vm.agent_socket) as client:
            assert client.call("ping") == {}


def test_a_lot_goes_through_the_port_both_ways_as_it_was(guest: GuestClient) -> None:
    """In BULK frames, out of the process's pipe without a copy; who does not read holds it up."""
    sent = random.Random(7).randbytes(3 << 20) + b"an odd end"
    started = guest.execute(process("busybox", "cat"))
    out = started.streams["stdout"]
    guest.hold_credit.add(out)
    guest.host.send_data(started.streams["stdin"], sent[: guest.host.window])
    guest.wait(lambda: len(started.output()) == guest.host.window, "a window of output")
    guest.call("ping")
    guest.hold_credit.clear()
    guest.host.consumed(out, guest.host.window)
    started.write(sent[guest.host.window :])
    started.close_stdin()

    assert started.finish().stdout == sent


def test_a_hang_up_in_the_middle_of_bulk_is_overcome(vm: GuestVm) -> None:
    with GuestClient.connect(vm.agent_socket) as client:
        started = client.execute(process("busybox", "sleep", "1000"))
        client.host.send_data(started.streams["stdin"], bytes(protocol.MAX_PAYLOAD))
        client.sock.setblocking(True)
        client.sock.sendall(client.host.data_to_send()[:20_000])
    with GuestClient.connect(vm.agent_socket) as client:
        flood = client.execute(process("busybox", "cat", "/dev/zero"))
        client.wait(lambda: len(flood.output()) > 1 << 20, "a flood")
    with GuestClient.connect(vm.agent_socket) as client:
        assert client.run("busybox", "echo", "well").text == "well"


def test_a_flood_that_nobody_reads_does_not_fill_the_guest(vm: GuestVm) -> None:
    with GuestClient.connect(vm.agent_socket) as client:
        for _ in range(8):
            client.execute(process("/bin/yes"))
        # From here on nothing is read: all of them stop for want of credit, or because the queue is full.
    with GuestClient.connect(vm.agent_socket) as client:
        free = client.run("/bin/grep", "MemAvailable", "/proc/meminfo").text
        assert int(free.split()[1]) > 80_000


def test_an_idle_guest_uses_no_cpu(vm: GuestVm) -> None:
    """The agent's own account: it is not scheduled at all while nothing happens."""
    switches = (
        "/bin/sh",
        "-c",
        "for p in /proc/[0-9]*; do test $(cat $p/comm) = init && cat $p/status; done | grep ctxt; true",
    )
    with GuestClient.connect(vm.agent_socket) as client:
        first = client.run(*switches).text
        idle = client.run("/bin/sleep", "2").exit_code
        second = client.run(*switches).text
    assert idle == 0

    def total(text: str) -> int:
        return sum(int(number) for number in re.findall(r":\s+(\d+)", text))

    # Three commands wake it some times each; a poll every 10 ms would be 200.
    assert total(second) - total(first) < 60


# -- the end ---------------------------------------------------------------------------------------


def test_shutdown_is_answered_and_ends_the_vm(own_vm: GuestVm) -> None:
    with GuestClient.connect(own_vm.agent_socket) as client:
        client.create("c", "sleep", "1000")
        client.call("start_container", container_id="c")
        assert client.call("shutdown") == {}
    assert own_vm.process.wait(timeout=20) == 0
    assert "vcnode-agent: died" not in own_vm.console.read_text()


def test_the_death_of_the_agent_is_said_and_ends_the_vm(own_vm: GuestVm) -> None:
    with GuestClient.connect(own_vm.agent_socket) as client:
        # The agent is the only child of process 1 called "init".
        script = (
            'for p in /proc/[0-9]*; do set -- $(cat $p/stat); test "$2 $4" = "(init) 1" && kill -9 $1; done'
        )
        client.send(
            "execute",
            container_id=None,
            process=process("/bin/sh", "-c", script, capabilities=["CAP_KILL"]),
            streams={"stdin": None, "stdout": None, "stderr": None},
        )
        client.flush()
        assert own_vm.process.wait(timeout=20) == 0
    assert f"vcnode-agent: died: signal {signal.SIGKILL}" in own_vm.console.read_text()
