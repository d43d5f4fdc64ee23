"""Containers as an OCI runtime in the guest takes them, and what a shell there runs for it. Pure.

A container is a bundle below `BASE`. Its runtime is started by a shell that outlives the connection, keeps
what the container writes in files, and notes its exit code; whoever waits for that is woken through a FIFO.

Source: OCI runtime-spec 1.0.2, config.md, config-linux.md; crun(1), runc(8).
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from vcnode.errors import InvalidArgumentError, UnsupportedError
from vcnode.models.vm import SHARE_TAG, GuestContainer, GuestContainerState, GuestProcess

BASE = "/run/vcnode/containers"
SHARED = "/run/vcnode/shared"
_STALE_WATCHERS = 16
"""Most of earlier sessions that may wait as well."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True, slots=True)
class Users:
    """The files of a container's root in which names of users and groups are looked up."""

    passwd: str
    groups: str

    @classmethod
    def read(cls, answer: str) -> Users:
        """From what `prepare` prints."""
        passwd, _, groups = answer.partition("\n\0\n")
        return cls(passwd, groups)

    def process(self, process: GuestProcess, *, tty: bool = False) -> dict[str, object]:
        """A process as the runtime takes it.

        Raises:
            InvalidArgumentError: No such user or group.
        """
        uid, gid = self._user(process.user)
        if process.group is not None:
            gid = self._group(process.group)
        envs = dict((("PATH", _PATH), *process.envs))
        return {
            "terminal": tty,
            "user": {
                "uid": uid,
                "gid": gid,
                "additionalGids": [self._group(name) for name in process.supplementary_groups],
            },
            "args": list(process.args),
            "env": [f"{name}={value}" for name, value in envs.items()],
            "cwd": process.workdir,
            "noNewPrivileges": process.no_new_privileges,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), process.capabilities),
            "rlimits": [
                {"type": f"RLIMIT_{name.upper()}", "soft": _limit(soft), "hard": _limit(hard)}
                for name, soft, hard in process.rlimits
            ],
        }

    def _user(self, name: str) -> tuple[int, int]:
        for line in self.passwd.splitlines():
            fields = line.split(":")
            if len(fields) >= 4 and name in (fields[0], fields[2]) and fields[2].isdecimal():
                return int(fields[2]), int(fields[3]) if fields[3].isdecimal() else 0
        if name.isdecimal():
            return int(name), 0
        raise InvalidArgumentError.field("cmd.user", f"there is no user {name!r} in the container")

    def _group(self, name: str) -> int:
        if name.isdecimal():
            return int(name)
        for line in self.groups.splitlines():
            fields = line.split(":")
            if len(fields) >= 3 and fields[0] == name and fields[2].isdecimal():
                return int(fields[2])
        raise InvalidArgumentError.field("cmd.group", f"there is no group {name!r} in the container")


def _limit(value: int) -> int:
    return (1 << 64) - 1 if value == -1 else value


def root_of(container: GuestContainer) -> str:
    """Where the container's root is in the guest. Raises UnsupportedError."""
    if container.root.shared_name is None:
        raise UnsupportedError("Containers of images need the agent native; give a rootfs.")
    if container.stdin or container.tty:
        raise UnsupportedError("stdin, tty: over SSH nobody can attach to a container.")
    return f"{SHARED}/{container.root.shared_name}"


def config(container: GuestContainer, users: Users) -> str:
    """The bundle's ``config.json``. Raises InvalidArgumentError, UnsupportedError."""
    nodev = ["nosuid", "noexec", "nodev"]
    return json.dumps(
        {
            "ociVersion": "1.0.2",
            "hostname": container.hostname,
            "root": {"path": root_of(container), "readonly": container.readonly},
            "process": users.process(container.process),
            "mounts": [
                _mount("/proc", "proc", []),
                _mount("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
                _mount(
                    "/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
                ),
                _mount("/dev/shm", "tmpfs", [*nodev, "mode=1777"]),  # noqa: S108 -- in the guest
                _mount("/sys", "sysfs", [*nodev, "ro"]),
            ],
            "linux": {
                "cgroupsPath": f"/vcnode/{container.container_id}",
                "namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount")],
                "maskedPaths": _MASKED,
                "readonlyPaths": _READ_ONLY,
            },
        }
    )


def _mount(where: str, kind: str, options: list[str]) -> dict[str, object]:
    return {"destination": where, "type": kind, "source": kind, "options": options}


def _bundle(container_id: str) -> str:
    return f"{BASE}/{container_id}"


def prepare(container_id: str, root: str) -> str:
    """Makes the bundle's directory and the share, and prints what `Users.read` reads.

    Ends with 3 if there is such a container, 4 if the share cannot be mounted, 5 if the root is not there.
    """
    shared, bundle = shlex.quote(SHARED), shlex.quote(_bundle(container_id))
    return (
        f"mkdir -p {shared} {BASE} && mkdir {bundle} || exit 3;"
        f" grep -q ' {SHARED} ' /proc/mounts || {{ modprobe -a 9p 9pnet_virtio 2>/dev/null;"
        f" mount -t 9p -o trans=virtio,version=9p2000.L {SHARE_TAG} {shared}; }} || exit 4;"
        f" cd {shlex.quote(root)} || exit 5; mkfifo {bundle}/end;"
        " cat etc/passwd 2>/dev/null; printf '\\n\\0\\n'; cat etc/group 2>/dev/null; true"
    )


