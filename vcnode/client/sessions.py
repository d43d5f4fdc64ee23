"""Sessions: the streams of an exec, attach, copy or port-forward, as async context managers.

::

    async with node.exec_stream("web", "main", ["sort"]) as process:
        await process.stdin.write(b"b\\na\\n")
        await process.stdin.close()
        async for name, chunk in process.output():
            ...
        print(await process.wait())

No byte is lost, doubled or reordered, also when the connection of either side is lost in between. Whoever
does not read holds the process up, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, Self

import nats.errors

from vcnode import aio
from vcnode.bus.library import uncancelled
from vcnode.errors import UnavailableError, VcnodeError, from_code
from vcnode.models.sessions import Session, TerminalSize
from vcnode.sessions.carrier import Carrier, OverError
from vcnode.sessions.endpoint import Dismissed, Endpoint
from vcnode.sessions.frames import CONTROL_UP, STDERR, STDIN, STDOUT, Channel, Parts

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from vcnode.client.requests import Requester

NODE_SILENT_S = 60.0
"""Seconds of a node's silence, while this client is connected, after which a session counts as lost."""
LEAVE_S = 5.0
"""Seconds for a session to end in good order when its block is left early."""
RESERVE_BYTES = 1024

Opening = Callable[[], Awaitable[Session]]
OutputName = Literal["stdout", "stderr"]
_NAMES: dict[int, OutputName] = {STDOUT: "stdout", STDERR: "stderr"}


class SessionClient:
    """What all sessions share: subscriptions, the task that sends, and the end.

    Args:
        requester: The connection.
        opening: Asks the node for the session.
    """

    def __init__(self, requester: Requester, opening: Opening) -> None:
        self._requester = requester
        self._opening = opening
        self._tasks = aio.Tasks()
        self._subscriptions: list[Subscription] = []
        self._unwatch: Callable[[], None] = lambda: None
        self._left = False
        self._end_seen = asyncio.Event()
        self._error: VcnodeError | None = None
        self._opening_connections: dict[int, asyncio.Future[None]] = {}
        self.info: Session
        """The session, as the node described it."""
        self._carrier: Carrier

    @property
    def session_id(self) -> str:
        """Names the session, for `NodeClient.session_resume`; a secret."""
        return self.info.session_id

    async def __aenter__(self) -> Self:
        self.info = info = await self._opening()
        chunk = min(info.chunk_bytes, self._requester.client.max_payload - RESERVE_BYTES)
        endpoint = Endpoint(
            client=True, epoch=info.epoch, window=info.window_bytes, chunk=chunk, now=Carrier.now()
        )
        self._carrier = Carrier(endpoint, self._publish)
        for position in info.streams:
            self._carrier.open(position.stream, position.offset)
        self._unwatch = self._requester.watch(self._on_connection)
        try:
            await self._subscribe()
        except BaseException:
            await self._release()
            raise
        self._tasks.spawn(self._carrier.run(), name="session sender")
        self._tasks.spawn(self._watch_node(), name="session watch")
        self._tasks.spawn(self._hear(), name="session messages")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await aio.finish(self._leave(), timeout_s=3 * LEAVE_S)

    async def _leave(self) -> None:
        """End in good order, at most LEAVE_S: the node knows then that it need not wait for us."""
        carrier = self._carrier
        if carrier.over is None and not self._left:
            with contextlib.suppress(TimeoutError, OverError):
                async with asyncio.timeout(LEAVE_S):
                    if not self._end_seen.is_set():
                        await carrier.send_message({"close": True})
                    for position in self.info.streams:
                        if position.stream & 1 and position.stream in _NAMES:
                            carrier.refuse(position.stream)
                    await self._end_seen.wait()
                    await carrier.flush()
        await self._release()

    async def _release(self) -> None:
        self._unwatch()
        self._carrier.close(Dismissed("unavailable", "The session was left."))
        await self._tasks.close()
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(subscription.unsubscribe())
        self._subscriptions.clear()

    async def ended(self) -> VcnodeError:
        """Wait until the session is over; why it is."""
        await self._end_seen.wait()
        return self._failure()

    async def detach(self) -> None:
        """Leave the session running; `NodeClient.session_resume` goes on with it.

        The node keeps it for ``keep_s``. What this client has not read the next one gets.
        """
        self._carrier.endpoint.acknowledge(Carrier.now())
        with contextlib.suppress(OverError):
            await self._carrier.send_message({"detach": True})
            async with asyncio.timeout(LEAVE_S):
                while self._carrier.endpoint.is_pending(CONTROL_UP) and self._carrier.over is None:
                    await self._carrier.next_change()
        self._left = True

    # -- the bus -----------------------------------------------------------------------------------

    async def _subscribe(self) -> None:
        subjects = self.info.subjects
        client = self._requester.client
        try:
            for subject in (subjects.stdout, subjects.stderr, subjects.control):
                self._subscriptions.append(await uncancelled(client.subscribe(subject, cb=self._on_message)))
            await uncancelled(client.flush())
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            raise UnavailableError("The session's streams could not be subscribed to.") from exc

    async def _on_message(self, msg: Msg) -> None:
        self._carrier.receive(msg.data)

    async def _publish(self, channel: Channel, parts: Parts) -> None:
        subject: str = getattr(self.info.subjects, channel)
        try:
            await uncancelled(self._requester.client.publish_parts(subject, parts))
        except (nats.errors.Error, OSError) as exc:
            raise UnavailableError("A frame of a session could not be handed to NATS.") from exc

    def _on_connection(self) -> None:
        self._carrier.endpoint.heard_at = Carrier.now()
        if self._requester.client.is_closed:
            self._carrier.close(Dismissed("unavailable", "The connection to NATS was closed."))
        self._carrier.probe()

    async def _watch_node(self) -> None:
        endpoint = self._carrier.endpoint
        while (left := endpoint.heard_at + NODE_SILENT_S - Carrier.now()) > 0:
            await asyncio.sleep(left)
            if not self._requester.client.is_connected:
                endpoint.heard_at = Carrier.now()
        self._carrier.close(
            Dismissed("unavailable", f"Nothing was heard of the node for {NODE_SILENT_S:g} s.")
        )

    # -- what the node says ------------------------------------------------------------------------

    async def _hear(self) -> None:
        try:
            while (message := await self._carrier.message()) is not None:
                self._on_node_message(message)
        finally:
            self._end_seen.set()
            self._on_over()

    def _on_node_message(self, message: dict[str, Any]) -> None:
        raise NotImplementedError

    def _on_over(self) -> None:
        """No more messages will come."""

    def _failure(self) -> VcnodeError:
        if self._error is not None:
            return self._error
        over = self._carrier.over
        if over is None:
            return UnavailableError("The session ended without a word.")
        return from_code(over.code, over.message, {})


