"""The guest agent, driven frame by frame: in namespaces on this machine, and in a real VM.

What is plain Linux is tried in both places by the same tests; the rest only where it exists.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest_client import GuestClient, GuestError, container, process
from tests.integration.guest_here import guest_here
from tests.integration.guest_vm import guest_vm
from tests.support import leaks
from vcnode.guest import protocol


@dataclass
class Guest:
    """A guest and how to reach it; ``share`` is its 9p share, seen from the host."""

    client: GuestClient
    share: Path
    kind: str
    agent_pid: int


HERE = pytest.param("here", marks=pytest.mark.root)
VM = pytest.param("vm", marks=[pytest.mark.vm, pytest.mark.timeout(180)])


@contextlib.contextmanager
def lives_on(pid: int, client: GuestClient) -> Iterator[None]:
    """Tell the check for leaks that these outlive a test on purpose."""
    target = f"socket:[{os.fstat(client.sock.fileno()).st_ino}]"
    leaks.expected_children.add(pid)
    leaks.expected_descriptors.add(target)
    yield
    leaks.expected_children.discard(pid)
    leaks.expected_descriptors.discard(target)


@pytest.fixture(scope="module", params=[HERE, VM])
def shared_guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """One guest for the whole module: a boot costs seconds."""
    with contextlib.ExitStack() as stack:
        if request.param == "here":
            found, sock = stack.enter_context(guest_here())
            client = stack.enter_context(GuestClient(sock))
            client.start()
            guest = Guest(client, found.share, "here", found.pid)
            pid = found.pid
        else:
            vm = stack.enter_context(guest_vm(request.getfixturevalue("guest_image")))
            client = stack.enter_context(GuestClient.connect(vm.agent_socket, timeout_s=120))
            guest = Guest(client, vm.share, "vm", -1)
            pid = vm.process.pid
        stack.enter_context(lives_on(pid, client))
        yield guest


@pytest.fixture
def guest(shared_guest: Guest) -> Iterator[GuestClient]:
    """The client of the shared guest; a test has to leave no container, and its events are forgotten."""
    yield shared_guest.client
    for container_id in shared_guest.client.states():
        shared_guest.client.call("delete_container", container_id=container_id)
    shared_guest.client.events.clear()


@pytest.fixture
def box(guest: GuestClient) -> str:
    """A running container."""
    guest.create("box", "sleep", "1000")
    guest.call("start_container", container_id="box")
    return "box"


def refused(code: str, call: Any) -> str:
    with pytest.raises(GuestError) as caught:
        call()
    assert caught.value.code == code
    return caught.value.message


# -- processes that stand ready --------------------------------------------------------------------


def ready_pids(shared_guest: Guest) -> set[int]:
    """Have a process stand ready; where that can be seen, the agent's children are given."""
    guest = shared_guest.client
    guest.create("before", "true")
    guest.call("delete_container", container_id="before")
    if shared_guest.kind == "vm":
        return set()
    return set(
        map(
            int,
            Path(f"/proc/{shared_guest.agent_pid}/task/{shared_guest.agent_pid}/children")
            .read_text()
            .split(),
        )
    )


def surroundings(guest: GuestClient, container_id: str) -> list[str]:
    """What a container sees, with its own name and what the kernel counts taken out."""
    script = """
        sed -E 's/^[0-9]+ [0-9]+ [0-9:]+ //' /proc/self/mountinfo | sort
        busybox df /dev
        cat /proc/self/cgroup; hostname; ls -lR /dev | grep -v ' [0-9]*:'; ls /proc /sys; ulimit -a
        for space in cgroup ipc mnt net pid uts; do
            [ /proc/1/ns/$space -ef /proc/self/ns/$space ] || echo $space
        done
        echo > /proc/sys/kernel/hostname || mkdir /sys/fs/cgroup/x || cat /proc/kcore
    """
    said = guest.run("/bin/sh", "-c", script, container_id=container_id)
    numbers = re.sub(r"\b[0-9]{2,}\b", "N", said.stdout.decode() + said.stderr.decode())
    return numbers.replace(container_id, "X").splitlines()


