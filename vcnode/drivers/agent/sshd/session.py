"""A session with a guest over one SSH connection."""

from __future__ import annotations

import asyncio
import json
import secrets
import shlex
from collections.abc import Awaitable, Callable, Sequence

import asyncssh

from vcnode.aio import deadline_as, finish
from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.refusing import RefusingSession
from vcnode.drivers.agent.sshd import keys, oci, script
from vcnode.drivers.agent.sshd.process import (
    WINDOW_BYTES,
    Channel,
    ShellChannel,
    SshdConnection,
    SshdProcess,
)
from vcnode.drivers.base import ContainerExited, GuestConnection, RunningProcess, SessionLost
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    NotFoundError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.models.pod import AgentType
from vcnode.models.vm import GuestContainer, GuestContainerState, GuestInfo, GuestProcess

MAX_ANSWER_BYTES = 64 * 1024
SIGNAL_LIMIT_S = 10.0
CLOSE_LIMIT_S = 5.0
TERMINAL = "xterm-256color"


class SshdSession(RefusingSession):
    """A `GuestSession` over SSH: commands, connections, and containers where the guest has a runtime.

    ``configure`` changes nothing: the guest has its addresses from its own set-up.
    """

    def __init__(self, vm_id: str, connection: asyncssh.SSHClientConnection) -> None:
        super().__init__(AgentType.SSHD)
        self._vm_id = vm_id
        self._connection = connection
        self._login: script.Login | None = None
        self._lost: str | None = None
        self._events = EventQueue()
        self._watched: set[str] = set()
        """Containers whose end becomes an event."""

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

    # -- containers, by the guest's runtime -----------------------------------------------------------------

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """See `GuestSession.create_container`. Names of users are looked up in the container's root, now."""
        runtime, cid = self._require_runtime(), container.container_id
        root = oci.root_of(container)
        async with self._bounded("create_container", timeout_s):
            code, answer = await self._sh(oci.prepare(cid, root))
            if code == 3:
                raise AlreadyExistsError(f"The guest has a container {cid}.", container_id=cid)
            try:
                if code != 0:
                    raise AgentError(f"The guest of {self._vm_id} cannot reach {root} (step {code}).")
                text = answer.decode(errors="replace")
                await self._write(cid, "config.json", oci.config(container, oci.Users.read(text)))
                await self._write(cid, "users", text)
            except BaseException:
                await finish(self._ask(self._as_root(oci.delete(runtime, cid))), timeout_s=SIGNAL_LIMIT_S)
                raise

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """See `GuestSession.start_container`, but a program that cannot be executed is an error."""
        line = oci.start(self._require_runtime(), container_id)
        async with self._bounded("start_container", timeout_s):
            code, answer, said = await self._ask_both(self._as_root(line))
            text = answer.decode(errors="replace").strip()
            if code != 0 or not text.isdecimal():
                raise AgentError(
                    f"Container {container_id} does not start:"
                    f" {said.decode(errors='replace').strip()[-500:] or f'exit code {code}'}."
                )
            await self._watch(container_id)
        return int(text)

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """See `GuestSession.signal_container`."""
        line = oci.signal(self._require_runtime(), container_id, number, everyone=everyone)
        await self._tell(self._as_root(line), timeout_s=timeout_s)

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.pause_container`."""
        await self._tell(
            self._as_root(oci.pause(self._require_runtime(), container_id, pause=True)), timeout_s=timeout_s
        )

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.resume_container`."""
        await self._tell(
            self._as_root(oci.pause(self._require_runtime(), container_id, pause=False)), timeout_s=timeout_s
        )

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.delete_container`."""
        self._check()
        if (runtime := self._require_login().runtime) is not None:
            await self._tell(self._as_root(oci.delete(runtime, container_id)), timeout_s=timeout_s)

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """See `GuestSession.list_containers`. From now on the ends of those that run are events."""
        self._check()
        if (runtime := self._require_login().runtime) is None:
            return ()
        async with self._bounded("list_containers", timeout_s):
            _, answer = await self._sh(oci.listing(runtime))
            found = oci.read_listing(answer.decode(errors="replace"))
            for state in found:
                if state.state in ("running", "paused") and state.container_id not in self._watched:
                    await self._watch(state.container_id)
        return found

    async def _watch(self, container_id: str) -> None:
        """Have the end of a running container become an event."""

        def ended(channel: Channel) -> None:
            self._watched.discard(container_id)
            text = b"".join(data for name, data in channel.pieces if name == "stdout").strip()
            if channel.code == 0 and text.isdigit() and len(text) < 4:
                exited = ContainerExited(container_id, int(text), oom_killed=False)
                self._events.push(exited)

        self._watched.add(container_id)
        await self._run(self._as_root(oci.watch(container_id)), Channel(on_close=ended), None)

    async def _execute_in(
        self, container_id: str, process: GuestProcess, tty: tuple[int, int] | None, timeout_s: float
    ) -> RunningProcess:
        runtime, token = self._require_runtime(), secrets.token_hex(16)
        name = f"exec-{token}"
        async with self._bounded("execute", timeout_s):
            states = await self.list_containers(timeout_s=timeout_s)
            state = next((s.state for s in states if s.container_id == container_id), None)
            if state is None:
                raise NotFoundError(f"The guest has no container {container_id}.", container_id=container_id)
            if state != "running":
                raise FailedPreconditionError(f"Container {container_id} is {state}.", state=state)
            _, text = await self._sh(oci.read(container_id, "users"))
            users = oci.Users.read(text.decode(errors="replace"))
            made = json.dumps(users.process(process, tty=tty is not None))
            await self._write(container_id, name, made)
        line = oci.execute(runtime, container_id, name, token, tty=tty is not None)

        async def send_signal(pid: int, number: int) -> None:
            line = oci.signal_executed(container_id, name, number)
            await self._tell(self._as_root(line), timeout_s=SIGNAL_LIMIT_S)

        return await self._started(self._as_root(line), token, tty, send_signal, timeout_s)

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
            return await self._execute_in(container_id, process, tty, timeout_s)
        login = self._require_login()
        token = secrets.token_hex(16)
        line = script.start(process, login, token, tty=tty is not None)
        sudo = script.needs_sudo(process, login)

        async def send_signal(pid: int, number: int) -> None:
            await self._tell(script.signal(number, pid, sudo=sudo), timeout_s=SIGNAL_LIMIT_S)

        return await self._started(line, token, tty, send_signal, timeout_s)

    async def _started(
        self,
        line: str,
        token: str,
        tty: tuple[int, int] | None,
        send_signal: Callable[[int, int], Awaitable[None]],
        timeout_s: float,
    ) -> RunningProcess:
        """Run *line* and wait for the word with *token*."""
        channel = ShellChannel(token, tty=tty is not None)
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

    def _require_runtime(self) -> str:
        self._check()
        runtime = self._require_login().runtime
        if runtime is None:
            raise UnsupportedError(
                f"The guest of {self._vm_id} has no runtime for containers; install"
                f" {' or '.join(script.RUNTIMES)}."
            )
        return runtime

    def _as_root(self, line: str) -> str:
        sudo = "sudo -n " if self._require_login().uid != 0 else ""
        return f"{sudo}/bin/sh -c {shlex.quote(line)}"

    async def _sh(self, line: str) -> tuple[int, bytes]:
        return await self._ask(self._as_root(line))

    async def _write(self, container_id: str, name: str, text: str) -> None:
        """Make a file of a container's bundle."""
        code, _ = await self._ask(self._as_root(oci.write(container_id, name)), text.encode())
        if code != 0:
            raise AgentError(f"The guest of {self._vm_id} cannot write files of container {container_id}.")

    async def _ask(self, line: str, given: bytes = b"") -> tuple[int, bytes]:
        """Run something short with *given* as its input; its exit code and output."""
        code, answer, _ = await self._ask_both(line, given)
        return code, answer

    async def _ask_both(self, line: str, given: bytes = b"") -> tuple[int, bytes, bytes]:
        """The same, with what it says on standard error."""
        channel = Channel()
        await self._run(line, channel, None)
        if given:
            await channel.write(given)
        channel.write_eof()
        answer, said = b"", b""
        try:
            while True:
                await channel.until(lambda: bool(channel.pieces) or channel.ended)
                piece = channel.take()
                if piece is None:
                    break
                if piece[0] == "stdout":
                    answer += piece[1]
                else:
                    said += piece[1]
                if len(answer) + len(said) > MAX_ANSWER_BYTES:
                    raise AgentError(f"The guest of {self._vm_id} answers without an end.")
            await channel.until(lambda: channel.over)
        finally:
            if channel.chan is not None:
                channel.chan.close()
        if channel.code is None:
            raise self._lost_error()
        return channel.code, answer, said

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
