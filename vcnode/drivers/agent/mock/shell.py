"""What the commands that a mock guest understands would do. Pure.

A command becomes a *program*: the steps that it takes, and its exit code. Understood are ``true``, ``false``,
``exit N``, ``echo``, ``cat`` (stdin to stdout), ``sleep N`` or ``sleep infinity``, ``env``, ``pwd``, ``id``,
``hostname``, and ``sh -c`` with those joined by ``;``, ``&&`` and ``||``, each with ``>&2`` if wanted.
Anything else is 127 and a line on stderr, as in a container without the program.
"""

from __future__ import annotations

import math
import posixpath
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vcnode.errors import InvalidArgumentError
from vcnode.models.vm import GuestProcess

NOT_FOUND = 127
USERS: Mapping[str, int] = {"root": 0, "daemon": 1, "bin": 2, "sys": 3, "www-data": 33, "nobody": 65534}
"""The users that every mock container has; the groups have the same names and numbers."""


@dataclass(frozen=True, slots=True)
class Write:
    """Write bytes to an output."""

    to: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Sleep:
    """Do nothing for so many seconds (infinity: until a signal comes)."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Cat:
    """Copy stdin to an output until it ends."""

    to: Literal["stdout", "stderr"] = "stdout"


Step = Write | Sleep | Cat


@dataclass(frozen=True, slots=True)
class Program:
    """What a process does, and how it ends."""

    steps: tuple[Step, ...] = ()
    exit_code: int = 0
    exits_shell: bool = field(default=False, compare=False)
    """Whether a shell that runs this goes no further (``exit``)."""


def find_user(name: str, field_name: str = "user") -> int:
    """The number of a user or group, given by name or number.

    Raises:
        InvalidArgumentError: A mock container has no such user or group.
    """
    if name.isascii() and name.isdigit() and int(name) < 1 << 32:
        return int(name)
    if name not in USERS:
        known = ", ".join(USERS)
        raise InvalidArgumentError.field(field_name, f"{name!r} does not exist; the mock knows {known}.")
    return USERS[name]


def compile_process(process: GuestProcess, hostname: str) -> Program:
    """What *process* does in a container called *hostname*.

    Raises:
        InvalidArgumentError: Its user or group does not exist.
    """
    uid = find_user(process.user or "0")
    gid = find_user(process.group, "group") if process.group is not None else uid
    for group in process.supplementary_groups:
        find_user(group, "supplementary_groups")
    return _Shell(process, hostname, uid, gid).run(list(process.args))


def _exit_code(text: str) -> int | None:
    return int(text) & 255 if text.isascii() and text.isdigit() and len(text) < 10 else None


def _text(content: str) -> bytes:
    return content.encode("utf-8", "surrogateescape")


def _lines(lines: Iterable[str]) -> Program:
    return Program(tuple(Write("stdout", _text(line + "\n")) for line in lines))


def _line(content: str) -> Program:
    return _lines([content])


def _failure(content: str, exit_code: int) -> Program:
    return Program((Write("stderr", _text(content + "\n")),), exit_code)


class _Shell:
    """The commands, with what they know of their surroundings."""

    def __init__(self, process: GuestProcess, hostname: str, uid: int, gid: int) -> None:
        self._envs = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/"}
        self._envs |= {"HOSTNAME": hostname} | dict(process.envs)
        self._workdir = process.workdir
        self._hostname = hostname
        self._uid = uid
        self._gid = gid
        self._commands: dict[str, Callable[[Sequence[str]], Program]] = {
            "true": lambda _: Program(),
            "false": lambda _: Program(exit_code=1),
            "exit": self._exit,
            "echo": self._echo,
            "cat": self._cat,
            "sleep": self._sleep,
            "env": lambda _: Program(
                tuple(Write("stdout", _text(f"{k}={v}\n")) for k, v in self._envs.items())
            ),
            "pwd": lambda _: _line(self._workdir),
            "id": lambda _: _line(f"uid={self._uid} gid={self._gid}"),
            "hostname": lambda _: _line(self._hostname),
            "sh": self._sh,
        }

    def run(self, args: list[str]) -> Program:
        """What one command does."""
        if not args:
            return Program()
        name = posixpath.basename(args[0]) if args[0].startswith(("/bin/", "/usr/bin/")) else args[0]
        if (command := self._commands.get(name)) is None:
            return _failure(f"{args[0]}: not found (a mock guest knows a few commands only)", NOT_FOUND)
        return command(args[1:])

    def _exit(self, args: Sequence[str]) -> Program:
        code = _exit_code(args[0]) if args else 0
        return Program(exit_code=2 if code is None else code, exits_shell=True)

    def _echo(self, args: Sequence[str]) -> Program:
        newline = "" if args and args[0] == "-n" else "\n"
        words = args if newline else args[1:]
        return Program((Write("stdout", _text(" ".join(words) + newline)),))

    def _cat(self, args: Sequence[str]) -> Program:
        if any(arg != "-" for arg in args):
            return _failure(f"cat: {args[0]}: a mock guest has no files", 1)
        return Program((Cat(),))

    def _sleep(self, args: Sequence[str]) -> Program:
        try:
            seconds = math.inf if args[0] in ("inf", "infinity") else float(args[0])
        except (IndexError, ValueError):
            seconds = -1.0
        if not seconds >= 0:
            return _failure("sleep: give a number of seconds or 'infinity'", 1)
        return Program((Sleep(seconds),))

    def _sh(self, args: Sequence[str]) -> Program:
        if not args:
            return Program((Cat(),))
        if args[0] != "-c" or len(args) < 2:
            return _failure("sh: a mock guest knows 'sh -c' only", 2)
        lexer = shlex.shlex(args[1], posix=True, punctuation_chars=";&|>")
        lexer.whitespace_split = True
        lexer.commenters = ""
        try:
            tokens = list(lexer)
        except ValueError:
            return _failure("sh: unterminated quoted string", 2)
        return self._run_list(tokens)

    def _run_list(self, tokens: list[str]) -> Program:
        """A list of commands: all exit codes are known beforehand, so ``&&`` and ``||`` are decided here."""
        steps: list[Step] = []
        code, skip, command = 0, False, list[str]()
        for word in [*tokens, ";"]:
            if word not in (";", "&&", "||"):
                command.append(word)
                continue
            if command and not skip:
                done = self._redirected(command)
                steps += done.steps
                code = done.exit_code
                if done.exits_shell:
                    break
            command = []
            skip = (word == "&&" and code != 0) or (word == "||" and code == 0)
        return Program(tuple(steps), code)

    def _redirected(self, command: list[str]) -> Program:
        """One command, with its stdout sent to stderr when it ends in ``>&2`` (or ``1>&2``)."""
        if command[-2:] != [">&", "2"]:
            return self.run(command)
        done = self.run(command[: -3 if command[-3:-2] == ["1"] else -2])
        steps = tuple(s if isinstance(s, Sleep) else replace(s, to="stderr") for s in done.steps)
        return replace(done, steps=steps)