def test_a_container_of_a_process_that_stood_ready_is_as_any_other(
    shared_guest: Guest, guest: GuestClient
) -> None:
    ready = ready_pids(shared_guest)
    pids = {}
    begun = time.time_ns() - 1_000_000_000  # the guest's clock may be a little behind
    for name in ("first", "other"):
        guest.create(name, "sleep", "1000", hostname="box")
        pids[name] = guest.call("start_container", container_id=name)["pid"]
    if ready:
        assert [pid in ready for pid in pids.values()] == [True, False]
    first, other = (surroundings(guest, name) for name in pids)
    assert len(first) > 50
    assert first == other
    (main,) = guest.call("list_processes", container_id="first", limit=9)["processes"]
    assert main["container_pid"] == 1
    if shared_guest.kind == "here":
        assert main["started_at_ns"] > begun


def test_a_process_that_stood_ready_has_no_directory_open(shared_guest: Guest, guest: GuestClient) -> None:
    for number in range(3, 13):
        ready_pids(shared_guest)
        guest.create("box", "true", workdir=f"/proc/self/fd/{number}")
        refused("invalid_argument", lambda: guest.call("start_container", container_id="box"))
        guest.call("delete_container", container_id="box")


@pytest.mark.parametrize("shared_guest", [HERE], indirect=True)
def test_a_container_starts_though_the_process_that_stood_ready_is_gone(
    shared_guest: Guest, guest: GuestClient
) -> None:
    ready = ready_pids(shared_guest)
    guest.create("probe", "sleep", "1000")
    pid = guest.call("start_container", container_id="probe")["pid"]
    assert pid in ready
    guest.call("delete_container", container_id="probe")
    (victim,) = ready_pids(shared_guest) - ready
    pidfd = os.pidfd_open(victim)
    os.kill(victim, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    guest.create("box", "echo", "here")
    assert guest.call("start_container", container_id="box")["pid"] != victim
    assert guest.event("container_exited", container_id="box")["exit_code"] == 0


# -- execute ---------------------------------------------------------------------------------------


def test_a_command_in_the_guest_itself_gives_output_and_exit_code(guest: GuestClient) -> None:
    found = guest.run("/bin/sh", "-c", "echo out; echo err >&2; exit 7")
    assert (found.exit_code, found.stdout, found.stderr) == (7, b"out\n", b"err\n")


def test_a_command_in_a_container_sees_the_container(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "hostname; cat /etc/passwd; pwd", container_id=box)
    assert found.stdout.startswith(b"box\nroot:x:0:0:root:/root:/bin/sh\nann:x:1000")
    assert found.stdout.endswith(b"\n/\n")


def test_the_main_process_is_process_1_and_the_guest_is_out_of_sight(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "ps -o pid,args; ls /; cat /proc/1/cmdline", container_id=box)
    lines = found.text.splitlines()
    assert lines[1].split(None, 1) == ["1", "sleep 1000"]
    assert "vcnode" not in found.text
    assert found.stdout.endswith(b"sleep\x001000\x00")


def test_every_byte_passes_in_both_directions(guest: GuestClient, box: str) -> None:
    sent = bytes(range(256)) * 8192  # 2 MiB: several windows
    assert guest.run("cat", container_id=box, stdin=sent).stdout == sent


def test_a_slow_reader_stops_its_process_only(guest: GuestClient, box: str) -> None:
    flood = guest.execute(process("yes"), box)
    guest.hold_credit.add(flood.streams["stdout"])
    guest.wait(lambda: len(flood.output()) == guest.host.window, "a full window")
    assert guest.run("echo", "still", "here", container_id=box).text == "still here"
    assert len(flood.output()) == guest.host.window
    flood.signal(signal.SIGKILL)
    guest.host.send_reset(flood.streams["stdout"])
    assert guest.event("process_exited", process_id=flood.process_id)["exit_code"] == 137


def test_what_is_left_in_the_pipe_comes_before_the_exit(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "head -c 60000 /dev/zero", container_id=box)
    assert len(found.stdout) == 60000


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "setsid sleep 500 & echo done", container_id=box)
    assert (found.exit_code, found.text) == (0, "done")


@pytest.mark.parametrize(
    ("args", "exit_code", "text"),
    [
        (["no-such-program"], 127, "vcnode: no-such-program: not found\n"),
        (["/etc/passwd"], 126, "vcnode: /etc/passwd: Permission denied\n"),
        (["/etc"], 126, "vcnode: /etc: Permission denied\n"),
        ([""], 127, "vcnode: : not found\n"),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
        (["sh", "-c", "exit 255"], 255, ""),
    ],
)
def test_exit_codes(guest: GuestClient, box: str, args: list[str], exit_code: int, text: str) -> None:
    found = guest.run(*args, container_id=box)
    assert (found.exit_code, found.stderr.decode()) == (exit_code, text)


