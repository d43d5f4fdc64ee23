"""A session with a guest over one SSH connection."""

from __future__ import annotations

import asyncio
import secrets
import shlex

import asyncssh

from vcnode.aio import deadline_as
from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.refusing import RefusingSession
from vcnode.drivers.agent.sshd import keys, script
from vcnode.drivers.agent.sshd.process import (
    WINDOW_BYTES,
    Channel,
    ShellChannel,
    SshdConnection,
    SshdProcess,
)
from vcnode.drivers.base import GuestConnection, RunningProcess, SessionLost
from vcnode.errors import AgentError, DeadlineExceededError, VcnodeError
from vcnode.models.pod import AgentType
from vcnode.models.vm import GuestInfo, GuestProcess

MAX_ANSWER_BYTES = 64 * 1024
SIGNAL_LIMIT_S = 10.0
CLOSE_LIMIT_S = 5.0
TERMINAL = "xterm-256color"


class SshdSession(RefusingSession):
    """A `GuestSession` over SSH: commands and connections; there are no containers.

    ``configure`` changes nothing: the guest has its addresses from its own set-up.
    """

    def __init__(self, vm_id: str, connection: asyncssh.SSHClientConnection) -> None:
        super().__init__(AgentType.SSHD)
        self._vm_id = vm_id
        self._connection = connection
        self._login: script.Login | None = None
        self._lost: str | None = None
        self._events = EventQueue()

    # -- called by the agent ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Learn who we are in the guest, and what it has.

        Raises:
            AgentError: There is no POSIX shell.
        """
        code, answer = await self._ask(f"exec /bin/sh -c {shlex.quote(script.LOOK)}")
        self._login = script.Login.read(answer.decode(errors="replace"))
        if self._login is None:
            raise AgentError(
                f"The SSH server of {self._vm_id} gives no POSIX shell on Linux (exit code {code})."
            )

    def on_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        if self._lost is None:
            self._lost = str(exc) if exc is not None else "the guest closed the connection"
            self._events.end(None if self._closed.is_set() else SessionLost(self._lost))

    # -- GuestSession ----------------------------------------------------------------------------------------

    @property
    def info(self) -> GuestInfo:
        """See `GuestSession.info`."""
        login = self._require_login()
        key = self._connection.get_server_host_key()
        return GuestInfo(
            agent_version=str(self._connection.get_extra_info("server_version"))[:256],
            boot_id=login.boot_id,
            kernel=login.kernel,
            host_key=None if key is None else keys.public_line(key),
        )

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> RunningProcess:
        """See `GuestSession.execute`."""
        self._check()
        if container_id is not None:
            self._refuse("containers")
        login = self._require_login()
        token = secrets.token_hex(16)
        line = script.start(process, login, token, tty=tty is not None)
        channel = ShellChannel(token, tty=tty is not None)
        sudo = script.needs_sudo(process, login)

        async def send_signal(pid: int, number: int) -> None:
            await self._tell(script.signal(number, pid, sudo=sudo), timeout_s=SIGNAL_LIMIT_S)

        running = SshdProcess(channel, tty=tty is not None, send_signal=send_signal, lost=self._lost_error)
        try:
            async with self._bounded("execute", timeout_s):
                await self._run(line, channel, tty)
                await channel.started()
        except asyncio.CancelledError:
            if channel.chan is not None:
                channel.chan.abort()
            raise
        except VcnodeError:
            if channel.chan is not None:
                channel.chan.abort()
            raise
        if channel.code is None and channel.lost is not None:
            raise self._lost_error()
        return running

    async def connect_port(self, port: int, *, timeout_s: float) -> GuestConnection:
        """See `GuestSession.connect_port`."""
        self._check()
        async with self._bounded("connect_port", timeout_s):
            return await SshdConnection.open(self._connection, port)

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """See `GuestSession.set_clock`."""
        line = f"date -u -s @{time_ns // 1_000_000_000}"
        sudo = "sudo -n " if self._require_login().uid != 0 else ""
        await self._tell(f"{sudo}{line}", timeout_s=timeout_s)

    async def ping(self, *, timeout_s: float) -> None:
        """See `GuestSession.ping`."""
        await self._tell(":", timeout_s=timeout_s)

    async def shutdown(self, *, timeout_s: float) -> None:
        """See `GuestSession.shutdown`: returns once the guest has been told, whether or not it answers."""
        sudo = "sudo -n " if self._require_login().uid != 0 else ""
        channel = Channel()
        async with self._bounded("shutdown", timeout_s):
            quoted = shlex.quote(script.POWER_OFF)
            await self._run(f"{sudo}/bin/sh -c {quoted} >/dev/null 2>&1", channel, None)
            await channel.until(lambda: channel.over)

    def events(self):  # type: ignore[no-untyped-def]
        """See `GuestSession.events`: nothing but the loss of the session."""
        return self._events.read()

    async def close(self) -> None:
        """See `GuestSession.close`: the server ends what was started over the connection."""
        await super().close()
        self._events.end()
        self._connection.close()
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self._connection.wait_closed()
        except TimeoutError:
            self._connection.abort()

    # -- helpers ---------------------------------------------------------------------------------------------

    async def _ask(self, line: str) -> tuple[int, bytes]:
        """Run something short; its exit code and output."""
        channel = Channel()
        await self._run(line, channel, None)
        answer = b""
        try:
            while True:
                await channel.until(lambda: bool(channel.pieces) or channel.ended)
                piece = channel.take()
                if piece is None:
                    break
                answer += piece[1] if piece[0] == "stdout" else b""
                if len(answer) > MAX_ANSWER_BYTES:
                    raise AgentError(f"The guest of {self._vm_id} answers without an end.")
            await channel.until(lambda: channel.over)
        finally:
            if channel.chan is not None:
                channel.chan.close()
        if channel.code is None:
            raise self._lost_error()
        return channel.code, answer

    async def _tell(self, line: str, *, timeout_s: float) -> None:
        self._check()
        async with self._bounded("a command", timeout_s):
            await self._ask(line)

    async def _run(self, line: str, channel: Channel, tty: tuple[int, int] | None) -> None:
        """Open *channel* and run *line* there.

        Raises:
            AgentError: The connection is lost, or the server refuses.
        """
        try:
            await self._connection.create_session(
                lambda: channel,
                line,
                encoding=None,
                window=WINDOW_BYTES,
                request_pty=tty is not None,
                term_type=None if tty is None else TERMINAL,
                term_size=() if tty is None else (tty[1], tty[0]),
            )
        except (asyncssh.Error, OSError) as exc:
            if self._lost is not None:
                raise self._lost_error() from exc
            raise AgentError(f"The SSH server of {self._vm_id} does not run commands: {exc}") from exc

    def _bounded(self, what: str, timeout_s: float):  # type: ignore[no-untyped-def]
        late = lambda: DeadlineExceededError(  # noqa: E731
            f"{what} in the guest of {self._vm_id} was not done within {timeout_s:g} s."
        )
        return deadline_as(timeout_s, late)

    def _check(self) -> None:
        super()._check()
        if self._lost is not None:
            raise self._lost_error()

    def _lost_error(self) -> AgentError:
        return AgentError(
            f"The SSH session with {self._vm_id} was lost: {self._lost or 'its channel was closed'}."
        )

    def _require_login(self) -> script.Login:
        if self._login is None:
            raise AgentError(f"The guest of {self._vm_id} has not answered yet.")
        return self._login