def read(container_id: str, name: str) -> str:
    """Prints a file of the bundle."""
    return f"cat {shlex.quote(_bundle(container_id))}/{name}"


def write(container_id: str, name: str) -> str:
    """Writes standard input to a file of the bundle, for root only."""
    return f"umask 077; cat >{shlex.quote(_bundle(container_id))}/{name}"


def start(runtime: str, container_id: str) -> str:
    """Starts the container; prints its process id, or nothing and what the runtime says on standard error."""
    quoted = shlex.quote(container_id)
    lines = "x\\n" * _STALE_WATCHERS
    keeper = (
        f"{runtime} run --bundle . --pid-file pid {quoted} >out 2>err </dev/null; echo $? >exit.new;"
        f" mv exit.new exit; exec 9<>end; printf '{lines}' >&9"
    )
    return (
        f"cd {shlex.quote(_bundle(container_id))} || exit 3; rm -f pid exit out err;"
        f" {runtime} delete --force {quoted} 2>/dev/null;"
        f" setsid sh -c {shlex.quote(keeper)} >/dev/null 2>&1 </dev/null &"
        " while [ ! -s pid ] && [ ! -e exit ]; do sleep 0.05; done;"
        " if [ -s pid ]; then cat pid; else cat err >&2; exit 6; fi"
    )


def watch(container_id: str) -> str:
    """Waits for the container's end, and prints its exit code."""
    return (
        f"cd {shlex.quote(_bundle(container_id))} || exit 3; exec 8<>end;"
        " [ -e exit ] || read -r _ <&8; cat exit"
    )


def signal(runtime: str, container_id: str, number: int, *, everyone: bool) -> str:
    """Sends a signal to the main process, or to all; nothing if it has ended."""
    quoted = shlex.quote(container_id)
    every = " --all" if everyone else ""
    return (
        f"cd {shlex.quote(_bundle(container_id))} 2>/dev/null || exit 0; [ -s pid ] || exit 0;"
        f" {runtime} kill{every} {quoted} {number} || [ -e exit ]"
    )


def pause(runtime: str, container_id: str, *, pause: bool) -> str:
    """Freezes the container, or lets it go on."""
    return f"{runtime} {'pause' if pause else 'resume'} {shlex.quote(container_id)}"


def delete(runtime: str, container_id: str) -> str:
    """Takes the container away, whatever it does."""
    bundle = shlex.quote(_bundle(container_id))
    return (
        f"[ ! -d {bundle} ] || {{ {runtime} delete --force {shlex.quote(container_id)} 2>/dev/null;"
        f" rm -rf {bundle}; }}"
    )


def execute(runtime: str, container_id: str, name: str, token: str, *, tty: bool) -> str:
    """Runs the process in file *name* of the bundle, after the word with *token*."""
    bundle = shlex.quote(_bundle(container_id))
    there = " --tty" if tty else ""
    script = (
        f"cd {bundle} || exit 3; printf '%s %s\\n' {token} $$" + ("" if tty else " >&2") + ";"
        f" exec {runtime} exec{there} --pid-file {name}.pid --process {name} {shlex.quote(container_id)}"
    )
    return f"exec /bin/sh -c {shlex.quote(script)}"


def signal_executed(container_id: str, name: str, number: int) -> str:
    """Sends a signal to a process that `execute` runs, and to what is in its process group."""
    file = f"{shlex.quote(_bundle(container_id))}/{name}.pid"
    return f"p=$(cat {file} 2>/dev/null) && {{ kill -{number} $p; kill -{number} -$p; }} 2>/dev/null; true"


def listing(runtime: str) -> str:
    """Prints a line for each container: id, exit code or -, and what the runtime says of it."""
    return (
        f'cd {BASE} 2>/dev/null || exit 0; for c in *; do [ -d "$c" ] || continue;'
        ' printf \'%s %s \' "$c" "$(cat "$c/exit" 2>/dev/null || echo -)";'
        f" {runtime} state \"$c\" 2>/dev/null | tr -d '\\n'; echo; done"
    )


def read_listing(answer: str) -> list[GuestContainerState]:
    """What `listing` printed. Lines that make no sense are left out."""
    found = []
    for line in answer.splitlines():
        container_id, _, rest = line.partition(" ")
        code, _, text = rest.partition(" ")
        try:
            said = json.loads(text) if text else {}
        except ValueError:
            said = {}
        pid = said.get("pid") if isinstance(said, dict) else None
        status = said.get("status") if isinstance(said, dict) else None
        if code.isdecimal():
            found.append(
                GuestContainerState(container_id=container_id, state="stopped", exit_code=min(int(code), 255))
            )
        elif status in ("running", "paused") and type(pid) is int:
            found.append(GuestContainerState(container_id=container_id, state=status, pid=pid))
        else:
            found.append(GuestContainerState(container_id=container_id, state="created"))
    return found