def test_a_file_that_is_no_program_is_not_executable(
    guest: GuestClient, box: str, shared_guest: Guest
) -> None:
    script = shared_guest.share / "busybox/tmp/garbage"
    script.write_bytes(b"\x7fgarbage")
    script.chmod(0o755)
    assert guest.run("/tmp/garbage", container_id=box).exit_code == 126


def test_a_signal_reaches_the_whole_session_of_a_process(guest: GuestClient, box: str) -> None:
    # Job control puts the child into a process group of its own.
    started = guest.execute(process("sh", "-c", "set -m; sleep 987 & echo up; wait"), box)
    started.wait_for(b"up\n")
    started.signal(signal.SIGKILL)
    assert started.finish().exit_code == 137
    assert "987" not in guest.run("ps", "-o", "args", container_id=box).text


def test_a_process_that_does_not_read_gets_no_more_than_a_window(guest: GuestClient, box: str) -> None:
    started = guest.execute(process("sleep", "1000"), box)
    stream = started.streams["stdin"]
    credit = guest.host.credit(stream)
    assert guest.host.send_data(stream, bytes(2 * credit)) == credit
    guest.flush()
    guest.call("ping")
    # What the pipe holds is consumed, the rest waits in the agent.
    assert guest.host.credit(stream) <= credit // 2 + 65536
    started.signal(signal.SIGTERM)
    assert started.finish().exit_code == 143
    guest.wait(lambda: stream in guest.reset, "the reset of stdin")


def test_without_streams_a_process_has_dev_null(guest: GuestClient, box: str) -> None:
    streams = {"stdin": None, "stdout": None, "stderr": None}
    spec = process("sh", "-c", "test $(readlink /proc/self/fd/0) = /dev/null && cat && exit 5")
    answer = guest.call("execute", container_id=box, process=spec, streams=streams)
    assert guest.event("process_exited", process_id=answer["process_id"])["exit_code"] == 5


def test_a_program_gets_default_signal_dispositions(guest: GuestClient, box: str) -> None:
    found = guest.run("grep", "-E", "Sig(Ign|Blk)", "/proc/self/status", container_id=box)
    assert {line.split()[1] for line in found.text.splitlines()} == {"0" * 16}


def test_a_program_inherits_no_descriptor_of_the_agent(guest: GuestClient, box: str) -> None:
    assert guest.run("sh", "-c", "ls /proc/$$/fd; true", container_id=box).text.split() == ["0", "1", "2"]
    assert guest.run("/bin/sh", "-c", "ls /proc/$$/fd; true").text.split() == ["0", "1", "2"]


def test_a_hundred_commands_leave_nothing_behind(guest: GuestClient, box: str, shared_guest: Guest) -> None:
    def held_by_agent() -> str:
        if shared_guest.kind == "here":
            return str(len(os.listdir(f"/proc/{shared_guest.agent_pid}/fd")))
        script = 'for p in /proc/[0-9]*; do test "$(cat $p/comm)" = init && ls $p/fd | wc -l; done; true'
        return guest.run("/bin/sh", "-c", script).text

    for _ in range(2):
        guest.run("true", container_id=box)  # the second makes the container's launcher, which stays
    before = held_by_agent()
    for _ in range(100):
        assert guest.run("true", container_id=box).exit_code == 0
    assert held_by_agent() == before
    show_state = "cat /proc/[0-9]*/stat 2>/dev/null; true"
    assert ") Z " not in guest.run("sh", "-c", show_state, container_id=box).text


def parents(guest: GuestClient, seconds: int) -> list[int]:
    """The parents of the processes that sleep for so long, as the guest itself sees them."""
    is_it = "tr '\\0' ' ' <$p/cmdline | grep -qx \"sleep $0 \""
    look = f"for p in /proc/[0-9]*; do {is_it} && grep PPid $p/status; done 2>/dev/null; true"
    return [int(line.split()[1]) for line in guest.run("/bin/sh", "-c", look, str(seconds)).text.splitlines()]


