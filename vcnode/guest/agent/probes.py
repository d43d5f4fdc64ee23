"""How the guest agent tries a probe: a command in the container, a TCP connection, an HTTP request.

Everything is non-blocking and belongs to the agent's loop. Containers share the guest's network, so the agent
connects to where they listen.
"""

from __future__ import annotations

import errno
import os
import signal
import socket

from vcnode.guest.agent import process, spawn
from vcnode.guest.agent.execs import signal_session
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.loop import IN, OUT
from vcnode.guest.agent.params import encoded, invalid
from vcnode.guest.health import NAMES, ProbeSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vcnode.guest.agent.entries import Entry
    from vcnode.guest.agent.loop import Loop
    from vcnode.guest.agent.params import Params
    from vcnode.guest.agent.process import ProcessSpec
    from vcnode.guest.agent.spawn import Spawned, Spawner
    from vcnode.guest.health import Done

_LONGEST_MS = 3_600_000
_MOST = 1_000_000
_ANSWER_BYTES = 64
"""How much of an HTTP answer is looked at: its first line says it all."""


class Exec:
    """A command that must end with 0."""

    def __init__(self, args: tuple[bytes, ...]) -> None:
        self.args = args


class Connect:
    """A connection that must come about; *request*: and be answered with a status from 200 to 399."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.address = (host, port)
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.request = request


def parse(params: Params) -> dict[str, ProbeSpec]:
    """Check the ``probes`` of a request; raises `Failure`."""
    found = {}
    for name in NAMES:
        if params.has(name):
            found[name] = _parse(params.object(name))
    params.done()
    return found


def _parse(params: Params) -> ProbeSpec:
    spec = ProbeSpec(
        _action(params),
        initial_delay_s=params.integer("initial_delay_ms", 0, _LONGEST_MS) / 1000,
        period_s=params.integer("period_ms", 1, _LONGEST_MS) / 1000,
        timeout_s=params.integer("timeout_ms", 1, _LONGEST_MS) / 1000,
        success_threshold=params.integer("success_threshold", 1, _MOST),
        failure_threshold=params.integer("failure_threshold", 1, _MOST),
    )
    params.done()
    return spec


def _action(params: Params) -> Exec | Connect:
    kinds = [kind for kind in ("exec", "tcp", "http") if params.has(kind)]
    if len(kinds) != 1:
        raise invalid(params.path("exec"), "exactly one of exec, tcp and http must be given")
    action = params.object(kinds[0])
    found: Exec | Connect
    if kinds[0] == "exec":
        found = Exec(action.array("args", encoded, longest=256))
        if not found.args:
            raise invalid(action.path("args"), "is empty")
    else:
        host, port = action.text("host", longest=64), action.integer("port", 1, 65_535)
        request = encoded(action.text("request", longest=16_384), "request") if kinds[0] == "http" else b""
        found = Connect(host, port, request)
    action.done()
    return found


def connect(loop: Loop, action: Connect, done: Done) -> Callable[[], None]:
    """Try a connection; see `Health.attempt`."""
    return _Connection(loop, action, done).close


class _Connection:
    def __init__(self, loop: Loop, action: Connect, done: Done) -> None:
        self._loop = loop
        self._request = action.request
        self._done = done
        self._answer = b""
        self._sock = socket.socket(action.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            number = self._sock.connect_ex(action.address)
        except (OSError, ValueError):
            number = errno.EINVAL  # no address of its family
        if number not in (0, errno.EINPROGRESS):
            self._end(os.strerror(number))
            return
        self._loop.watch(self._sock.fileno(), OUT, self._connected)

    def close(self) -> None:
        """Give up. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()

    def _end(self, why: str | None) -> None:
        self.close()
        self._done(why)

    def _connected(self, _events: int) -> None:
        if self._sock.fileno() < 0:
            return
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number or not self._request:
            self._end(os.strerror(number) if number else None)
            return
        try:
            count = self._sock.send(self._request)
        except BlockingIOError:
            return
        except OSError as exc:
            self._end(str(exc.strerror))
            return
        self._request = self._request[count:]
        if not self._request:
            self._loop.unwatch(self._sock.fileno())
            self._loop.watch(self._sock.fileno(), IN, self._readable)

    def _readable(self, _events: int) -> None:
        if self._sock.fileno() < 0:
            return
        try:
            data = self._sock.recv(_ANSWER_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._end(str(exc.strerror))
            return
        self._answer += data
        if not data or b"\n" in self._answer or len(self._answer) >= _ANSWER_BYTES:
            self._end(verdict(self._answer))


def verdict(answer: bytes) -> str | None:
    """None when an HTTP answer begins with a status from 200 to 399, else what is wrong with it."""
    words = answer.split(b"\n", 1)[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return "no HTTP answer"
    status = int(words[1][:3])
    return None if 200 <= status < 400 and len(words[1]) == 3 else f"HTTP status {status}"


class Runner:
    """Runs the commands of probes.

    Args:
        loop: Where to wait.
        spawner: Makes processes.
    """

    def __init__(self, loop: Loop, spawner: Spawner) -> None:
        self._loop = loop
        self._spawner = spawner

    def run(self, spec: ProcessSpec, args: tuple[bytes, ...], entry: Entry, done: Done) -> Callable[[], None]:
        """Run *args* as *spec* says, in the container of *entry*; see `Health.attempt`.

        Closes the descriptor that *entry* lends. A command that is given up is killed with all that it
        started in its session, and reaped when it has ended.
        """
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            plan = process.Plan(spec.with_args(args), entry.root, entry.hostname)
            spawned = self._spawner.spawn(plan, (null, null, null), entry)
        except (OSError, Failure) as exc:
            done(exc.message if isinstance(exc, Failure) else str(exc.strerror))
            return _nothing
        finally:
            os.close(null)
            os.close(entry.fds[0])
        return _Command(self._loop, spawned, done).kill


class _Command:
    def __init__(self, loop: Loop, spawned: Spawned, done: Done) -> None:
        self._loop = loop
        self._spawned = spawned
        self._done: Done | None = done
        loop.watch(spawned.pidfd, IN, self._on_end)

    def kill(self) -> None:
        """Give up. Idempotent."""
        if self._done is not None:
            self._done = None
            signal_session(self._spawned, signal.SIGKILL)

    def _on_end(self, _events: int) -> None:
        if self._spawned.pidfd < 0:
            return
        pid, status = os.waitpid(self._spawned.pid, os.WNOHANG)
        if pid == 0:
            return
        outcome: Any = spawn.read_status(self._spawned.status_fd)
        self._loop.unwatch(self._spawned.pidfd)
        os.close(self._spawned.pidfd)
        os.close(self._spawned.status_fd)
        self._spawned.pidfd = -1
        done, self._done = self._done, None
        if done is None:
            return
        code = process.exit_code(status)
        if isinstance(outcome, Failure):
            done(outcome.message)
        else:
            done(f"exit code {code}" if code else None)


def _nothing() -> None:
    """There is nothing to give up."""
