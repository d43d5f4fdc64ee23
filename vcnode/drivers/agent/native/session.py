"""A session with one guest's agent: matches replies to calls and events to those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from vcnode.aio import deadline_as
from vcnode.drivers.agent.events import EventQueue
from vcnode.drivers.agent.native import messages, stats
from vcnode.drivers.agent.native.link import Link
from vcnode.drivers.agent.native.logs import NativeLogFeed
from vcnode.drivers.agent.native.messages import BadFieldError
from vcnode.drivers.agent.native.process import SIGKILL, NativeAttachment, NativeConnection, NativeProcess
from vcnode.drivers.base import CopyDirection, GuestEvent, LogPosition, SessionLost
from vcnode.errors import AgentError, DeadlineExceededError, InvalidArgumentError, VcnodeError
from vcnode.guest import protocol
from vcnode.models.living import ContainerProcess
from vcnode.models.pod import ContainerResources
from vcnode.models.stats import ContainerStats, GuestStats
from vcnode.models.vm import (
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)

T = TypeVar("T")

MAX_STRAYS = 1_000
"""Events that this version does not know, or about processes it does not know, in one session."""
SIGNAL_LIMIT_S = 10.0
"""Seconds for the answer to a signal; the protocol gives that call no limit of its own."""
CLOSE_LIMIT_S = 5.0
"""Seconds for the event loop to close an aborted socket; it takes one turn."""


class NativeSession:
    """A `GuestSession` over one connection to the guest's port."""

    def __init__(self, vm_id: str, host: protocol.Host) -> None:
        self.vm_id = vm_id
        self.link = Link(host, self._on_event, self._on_lost)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the session is open, or lost before it was."""
        self._host = host
        self._info: GuestInfo | None = None
        self._lost: str | None = None
        self._closed = False
        self._waiting: dict[int, asyncio.Future[protocol.ReplyReceived | None]] = {}
        self._on_arrival: dict[int, Callable[[protocol.ReplyReceived], None]] = {}
        """What to do with a reply as soon as it is there, before anything that comes after it, and also when
        nobody waits for it any more."""
        self._settling: dict[str, asyncio.Event] = {}
        """Containers whose creation was given up and is not undone yet; calls about them wait."""
        self._by_stream: dict[int, NativeProcess | NativeLogFeed] = {}
        self._by_id: dict[int, NativeProcess] = {}
        self._events = EventQueue()
        self._strays = 0

    # -- GuestSession ------------------------------------------------------------------------------

    @property
    def info(self) -> GuestInfo:
        """See `GuestSession.info`."""
        if self._info is None:
            raise AgentError(f"The guest agent of {self.vm_id} has not answered yet.")
        return self._info

    async def configure(self, config: GuestConfig, *, timeout_s: float) -> None:
        """See `GuestSession.configure`."""
        await self._call("configure", messages.configure_params(config), timeout_s)

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """See `GuestSession.set_clock`."""
        await self._call("set_clock", {"time_ns": time_ns}, timeout_s)

    async def set_watchdog(self, watchdog: Watchdog, *, timeout_s: float) -> None:
        """See `GuestSession.set_watchdog`."""
        await self._call("set_watchdog", messages.watchdog_params(watchdog), timeout_s)

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """See `GuestSession.create_container`.

        When the answer does not come in time, or the caller is cancelled, the container is deleted as soon
        as the guest says that it made one; calls about the same id wait until that is done.
        """
        container_id = container.container_id
        params = messages.create_container_params(container)
        async with self._bounded("create_container", timeout_s):
            await self._ready(container_id)
            request_id = self._send("create_container", params)
            arrived: list[protocol.ReplyReceived] = []
            self._on_arrival[request_id] = arrived.append
            try:
                await self._reply("create_container", request_id)
            except asyncio.CancelledError:
                self._settling.setdefault(container_id, asyncio.Event())
                if arrived:
                    self._undo_creation(container_id, arrived[0])
                else:
                    self._on_arrival[request_id] = lambda reply: self._undo_creation(container_id, reply)
                raise

    def _undo_creation(self, container_id: str, reply: protocol.ReplyReceived) -> None:
        # An error means that nothing was made: what has this id then is an older container.
        delete_id = None
        if reply.error is None:
            delete_id = self._send_unasked("delete_container", {"container_id": container_id})
        if delete_id is None:
            self._settle(container_id)
        else:
            self._on_arrival[delete_id] = lambda _: self._settle(container_id)

    def _settle(self, container_id: str) -> None:
        if (settled := self._settling.pop(container_id, None)) is not None:
            settled.set()

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """See `GuestSession.start_container`. Whether it started is unknown after a time-out."""
        params = {"container_id": container_id}
        result = await self._call("start_container", params, timeout_s, container_id)
        return self._checked(lambda: messages.pid(result))

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """See `GuestSession.signal_container`."""
        params = {"container_id": container_id, "signal": number, "everyone": everyone}
        await self._call("signal_container", params, timeout_s, container_id)

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.pause_container`."""
        await self._call("pause_container", {"container_id": container_id}, timeout_s, container_id)

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.resume_container`."""
        await self._call("resume_container", {"container_id": container_id}, timeout_s, container_id)

    async def update_container(
        self, container_id: str, resources: ContainerResources, *, timeout_s: float
    ) -> None:
        """See `GuestSession.update_container`."""
        params = messages.update_container_params(container_id, resources)
        await self._call("update_container", params, timeout_s, container_id)

    async def available_memory(self, *, timeout_s: float) -> int:
        """See `GuestSession.available_memory`."""
        result = await self._call("memory", {}, timeout_s)
        return self._checked(lambda: messages.available_bytes(result))

    async def list_processes(
        self, container_id: str, *, limit: int, timeout_s: float
    ) -> tuple[Sequence[ContainerProcess], int]:
        """See `GuestSession.list_processes`."""
        params = {"container_id": container_id, "limit": limit}
        result = await self._call("list_processes", params, timeout_s, container_id)
        return self._checked(lambda: messages.processes(result, limit))

    async def read_stats(self, *, timeout_s: float) -> tuple[GuestStats, Sequence[ContainerStats]]:
        """See `GuestSession.read_stats`."""
        result = await self._call("stats", {}, timeout_s)
        return self._checked(lambda: (stats.guest(result), stats.containers(result)))

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """See `GuestSession.delete_container`."""
        await self._call("delete_container", {"container_id": container_id}, timeout_s, container_id)

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """See `GuestSession.list_containers`."""
        result = await self._call("list_containers", {}, timeout_s)
        return self._checked(lambda: messages.container_states(result))

    async def follow_logs(self, known: Mapping[str, LogPosition], *, timeout_s: float) -> NativeLogFeed:
        """See `GuestSession.follow_logs`."""
        async with self._bounded("follow_logs", timeout_s):
            await self._ready()
            feed = NativeLogFeed(self, self._host.new_stream(sending=False))
            self._by_stream[feed.stream] = feed
            try:
                request_id = self._send("follow_logs", messages.follow_logs_params(feed.stream, known))
                await self._reply("follow_logs", request_id)
            except asyncio.CancelledError:
                await feed.close()
                raise
            except VcnodeError:
                self._by_stream.pop(feed.stream, None)
                self._host.forget(feed.stream)
                raise
        return feed

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> NativeProcess:
        """See `GuestSession.execute`. A process whose start nobody waits for any more is killed."""
        return await self._run(
            "execute",
            container_id,
            lambda **streams: messages.execute_params(process, container_id, tty, **streams),
            timeout_s,
            with_stderr=tty is None,
        )

    async def copy(
        self, direction: CopyDirection, *, container_id: str, path: str, max_bytes: int, timeout_s: float
    ) -> NativeProcess:
        """See `GuestSession.copy`."""
        return await self._run(
            "copy",
            container_id,
            lambda **streams: {
                "container_id": container_id,
                "direction": direction,
                "path": path,
                "max_bytes": max_bytes,
                "streams": streams,
            },
            timeout_s,
        )

    async def attach(self, container_id: str, *, tty: bool, timeout_s: float) -> NativeProcess:
        """See `GuestSession.attach`."""
        return await self._run(
            "attach",
            container_id,
            lambda **streams: {"container_id": container_id, "streams": streams},
            timeout_s,
            with_stderr=not tty,
            kind=NativeAttachment,
        )

    async def connect_port(self, port: int, *, timeout_s: float) -> NativeConnection:
        """See `GuestSession.connect_port`."""
        async with self._bounded("connect", timeout_s):
            await self._ready()
            up, down = self._host.new_stream(sending=True), self._host.new_stream(sending=False)
            connection = NativeConnection(self, stdin=up, stdout=down, stderr=None)
            self._by_stream |= dict.fromkeys(connection.streams, connection)
            params = {"port": port, "streams": {"up": up, "down": down}}
            await self._start(
                "connect", params, connection, lambda reply: self._on_connect(connection, reply)
            )
        return connection

    async def _run(
        self,
        method: str,
        container_id: str | None,
        params: Callable[..., dict[str, Any]],
        timeout_s: float,
        *,
        with_stderr: bool = True,
        kind: type[NativeProcess] = NativeProcess,
    ) -> NativeProcess:
        """Open the streams, for output may come before the reply does, and start a process."""
        async with self._bounded(method, timeout_s):
            await self._ready(container_id)
            stdin, stdout = self._host.new_stream(sending=True), self._host.new_stream(sending=False)
            stderr = self._host.new_stream(sending=False) if with_stderr else None
            running = kind(self, stdin=stdin, stdout=stdout, stderr=stderr)
            self._by_stream |= dict.fromkeys(running.streams, running)
            made = params(stdin=stdin, stdout=stdout, stderr=stderr)
            await self._start(method, made, running, lambda reply: self._on_start(running, reply))
        return running

    async def _start(
        self,
        method: str,
        params: dict[str, Any],
        running: NativeProcess,
        on_reply: Callable[[protocol.ReplyReceived], None],
    ) -> None:
        try:
            request_id = self._send(method, params)
        except VcnodeError:
            self._forget_streams(running)
            raise
        self._on_arrival[request_id] = on_reply
        try:
            await self._reply(method, request_id)
        except asyncio.CancelledError:
            running.discard()
            raise

    def _on_connect(self, connection: NativeConnection, reply: protocol.ReplyReceived) -> None:
        if reply.result is None:
            self._forget_streams(connection)
        else:
            connection.connected()

    async def ping(self, *, timeout_s: float) -> None:
        """See `GuestSession.ping`."""
        await self._call("ping", {}, timeout_s)

    async def shutdown(self, *, timeout_s: float) -> None:
        """See `GuestSession.shutdown`."""
        await self._call("shutdown", {}, timeout_s)

    def events(self) -> AsyncIterator[GuestEvent]:
        """See `GuestSession.events`. For one reader: an event goes to whoever asks first."""
        return self._events.read()

    async def close(self) -> None:
        """See `GuestSession.close`."""
        if not self._closed:
            self._closed = True
            self._events.end()
            self._wake_all()
        self.link.abort()
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await self.link.gone()

    # -- for the processes: `process.Owner` --------------------------------------------------------

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        if self._lost is not None:
            raise AgentError(f"The session with the guest agent of {self.vm_id} was lost: {self._lost}")
        if self._closed:
            raise AgentError(f"The session with the guest agent of {self.vm_id} is closed.")

    def send_data(self, stream: int, data: memoryview) -> int | None:
        """Send what credit allows; None when the guest takes no more of this stream."""
        if not self._host.is_sending(stream):
            return None
        count = self._host.send_data(stream, data)
        self.link.flush()
        return count

    def send_eof(self, stream: int) -> None:
        """End a stream."""
        self._host.send_eof(stream)
        self.link.flush()

    def send_reset(self, stream: int) -> None:
        """Refuse the rest of a stream."""
        self._host.send_reset(stream)
        self.link.flush()

    def consumed(self, stream: int, count: int) -> None:
        """Let the guest send more of a stream."""
        self._host.consumed(stream, count)
        self.link.flush()

    def fail(self, reason: str) -> None:
        """End the session: the guest breaks the rules."""
        self.link.fail(reason)

    async def writable(self) -> None:
        """Wait until the port takes more."""
        await self.link.writable()

    async def signal_process(self, process_id: int, number: int) -> None:
        """Send a signal and wait for the answer."""
        await self._call("signal_process", {"process_id": process_id, "signal": number}, SIGNAL_LIMIT_S)

    async def resize_process(self, process_id: int, rows: int, columns: int) -> None:
        """Set the size of a terminal and wait for the answer."""
        params = {"process_id": process_id, "rows": rows, "columns": columns}
        await self._call("resize_process", params, SIGNAL_LIMIT_S)

    def detach_process(self, process_id: int) -> None:
        """Detach without waiting for the answer."""
        self._send_unasked("detach", {"process_id": process_id})

    def kill_process(self, process_id: int) -> None:
        """Send SIGKILL without waiting for the answer."""
        self._send_unasked("signal_process", {"process_id": process_id, "signal": SIGKILL})

    # -- calls -------------------------------------------------------------------------------------

    def _bounded(self, method: str, timeout_s: float) -> AbstractAsyncContextManager[None]:
        return deadline_as(
            timeout_s,
            lambda: DeadlineExceededError(
                f"The guest agent of {self.vm_id} did not answer {method} within {timeout_s:g} s.",
                method=method,
            ),
        )

    async def _call(
        self, method: str, params: Mapping[str, Any], timeout_s: float, container_id: str | None = None
    ) -> dict[str, Any]:
        """Ask and wait for the result.

        Raises:
            AgentError: The session is or was lost, or the guest failed.
            DeadlineExceededError: No answer in time; a late one is dropped.
            RequestError: The guest refused, see `messages.error`.
        """
        async with self._bounded(method, timeout_s):
            await self._ready(container_id)
            return await self._reply(method, self._send(method, params))

    async def _ready(self, container_id: str | None = None) -> None:
        self.check()
        while container_id is not None and (settled := self._settling.get(container_id)):
            await settled.wait()
            self.check()
        await self.link.writable()
        self.check()

    def _send(self, method: str, params: Mapping[str, Any]) -> int:
        try:
            request_id = self._host.send_request(method, params)
        except protocol.TooLargeError as exc:
            raise InvalidArgumentError(f"The request {method} is too large for the guest agent.") from exc
        except protocol.LocalError as exc:
            self.link.fail("The guest agent has left too many requests without an answer.")
            raise AgentError(f"The guest agent of {self.vm_id} answers no more.") from exc
        self.link.flush()
        return request_id

    def _send_unasked(self, method: str, params: Mapping[str, Any]) -> int | None:
        """Send a request whose answer nobody awaits; None when the session is over."""
        if self._lost is not None or self._closed:
            return None
        try:
            return self._send(method, params)
        except AgentError:
            return None  # the session was just lost, and all who wait know it

    async def _reply(self, method: str, request_id: int) -> dict[str, Any]:
        waiter: asyncio.Future[protocol.ReplyReceived | None] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = waiter
        try:
            reply = await waiter
        finally:
            self._waiting.pop(request_id, None)
        if reply is None:
            self.check()
            raise AgentError(f"The session with the guest agent of {self.vm_id} is over.")
        if reply.error is not None:
            raise messages.error(method, *reply.error)
        return reply.result or {}

    def _checked(self, read: Callable[[], T]) -> T:
        """What *read* makes of a result; a guest that sends nonsense loses its session."""
        try:
            return read()
        except BadFieldError as exc:
            self.link.fail(f"The guest sent a bad {exc}.")
            raise AgentError(f"The guest agent of {self.vm_id} sent a bad {exc}.") from exc

    # -- what comes in -----------------------------------------------------------------------------

    def _on_event(self, event: protocol.Event) -> None:
        try:
            self._dispatch(event)
        except BadFieldError as exc:
            self.link.fail(f"The guest sent a bad {exc}.")

    def _dispatch(self, event: protocol.Event) -> None:
        match event:
            case protocol.DataReceived(stream, data):
                if (process := self._by_stream.get(stream)) is not None:
                    process.on_data(stream, data)
            case protocol.CreditReceived(stream):
                if (process := self._by_stream.get(stream)) is not None:
                    process.wake()
            case protocol.EofReceived(stream):
                if (process := self._by_stream.pop(stream, None)) is not None:
                    process.on_eof(stream)
            case protocol.ResetReceived(stream):
                if (process := self._by_stream.pop(stream, None)) is not None:
                    process.wake()
            case protocol.ReplyReceived(request_id):
                self._on_reply(request_id, event)
            case protocol.EventReceived(name, fields):
                self._on_guest_event(name, fields)
            case protocol.SessionStarted(hello):
                self._info = messages.guest_info(hello)
                self._open()

    def _on_reply(self, request_id: int, reply: protocol.ReplyReceived) -> None:
        if (on_arrival := self._on_arrival.pop(request_id, None)) is not None:
            on_arrival(reply)
        waiter = self._waiting.get(request_id)
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def _on_start(self, running: NativeProcess, reply: protocol.ReplyReceived) -> None:
        if reply.result is None:
            self._forget_streams(running)
            return
        process_id = messages.process_id(reply.result)
        if process_id in self._by_id:
            raise BadFieldError("process_id")
        self._by_id[process_id] = running
        running.started(process_id)

    def _on_guest_event(self, name: str, fields: dict[str, Any]) -> None:
        if name in ("container_exited", "container_health"):
            read = messages.container_exited if name == "container_exited" else messages.container_health
            if not self._events.push(read(fields)):
                self.link.fail("The guest sends events faster than they are read.")
            return
        if name == "process_exited":
            exit_code = messages.exit_code(fields)
            process = self._by_id.pop(messages.process_id(fields), None)
            if process is not None:
                self._drop_streams(process)
                process.on_exit(exit_code)
                return
        self._strays += 1
        if self._strays > MAX_STRAYS:
            self.link.fail("The guest floods the node with events that mean nothing.")

    def _forget_streams(self, running: NativeProcess) -> None:
        """Undo the opening of streams that the guest never learned of, or refused."""
        self._drop_streams(running)
        for stream in running.streams:
            self._host.forget(stream)

    def _drop_streams(self, running: NativeProcess) -> None:
        for stream in running.streams:
            self._by_stream.pop(stream, None)

    def _open(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)

    def _on_lost(self, reason: str) -> None:
        self._lost = reason
        self._events.end(SessionLost(reason))
        self._wake_all()

    def _wake_all(self) -> None:
        self._open()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_result(None)
        for settled in self._settling.values():
            settled.set()
        for process in {*self._by_stream.values(), *self._by_id.values()}:
            process.wake()
        self._settling.clear()
        self._on_arrival.clear()