ALL_ABOUT_IT = """grep -E "^(Uid|Gid|Groups|Umask|Sig|Cap|NoNew|Seccomp)" /proc/self/status
test $(cut -d ' ' -f 6 /proc/$$/stat) = $$ && echo leads its session
cat /proc/self/cgroup /proc/self/limits; pwd; env; ls /proc/self/fd
for n in /proc/self/ns/*; do readlink $n; done
ps -o args; echo again >/dev/stdout"""


@pytest.mark.parametrize("user", ["0", "ann"])
def test_a_launcher_starts_what_the_forker_would(guest: GuestClient, user: str) -> None:
    guest.create("twice", "sleep", "1000", user=user, envs=[["A", "b"]])
    guest.call("start_container", container_id="twice")
    results = [
        guest.run("sh", "-c", ALL_ABOUT_IT, container_id="twice", user=user, workdir="/tmp") for _ in range(3)
    ]
    assert {result.stderr for result in results} == {b""}
    # posix_spawn(3) of glibc leaves its own two signals, 32 and 33, ignored: nobody else can use them.
    told = {result.text.replace("SigIgn:\t0000000180000000", "SigIgn:\t" + "0" * 16) for result in results}
    same = told.pop()
    assert told == set()
    assert same.endswith("again")
    assert guest.call("list_processes", container_id="twice", limit=10)["total"] == 1
    running = [guest.execute(process("sleep", f"98{n}", user=user), "twice") for n in range(2)]
    others = guest.execute(process("sleep", "982", user="bob", rlimits=[["nofile", 9, 9]]), "twice")
    (first,), (second,), (slow,) = (parents(guest, 980 + n) for n in range(3))
    assert first == second != slow  # children of the launcher, and one of the agent
    for execution in (*running, others):
        execution.signal(signal.SIGTERM)
        assert execution.finish().exit_code == 143


def test_a_launcher_that_is_killed_costs_what_it_started_and_no_more(guest: GuestClient, box: str) -> None:
    for _ in range(2):
        guest.run("true", container_id=box)
    running = guest.execute(process("sleep", "983"), box)
    (launcher,) = parents(guest, 983)
    guest.run("/bin/sh", "-c", "kill -9 $0", str(launcher))
    assert running.finish().exit_code == 137
    for _ in range(3):
        assert guest.run("echo", "on", container_id=box).text == "on"
    again = guest.execute(process("sleep", "984"), box)
    assert parents(guest, 984) not in ([launcher], [])
    again.signal(signal.SIGKILL)
    assert again.finish().exit_code == 137


def test_a_launched_command_may_end_its_container(guest: GuestClient) -> None:
    for _ in range(5):
        guest.create("brief", "sh", "-c", "trap 'exit 3' USR1; while true; do sleep 0.01; done")
        guest.call("start_container", container_id="brief")
        for _ in range(2):
            guest.run("true", container_id="brief")
        running = guest.execute(process("sleep", "1000"), "brief")
        last = guest.execute(process("kill", "-USR1", "1"), "brief")
        assert guest.event("container_exited", container_id="brief")["exit_code"] == 3
        assert running.finish().exit_code == 137
        assert last.finish().exit_code in (0, 137)  # both ended at once
        guest.call("delete_container", container_id="brief")


# -- users, limits, capabilities -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "uid=0(root) gid=0(root)"),
        ({"user": "ann"}, "uid=1000(ann) gid=1000(ann) groups=6(disk),10(wheel)"),
        ({"user": "1000"}, "uid=1000(ann) gid=1000(ann) groups=6(disk),10(wheel)"),
        ({"user": "1234"}, "uid=1234 gid=0(root)"),
        ({"user": "bob", "group": "wheel"}, "uid=1001(bob) gid=10(wheel) groups=6(disk)"),
        ({"user": "ann:0"}, "uid=1000(ann) gid=0(root) groups=6(disk),10(wheel)"),
        ({"supplementary_groups": ["wheel", "77"]}, "uid=0(root) gid=0(root) groups=10(wheel),77"),
    ],
)
def test_users_are_those_of_the_container(
    guest: GuestClient, box: str, fields: dict[str, Any], shown: str
) -> None:
    assert guest.run("id", container_id=box, **fields).text == shown


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"user": "nobody-here"}, "process.user"),
        ({"group": "nogroup"}, "process.group"),
        ({"supplementary_groups": ["x"]}, "process.supplementary_groups"),
        ({"capabilities": ["CAP_FLY"]}, "process.capabilities"),
        ({"rlimits": [["nofile", 5, 3]]}, "process.rlimits[0]"),
        ({"rlimits": [["nothing", 5, 5]]}, "process.rlimits[0]"),
        ({"workdir": "relative"}, "process.workdir"),
        ({"workdir": "/etc/passwd/x"}, "process.workdir"),
        ({"args": []}, "process.args"),
        ({"args": ["a\0b"]}, "process.args[0]"),
        ({"args": ["\ud800"]}, "process.args[0]"),
        ({"envs": [["A=B", "c"]]}, "process.envs[0]"),
        ({"envs": [["A"]]}, "process.envs[0]"),
        ({"user": 5}, "process.user"),
        ({"surprise": 1}, "process.surprise"),
    ],
)
def test_a_bad_process_is_refused_with_the_field(
    guest: GuestClient, box: str, fields: dict[str, Any], named: str
) -> None:
    message = refused("invalid_argument", lambda: guest.run("true", container_id=box, **fields))
    assert message.startswith(named)