class Stdin:
    """Standard input of a process."""

    def __init__(self, carrier: Callable[[], Carrier]) -> None:
        self._carrier = carrier

    async def write(self, data: bytes | memoryview) -> None:
        """Write; waits while the process does not read. Dropped silently when it reads no more."""
        with contextlib.suppress(OverError):
            await self._carrier().write(STDIN, data)

    async def close(self) -> None:
        """Signal the end of input. Idempotent."""
        self._carrier().end(STDIN)


class ProcessStream(SessionClient):
    """A process in a pod with its streams; enter it with ``async with``."""

    def __init__(self, requester: Requester, opening: Opening) -> None:
        super().__init__(requester, opening)
        self._exit_code: int | None = None
        self.stdin = Stdin(lambda: self._carrier)
        """Its standard input."""

    def _on_node_message(self, message: dict[str, Any]) -> None:
        match message:
            case {"exit": {"exit_code": int(code)}}:
                self._exit_code = code
            case {"error": {"code": str(code), "message": str(text)}}:
                self._error = from_code(code, text, {})

    async def output(self) -> AsyncIterator[tuple[OutputName, bytes]]:
        """Chunks as they come, until both outputs have ended. To be iterated once.

        Raises:
            VcnodeError: The session was lost; what came before was given.
        """
        while (found := await self._carrier.read_any((STDOUT, STDERR))) is not None:
            yield _NAMES[found[0]], bytes(found[1])
        if self._carrier.over is not None and self._exit_code is None:
            raise self._failure()

    async def wait(self) -> int:
        """The exit code; waits for the end. Output that nobody reads keeps the process from ending.

        Raises:
            VcnodeError: There is none: the session was ended, or the guest was lost.
        """
        await self._end_seen.wait()
        if self._exit_code is not None:
            return self._exit_code
        raise self._failure()

    async def signal(self, number: int) -> None:
        """Send a signal to the process and all in its session."""
        await self._say({"signal": int(number)})

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""
        size = TerminalSize(rows=rows, columns=columns)
        await self._say({"resize": size.model_dump()})

    def signal_soon(self, number: int) -> None:
        """As `signal`, from where nothing can be awaited; dropped when too much waits to be sent."""
        self._say_soon({"signal": int(number)})

    def resize_soon(self, rows: int, columns: int) -> None:
        """As `resize`, from where nothing can be awaited."""
        self._say_soon({"resize": {"rows": rows, "columns": columns}})

    def _say_soon(self, message: dict[str, Any]) -> None:
        endpoint = self._carrier.endpoint
        if endpoint.message_room:
            endpoint.send_message(message, Carrier.now())
            self._carrier.wake()

    async def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OverError):
            await self._carrier.send_message(message)


class CopyIn(ProcessStream):
    """A tar stream on its way into a container: `write` it, then `finish`."""

    async def write(self, data: bytes) -> None:
        """Send a piece of the archive."""
        await self.stdin.write(data)

    async def finish(self) -> None:
        """End the archive and wait until all of it is unpacked.

        Raises:
            InvalidArgumentError: It is no archive, or an entry would lead out of it.
            FailedPreconditionError: It has more bytes than are allowed.
            NotFoundError: There is no such directory.
            VcnodeError: A file could not be made.
        """
        await self.stdin.close()
        await self.wait()


class CopyOut(ProcessStream):
    """A tar stream on its way out of a container: iterate over `pieces`."""

    async def pieces(self) -> AsyncIterator[bytes]:
        """The archive, piece by piece. Raises as `CopyIn.finish`, when the copy failed, after the last."""
        await self.stdin.close()
        async for _, chunk in self.output():
            yield chunk
        await self.wait()
