"""What a request's ``process`` means: checked, and made ready for the fork."""

from __future__ import annotations

import os

from vcnode.guest.agent import capabilities, limits, users
from vcnode.guest.agent.params import Params, encoded, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_ARGS = 4096


class ProcessSpec:
    """A ``process`` of a request, checked as far as that is possible before its root is at hand."""

    __slots__ = (
        "args",
        "capabilities",
        "envs",
        "group",
        "no_new_privileges",
        "rlimits",
        "supplementary_groups",
        "user",
        "workdir",
    )

    def __init__(self, params: Params) -> None:
        """Take *params* apart; raises `Failure` with ``invalid_argument``."""
        self.args = params.array("args", encoded, longest=_MAX_ARGS)
        if not self.args:
            raise invalid(params.path("args"), "is empty")
        self.envs = dict(params.array("envs", _variable, longest=_MAX_ARGS))
        self.workdir = params.text("workdir", "/")
        if not self.workdir.startswith("/"):
            raise invalid(params.path("workdir"), "must be an absolute path")
        self.user = params.text("user", "0", longest=256)
        self.group = params.optional_text("group", longest=256)
        self.supplementary_groups = params.array("supplementary_groups", _word, longest=64)
        self.rlimits = params.array("rlimits", limits.parse, longest=64)
        self.no_new_privileges = params.flag("no_new_privileges", True)
        names = params.array("capabilities", _word, longest=len(capabilities.NAMES))
        self.capabilities = capabilities.mask(names, params.path("capabilities"))
        params.done()

    def of_launcher(self) -> ProcessSpec:
        """The same privileges for a `launcher`."""
        other = self.with_args((b"",))
        other.rlimits, other.workdir = (), "/"
        return other

    def with_args(self, args: tuple[bytes, ...]) -> ProcessSpec:
        """The same with another program."""
        other = object.__new__(ProcessSpec)
        for name in ProcessSpec.__slots__:
            setattr(other, name, getattr(self, name))
        other.args = args
        return other


def _word(item: Any, path: str) -> str:
    return encoded(item, path, 256).decode()


def _variable(item: Any, path: str) -> tuple[bytes, bytes]:
    if type(item) is not list or len(item) != 2:
        raise invalid(path, "must be [name, value]")
    name, value = encoded(item[0], path), encoded(item[1], path)
    if not name or b"=" in name:
        raise invalid(path, "the name of a variable is empty or holds '='")
    return name, value


class Plan:
    """A `ProcessSpec` in one root, with all that can be found out before the fork.

    The child of a fork pays for each page that it touches with a copy, so the agent does the work.

    Args:
        spec: What was asked for.
        root: Path of the root directory, as the agent sees it.
        hostname: For the environment.

    Raises:
        Failure: ``invalid_argument``; no such user or group in this root.
        OSError: *root* cannot be opened.
    """

    __slots__ = ("args", "copy", "dropped_capabilities", "env", "files", "identity", "spec", "terminal")

    def __init__(
        self, spec: ProcessSpec, root: str, hostname: str, terminal: tuple[int, int] | None = None
    ) -> None:
        self.terminal = terminal
        self.copy: tuple[str, str, int] | None = None
        self.spec = spec
        self.identity = _identity(spec, root)
        self.env = environment(spec.envs, self.identity.home, hostname)
        if terminal is not None:
            self.env.setdefault(b"TERM", b"xterm")
        self.args = spec.args
        self.files = candidates(spec.args[0], self.env[b"PATH"])
        self.dropped_capabilities = capabilities.numbers(capabilities.ALL & ~spec.capabilities)

    @property
    def privileges(self) -> tuple[object, ...]:
        """All that tells what the process may do."""
        who = self.identity
        return who.uid, who.gid, who.groups, self.spec.capabilities, self.spec.no_new_privileges


def copy_plan(direction: str, path: str, max_bytes: int) -> Plan:
    """A plan that runs `copying.run` instead of a program."""
    params = Params({"args": ["copy"], "no_new_privileges": True, "capabilities": []})
    plan = Plan(ProcessSpec(params), "/", "")
    plan.copy = (direction, path, max_bytes)
    return plan


def _identity(spec: ProcessSpec, root: str) -> users.Identity:
    """Who the process is; what was found out for files that are as they were is not found out again."""
    stamps = users.stamps(root)
    key = None if stamps is None else (spec.user, spec.group, spec.supplementary_groups, stamps)
    if key is not None and (known := _known.get(key)) is not None:
        return known
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = users.resolve_in(fd, spec.user, spec.group, spec.supplementary_groups)
    finally:
        os.close(fd)
    if key is not None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = found
    return found


_known: dict[tuple[Any, ...], users.Identity] = {}
_MOST_KNOWN = 64


def environment(envs: dict[bytes, bytes], home: bytes, hostname: str) -> dict[bytes, bytes]:
    """The environment of a program: *envs*, and PATH, HOME and HOSTNAME where they are not given."""
    return {b"PATH": DEFAULT_PATH, b"HOME": home, b"HOSTNAME": hostname.encode(), **envs}


def candidates(program: bytes, path: bytes) -> tuple[bytes, ...]:
    """The files that *program* may mean, in order: itself when it names a directory, else along *path*."""
    if not program or b"/" in program:
        return (program,) if program else ()
    return tuple((directory or b".") + b"/" + program for directory in path.split(b":"))


def exit_code(status: int) -> int:
    """The exit code for a wait status: the program's own, or 128 + the signal that ended it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