@pytest.mark.parametrize("target", ["/proc/self/environ", "/dev/zero", "/etc", "/nothing", "/tmp/fifo"])
def test_a_passwd_file_that_is_none_cannot_hurt(guest: GuestClient, shared_guest: Guest, target: str) -> None:
    root = shared_guest.share / "odd"
    (root / "etc").mkdir(parents=True, exist_ok=True)
    for name in ("proc", "dev", "sys", "tmp", "bin"):
        (root / name).mkdir(exist_ok=True)
    (root / "bin/busybox").write_bytes((shared_guest.share / "busybox/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "etc/passwd").unlink(missing_ok=True)
    (root / "etc/passwd").symlink_to(target)
    guest.create("odd", "/bin/busybox", "sleep", "1000", root={"shared_name": "odd"})
    guest.call("start_container", container_id="odd")
    guest.run("/bin/busybox", "mknod", "/tmp/fifo", "p", container_id="odd")
    refused("invalid_argument", lambda: guest.run("/bin/busybox", "id", container_id="odd", user="ann"))
    status = guest.run("/bin/busybox", "cat", "/proc/self/status", container_id="odd", user="5").text
    assert "Uid:\t5\t5\t5\t5\n" in status


def test_environment_is_what_was_given_and_the_defaults(guest: GuestClient, box: str) -> None:
    found = guest.run("env", container_id=box, user="ann", envs=[["A", "1"], ["B", "ü b"], ["A", "2"]])
    assert sorted(found.text.splitlines()) == [
        "A=2",
        "B=ü b",
        "HOME=/home/ann",
        "HOSTNAME=box",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]
    assert guest.run("/bin/env", container_id=box, envs=[["PATH", "/x"]]).text.count("PATH=") == 1


def test_a_missing_workdir_is_made(guest: GuestClient, box: str) -> None:
    assert guest.run("pwd", container_id=box, workdir="/tmp/deep/er").text == "/tmp/deep/er"


def test_rlimits_apply(guest: GuestClient, box: str) -> None:
    limits = [["nofile", 77, 99], ["core", 0, 0]]
    found = guest.run("sh", "-c", "ulimit -n; ulimit -Hn; ulimit -c", container_id=box, rlimits=limits)
    assert found.text.split() == ["77", "99", "0"]


def capability_sets(text: str) -> dict[str, int]:
    lines = (line.split() for line in text.splitlines())
    return {name.rstrip(":"): int(value, 16) for name, value in lines}


def test_capabilities_are_exactly_those_given(guest: GuestClient, box: str) -> None:
    show = ("grep", "Cap", "/proc/self/status")
    names = ["CAP_CHOWN", "CAP_NET_RAW"]
    wanted = 1 << 0 | 1 << 13
    found = capability_sets(guest.run(*show, container_id=box, capabilities=names).text)
    assert found == {"CapInh": 0, "CapPrm": wanted, "CapEff": wanted, "CapBnd": wanted, "CapAmb": 0}
    found = capability_sets(guest.run(*show, container_id=box, capabilities=names, user="ann").text)
    assert found == {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": wanted, "CapAmb": 0}


@pytest.mark.parametrize("given", [True, False])
def test_no_new_privileges(guest: GuestClient, box: str, given: bool) -> None:
    found = guest.run("grep", "NoNewPrivs", "/proc/self/status", container_id=box, no_new_privileges=given)
    assert found.text.split()[1] == str(int(given))


def test_a_user_can_open_its_own_stdout_again(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "echo hello > /dev/stdout", container_id=box, user="ann")
    assert (found.exit_code, found.text) == (0, "hello")


# -- what a container sees -------------------------------------------------------------------------


def test_file_systems_of_a_container(guest: GuestClient, box: str) -> None:
    found = {}
    for line in guest.run("cat", "/proc/self/mounts", container_id=box).text.splitlines():
        _, path, fstype, options, *_ = line.split()
        found[path] = (fstype, set(options.split(",")))
    for path, fstype in {"/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs"}.items():
        assert found[path][0] == fstype
    for path in ("/sys", "/sys/fs/cgroup", "/proc/sys", "/proc/bus"):
        assert "ro" in found[path][1], path


@pytest.mark.parametrize(
    "command",
    [
        "echo 1 > /proc/sys/kernel/hostname",
        "echo b > /proc/sysrq-trigger",
        "echo 1 > /sys/kernel/mm/ksm/run",
        "mount -t tmpfs none /tmp",
        "umount /proc/sys",
        "mknod /dev/shm/mem c 1 1",
        "mknod /dev/shm/disk b 8 0",
        "mknod /dev/console c 5 1",
    ],
)
def test_a_container_cannot(guest: GuestClient, box: str, command: str) -> None:
    names = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_MKNOD", "CAP_SETUID", "CAP_SYS_CHROOT", "CAP_NET_RAW"]
    assert guest.run("sh", "-c", command, container_id=box, capabilities=names).exit_code != 0


def test_a_container_may_use_the_ordinary_devices(guest: GuestClient, box: str) -> None:
    commands = (
        "head -c 4 /dev/zero /dev/urandom | wc -c; echo x > /dev/null; mknod /dev/shm/null2 c 1 3; echo $?"
    )
    found = guest.run("sh", "-c", commands, container_id=box, capabilities=["CAP_MKNOD"])
    assert found.text.splitlines()[-1] == "0", found


def test_masked_files_are_empty(guest: GuestClient, box: str) -> None:
    found = guest.run("sh", "-c", "cat /proc/keys /proc/timer_list; ls /sys/firmware", container_id=box)
    assert found.stdout == b""


def test_a_read_only_root_cannot_be_written(guest: GuestClient) -> None:
    guest.create("ro", "sleep", "1000", readonly=True)
    guest.call("start_container", container_id="ro")
    found = guest.run("touch", "/tmp/x", container_id="ro")
    assert b"Read-only file system" in found.stderr
    assert guest.run("touch", "/dev/shm/x", container_id="ro").exit_code == 0


def test_what_is_written_in_a_shared_root_is_on_the_host(
    guest: GuestClient, box: str, shared_guest: Guest
) -> None:
    guest.run("sh", "-c", "echo data > /tmp/from-guest", container_id=box)
    assert (shared_guest.share / "busybox/tmp/from-guest").read_text() == "data\n"


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_a_link_in_place_of_a_mount_point_is_refused(
    guest: GuestClient, shared_guest: Guest, name: str
) -> None:
    root = shared_guest.share / f"link-{name}"
    root.mkdir()
    (root / name).symlink_to("/tmp")
    (root / "tmp").mkdir()
    guest.create("link", "sh", root={"shared_name": root.name})
    message = refused("invalid_argument", lambda: guest.call("start_container", container_id="link"))
    assert f"/{name}" in message
    assert guest.states()["link"]["state"] == "created"


# -- life of a container ---------------------------------------------------------------------------


def test_a_container_lives_from_created_to_stopped_and_again(guest: GuestClient) -> None:
    guest.create("life", "sh", "-c", "echo once >> /tmp/life; exit 3")
    assert guest.states()["life"]["state"] == "created"
    for _ in range(2):
        assert guest.call("start_container", container_id="life")["pid"] > 1
        ended = guest.event("container_exited", container_id="life")
        assert (ended["exit_code"], ended["oom_killed"]) == (3, False)
        state = guest.states()["life"]
        assert (state["state"], state["exit_code"], state["pid"]) == ("stopped", 3, None)
        assert state["finished_at_ns"] == ended["finished_at_ns"] > 0
    guest.call("delete_container", container_id="life")
    assert guest.states() == {}


def test_a_main_program_that_does_not_exist_has_ended_with_127(guest: GuestClient) -> None:
    guest.create("none", "no-such-program")
    guest.call("start_container", container_id="none")
    assert guest.event("container_exited", container_id="none")["exit_code"] == 127


def test_a_container_that_cannot_be_set_up_can_be_started_later(guest: GuestClient) -> None:
    guest.create("late", "sleep", "1000", user="eve")
    refused("invalid_argument", lambda: guest.call("start_container", container_id="late"))
    assert guest.states()["late"]["state"] == "created"
    refused("invalid_argument", lambda: guest.call("start_container", container_id="late"))


def test_the_end_of_the_main_process_ends_all_others(guest: GuestClient) -> None:
    guest.create("all", "sleep", "1000")
    guest.call("start_container", container_id="all")
    other = guest.execute(process("sleep", "1000"), "all")
    guest.call("signal_container", container_id="all", signal=9, everyone=False)
    assert guest.event("container_exited", container_id="all")["exit_code"] == 137
    assert other.finish().exit_code == 137


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_everyone(guest: GuestClient, number: int) -> None:
    trap = "trap 'exit 9' USR1; {up}; while true; do sleep 0.1; done"
    guest.create("every", "sh", "-c", trap.format(up="touch /dev/shm/up"))
    guest.call("start_container", container_id="every")
    both_up = "until [ -e /dev/shm/up ]; do sleep 0.01; done; echo up"
    other = guest.execute(process("sh", "-c", trap.format(up=both_up)), "every")
    other.wait_for(b"up\n")
    guest.call("signal_container", container_id="every", signal=number, everyone=True)
    expected = 9 if number == signal.SIGUSR1 else 137
    assert guest.event("container_exited", container_id="every")["exit_code"] in (expected, 137)
    assert other.finish().exit_code in (expected, 137)


def test_delete_kills_what_runs(guest: GuestClient, box: str) -> None:
    guest.call("delete_container", container_id=box)
    assert guest.event("container_exited", container_id=box)["exit_code"] == 137
    assert guest.states() == {}
    guest.call("delete_container", container_id=box)


def test_delete_overtakes_a_start(guest: GuestClient) -> None:
    guest.create("race", "sleep", "1000")
    start = guest.send("start_container", container_id="race")
    delete = guest.send("delete_container", container_id="race")
    guest.reply(delete)
    guest.wait(lambda: start in guest.replies, "the reply to the start")
    error = guest.replies[start].error
    assert error is None or error[0] == "internal"
    assert guest.states() == {}


def test_a_command_that_races_with_the_end_of_its_container_is_refused_clearly(guest: GuestClient) -> None:
    streams = {"stdin": None, "stdout": None, "stderr": None}
    for _ in range(10):
        guest.create("brief", "sh", "-c", "exit 0")
        numbers = [guest.send("start_container", container_id="brief")]
        guest.reply(numbers.pop())
        for _ in range(3):
            params = {"container_id": "brief", "process": process("true"), "streams": streams}
            numbers.append(guest.send("execute", **params))
        delete = guest.send("delete_container", container_id="brief")
        guest.wait(lambda numbers=numbers: all(n in guest.replies for n in numbers), "all replies")
        errors = {guest.replies[number].error for number in numbers} - {None}
        assert {error[0] for error in errors if error} <= {"failed_precondition"}
        guest.reply(delete)


def test_refusals(guest: GuestClient, box: str) -> None:
    refused("already_exists", lambda: guest.create(box, "true"))
    refused("failed_precondition", lambda: guest.call("start_container", container_id=box))
    refused("not_found", lambda: guest.call("start_container", container_id="nobody"))
    refused("not_found", lambda: guest.run("true", container_id="nobody"))
    refused("not_found", lambda: guest.create("x", "true", root={"shared_name": "missing"}))
    refused("not_implemented", lambda: guest.call("fly"))
    refused("invalid_argument", lambda: guest.call("ping", surprise=1))
    for bad in ("../x", "", "A", "a/b", "a" * 65):
        refused("invalid_argument", lambda bad=bad: guest.call("start_container", container_id=bad))
    for root in ({}, {"shared_name": "a", "disk_id": "b"}, {"shared_name": ".."}, {"disk_id": "x" * 21}):
        params = container("x", "true") | {"root": root}
        refused("invalid_argument", lambda params=params: guest.call("create_container", **params))
    guest.create("idle", "true")
    refused("failed_precondition", lambda: guest.run("true", container_id="idle"))
    guest.call("signal_container", container_id="idle", signal=9, everyone=True)
    assert set(guest.states()) == {box, "idle"}


def test_a_stream_number_cannot_be_used_twice(guest: GuestClient) -> None:
    streams = {"stdin": 4_000_000_001, "stdout": 4_000_000_001, "stderr": None}
    spec = process("/bin/true")
    refused(
        "invalid_argument",
        lambda: guest.call("execute", container_id=None, process=spec, streams=streams),
    )


# -- sessions --------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[socket.socket]:
    """The host's end of a fresh agent's port (on this machine)."""
    with guest_here() as (_, sock):
        yield sock


@pytest.mark.root
class TestSessions:
    """What a host may do to the port."""

    def session(self, port: socket.socket) -> GuestClient:
        client = GuestClient(port)
        client.start()
        return client

    def test_a_new_session_kills_the_processes_of_the_old_one(self, port: socket.socket) -> None:
        first = self.session(port)
        first.create("stays", "sleep", "1000")
        first.call("start_container", container_id="stays")
        first.execute(process("sleep", "7654"), "stays")
        second = self.session(port)
        assert second.states()["stays"]["state"] == "running"
        second.wait(
            lambda: "7654" not in second.run("ps", "-o", "args", container_id="stays").text, "its death"
        )

    def test_garbage_costs_the_session_and_nothing_else(self, port: socket.socket) -> None:
        first = self.session(port)
        first.create("stays", "sleep", "1000")
        port.setblocking(True)
        port.sendall(b"\xff" * 70_000)
        assert "stays" in self.session(port).states()

    @pytest.mark.parametrize("length", [1, 5, 11, 12, 20])
    def test_half_a_frame_is_dropped_at_the_next_sync(self, port: socket.socket, length: int) -> None:
        self.session(port)
        frame = protocol.encode_frame(protocol.REQUEST, 0, b'{"id": 1, "method": "ping", "params": {}}')
        port.setblocking(True)
        port.sendall(frame[:length])
        assert self.session(port).call("ping") == {}

    def test_the_largest_length_does_not_make_it_wait(self, port: socket.socket) -> None:
        port.setblocking(True)
        port.sendall(struct.pack(">BBHII", protocol.DATA, 0, 0, 1, protocol.MAX_PAYLOAD))
        assert self.session(port).call("ping") == {}

    def test_input_for_no_stream_costs_the_session(self, port: socket.socket) -> None:
        self.session(port)
        port.setblocking(True)
        port.sendall(protocol.encode_frame(protocol.DATA, 77, b"x"))
        assert self.session(port).call("ping") == {}

    def test_a_flood_of_requests_is_answered(self, port: socket.socket) -> None:
        client = self.session(port)
        numbers = [client.send("list_containers") for _ in range(1000)]
        assert all(client.reply(number) == {"containers": []} for number in numbers)

    def test_many_processes_at_once(self, port: socket.socket) -> None:
        client = self.session(port)
        started = [client.execute(process("/bin/sh", "-c", f"exit {n}")) for n in range(40)]
        assert [found.finish().exit_code for found in started] == list(range(40))


# -- the guest's own end -----------------------------------------------------------------------------


@pytest.mark.root
def test_a_guest_that_hears_nothing_ends_its_containers_and_itself() -> None:
    """The agent as a process here: its end is what powers a VM off."""
    with guest_here() as (found, sock), GuestClient(sock) as client:
        client.start()
        for container_id, trap, grace_ms in (
            ("kind", "echo bye > /told; exit", 9_000),
            ("rude", "", 3_000_000),
        ):
            script = f"trap '{trap}' TERM; while :; do sleep 0.05; done"
            params = container(container_id, "sh", "-c", script)
            client.call("create_container", **params, stop_signal=signal.SIGTERM, stop_timeout_ms=grace_ms)
            client.call("start_container", container_id=container_id)
        client.call("pause_container", container_id="kind")
        client.call("set_watchdog", watchdog={"after_ms": 100, "grace_ms": 9_000})
        client.call("set_watchdog", watchdog={"after_ms": 700, "grace_ms": 1_000})  # heard in time
        time.sleep(0.3)
        assert {name: found["state"] for name, found in client.states().items()} == {
            "kind": "paused",
            "rude": "running",
        }
        os.waitid(os.P_PID, found.pid, os.WEXITED | os.WNOWAIT)
        assert (found.share / "busybox/told").read_text() == "bye\n"
