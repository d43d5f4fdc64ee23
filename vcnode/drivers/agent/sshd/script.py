"""What is run over SSH, as text for a POSIX shell. Pure.

A server gives what it is asked to run to the user's login shell, as one line. That line replaces itself, step
by step, by the program: change of user, working directory, environment, a word on where it is, limits. The
word is a random token and the process id, in a line of its own: the first on standard error, or on the
terminal. It says that the shells have done their part, and whom to send signals.

Source: RFC 4254, 6.5; POSIX, "Shell Command Language"; setpriv(1), prlimit(1), su(1), sudo(8).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from vcnode.errors import UnsupportedError
from vcnode.models.capabilities import ALL_CAPABILITIES
from vcnode.models.vm import GuestProcess

LOOK = (
    "id -u; id -un; uname -r; cat /proc/sys/kernel/random/boot_id;"
    " if setpriv --help 2>&1 | grep -q -e --reuid; then echo setpriv; fi;"
    " if command -v prlimit >/dev/null; then echo prlimit; fi;"
    " for r in crun runc; do if command -v $r >/dev/null; then echo $r; break; fi; done; echo ."
)
"""Asks what `Login` holds, in its order, then for the tools."""
RUNTIMES = ("crun", "runc")
"""OCI runtimes, the one that is preferred first."""
TOOLS = ("setpriv", "prlimit", "crun", "runc")
POWER_OFF = "sync; systemctl poweroff || poweroff || busybox poweroff -f"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NO_WORKDIR = 126
"""Exit code of a process whose working directory cannot be had; the reason is on its standard error."""


@dataclass(frozen=True, slots=True)
class Login:
    """As whom we are in the guest, and what it has."""

    uid: int
    user: str
    kernel: str
    """Its release."""
    boot_id: str
    tools: frozenset[str]
    """Those of `TOOLS` that it has."""

    @property
    def runtime(self) -> str | None:
        """What runs containers there."""
        return next((name for name in RUNTIMES if name in self.tools), None)

    @classmethod
    def read(cls, answer: str) -> Login | None:
        """From the answer to `LOOK`; None if that is none."""
        lines = answer.splitlines()
        if len(lines) < 5 or not lines[0].isdecimal() or lines[-1] != ".":
            return None
        tools = frozenset(lines[4:-1])
        if not tools <= frozenset(TOOLS):
            return None
        user, kernel, boot_id = (line[:256] for line in lines[1:4])
        return cls(int(lines[0]), user, kernel, boot_id, tools)


def start(process: GuestProcess, login: Login, token: str, *, tty: bool) -> str:
    """The line that runs *process*, after the word with *token*.

    Raises:
        UnsupportedError: The guest lacks the tool for something that is asked for.
    """
    there = shlex.quote(process.workdir)
    inner = [
        f"cd -- {there} || exit {NO_WORKDIR}",
        *(f"export {_checked(name)}={shlex.quote(value)}" for name, value in process.envs),
        f"printf '%s %s\\n' {token} $$" + ("" if tty else " >&2"),
        f"exec {shlex.join([*_limits(process, login), *process.args])}",
    ]
    # The directory is made as the login's user, who may make more of them.
    made = "" if process.workdir == "/" else f"mkdir -p -- {there}; "
    return f"{made}exec {_as_user(process, login, chr(10).join(inner))}"


def _checked(name: str) -> str:
    if not _IDENTIFIER.fullmatch(name):
        raise UnsupportedError(f"cmd.envs: a shell in the guest cannot set a variable {name!r}.")
    return name


def _as_user(process: GuestProcess, login: Login, script: str) -> str:
    """A command that runs *script* as the user that *process* wants."""
    shell = shlex.join(["/bin/sh", "-c", script])
    user, group = process.user, process.group
    same = user in ("", login.user, str(login.uid))
    if same and group is None and not process.supplementary_groups:
        return shell
    if login.uid != 0:
        if process.supplementary_groups:
            raise UnsupportedError("cmd.supplementary_groups: over SSH they need a login as root.")
        # Numbers have a # before them; sudo asks nobody for a password here, and fails instead.
        options = ["-u", _numbered(user or login.user), *(("-g", _numbered(group)) if group else ())]
        return f"sudo -n {shlex.join(options)} -- {shell}"
    if "setpriv" in login.tools:
        return f"setpriv {_setpriv_options(process, login)} -- {shell}"
    if group is not None or process.supplementary_groups or user.isdecimal():
        raise UnsupportedError(
            "cmd.user, cmd.group: the guest has no setpriv (util-linux), so only users by their names work."
        )
    return shlex.join(["su", "-s", "/bin/sh", user, "-c", script])


def _setpriv_options(process: GuestProcess, login: Login) -> str:
    user = process.user or str(login.uid)
    # A user without an entry has no primary group: number 0, as in a container.
    group = (
        shlex.quote(process.group) if process.group else f"$(id -g {shlex.quote(user)} 2>/dev/null || echo 0)"
    )
    groups = ",".join(process.supplementary_groups)
    more = f"--groups={shlex.quote(groups)}" if groups else "--init-groups"
    if not groups and user.isdecimal():
        more = "--clear-groups"
    return f"--reuid={shlex.quote(user)} --regid={group} {more}"


def _numbered(name: str) -> str:
    return f"#{name}" if name.isdecimal() else name


def _limits(process: GuestProcess, login: Login) -> list[str]:
    """What stands before the program: its limits, and that it may gain no privileges."""
    words: list[str] = []
    if process.rlimits:
        if "prlimit" not in login.tools:
            raise UnsupportedError("cmd.rlimits: the guest has no prlimit (util-linux).")
        words += [
            "prlimit",
            *(f"--{name}={_bound(soft)}:{_bound(hard)}" for name, soft, hard in process.rlimits),
        ]
    is_root = process.user in ("0", "root") or (process.user == "" and login.uid == 0)
    options = []
    if len(set(process.capabilities)) < len(ALL_CAPABILITIES):
        if not is_root or "setpriv" not in login.tools:
            raise UnsupportedError(
                "cmd.capabilities: over SSH they can be taken from root only, by setpriv (util-linux)."
            )
        kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in process.capabilities)
        options += [f"--bounding-set=-all{kept}", "--inh-caps=-all"]
    # Of root with all capabilities it would take nothing.
    if process.no_new_privileges and "setpriv" in login.tools and (options or not is_root):
        options.append("--no-new-privs")
    return [*words, *(("setpriv", *options) if options else ())]


def _bound(value: int) -> str:
    return "unlimited" if value == -1 else str(value)


def signal(number: int, pid: int, *, sudo: bool) -> str:
    """The line that sends a signal to all processes of the session that process *pid* is in.

    Source: proc_pid_stat(5), fields 2 (in parentheses, and anything) and 6, the session.
    """
    script = (
        f"read -r l </proc/{pid}/stat || exit 0; set -- ${{l##*) }}; s=$4; for f in /proc/[0-9]*/stat; do"
        ' { read -r l <"$f"; } 2>/dev/null || continue; set -- ${l##*) };'
        f' if [ "$4" = "$s" ]; then p=${{f#/proc/}}; kill -{number} "${{p%/stat}}"; fi; done'
    )
    return f"{'sudo -n ' if sudo else ''}{shlex.join(['/bin/sh', '-c', script])}"


def needs_sudo(process: GuestProcess, login: Login) -> bool:
    """Whether *process* is another user's than the login, which is not root's."""
    return login.uid != 0 and process.user not in ("", login.user, str(login.uid))


@dataclass(slots=True)
class Word:
    """Looks for the word with the token at the beginning of an output.

    What comes before it (a shell's start-up files may print) is in `before`, for whom the word never comes.
    """

    token: bytes
    pid: int | None = None
    """Once it has come."""
    before: bytes = b""

    def take(self, data: bytes, *, limit: int = 64 * 1024) -> bytes:
        """The next piece of output goes in; what follows the word comes out."""
        if self.pid is not None:
            return data
        self.before += data
        at = self.before.find(self.token + b" ")
        line, end, rest = self.before[at:].partition(b"\n") if at >= 0 else (b"", b"", b"")
        number = line.removeprefix(self.token).strip()
        if end and number.isdigit() and len(number) <= 10:
            self.pid, self.before = int(number), b""
            return rest
        self.before = self.before[-limit:]
        return b""
