"""A VM and a guest's end of its port, for tests of the native agent driver over a real UNIX socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from vcnode.drivers.agent.native import NativeAgent
from vcnode.drivers.agent.native.session import NativeSession
from vcnode.drivers.base import Vm
from vcnode.guest import protocol
from vcnode.models.pod import HypervisorType
from vcnode.models.vm import VmExit, VmRecord

VM_ID = "vm-0123456789ab"
IDENTITY = {"agent_version": "1.2", "boot_id": "b007", "kernel": "6.1"}
LIMIT_S = 5.0


class FakeVm:
    """A VM of which there is a socket and an end."""

    def __init__(self, agent_socket: Path, vm_id: str = VM_ID) -> None:
        self._agent_socket = agent_socket
        self.record = VmRecord(
            vm_id=vm_id, uuid="u", directory=str(agent_socket.parent), type=HypervisorType.MOCK
        )
        self.ended = asyncio.Event()
        self.paused = False

    def channel(self, channel_id: str) -> Path:
        """The one socket."""
        return self._agent_socket

    async def wait(self) -> VmExit:
        """Wait for `ended`."""
        await self.ended.wait()
        return VmExit(expected=False, reason="The test ended it.")

    @property
    def as_vm(self) -> Vm:
        """For callers that want the whole Protocol."""
        return cast(Vm, self)


class RefusalError(Exception):
    """Raised by a method of a `ScriptedGuest` to answer with an error."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message


Method = Callable[[dict[str, Any]], Mapping[str, Any] | None]


class ScriptedGuest:
    """A guest that behaves by the codec, unless told otherwise.

    Attributes:
        methods: What answers a request: a result, None for silence, or `RefusalError`.
        core: The codec of the connection, to send what a good guest would.
        requests: All requests that came.
        events: Everything else that the codec told.
        deaf: While set, what comes is read and dropped.
        greedy: While set, what comes on a stream is consumed at once.
    """

    def __init__(self, path: Path, *, window: int = protocol.DEFAULT_WINDOW) -> None:
        self.path = path
        self.core = protocol.Guest(dict(IDENTITY), window)
        self.methods: dict[str, Method] = {"ping": lambda _: {}}
        self.requests: list[protocol.RequestReceived] = []
        self.events: list[protocol.Event] = []
        self.deaf = False
        self.greedy = False
        self.connected = asyncio.Event()
        self.hung_up = asyncio.Event()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.received_bytes = 0

    async def __aenter__(self) -> ScriptedGuest:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.transport.abort()
            await asyncio.wait_for(self.hung_up.wait(), LIMIT_S)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.hung_up.clear()
        self.connected.set()
        try:
            while data := await reader.read(65536):
                self.received_bytes += len(data)
                if not self.deaf:
                    self._receive(data)
                async with self._changed:
                    self._changed.notify_all()
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.hung_up.set()

    def _receive(self, data: bytes) -> None:
        for event in self.core.receive_data(data):
            if isinstance(event, protocol.RequestReceived):
                self.requests.append(event)
                self._answer(event)
                continue
            self.events.append(event)
            if self.greedy and isinstance(event, protocol.DataReceived):
                self.core.consumed(event.stream, len(event.data))
            if self.greedy and isinstance(event, protocol.BulkReceived):
                self.core.consumed(event.stream, sum(map(len, event.pieces)))
        self.flush()

    def _answer(self, request: protocol.RequestReceived) -> None:
        try:
            result = self.methods[request.method](request.params)
        except RefusalError as refusal:
            self.core.send_error(request, refusal.code, refusal.message)
        else:
            if result is not None:
                self.core.send_reply(request, result)

    def flush(self) -> None:
        """Write what the codec wants to send."""
        self.send_raw(self.core.data_to_send())

    def send_raw(self, data: bytes) -> None:
        """Write bytes of any kind."""
        assert self._writer is not None
        if data:
            self._writer.write(data)

    def hang_up(self) -> None:
        """Close the connection as a dying QEMU does."""
        assert self._writer is not None
        self._writer.transport.abort()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that came makes *condition* true."""
        async with asyncio.timeout(LIMIT_S), self._changed:
            await self._changed.wait_for(condition)

    def named(self, method: str) -> list[dict[str, Any]]:
        """Params of the requests for *method* so far."""
        return [request.params for request in self.requests if request.method == method]

    # -- the methods of processes ------------------------------------------------------------------

    def run_processes(self) -> None:
        """Answer ``execute``: opens the streams, does nothing by itself, numbers processes from 1."""
        self.streams: list[dict[str, int]] = []
        self.methods["execute"] = self._execute
        self.methods["signal_process"] = lambda _: {}

    def _execute(self, params: dict[str, Any]) -> Mapping[str, Any]:
        streams = params["streams"]
        self.core.open_receiver(streams["stdin"])
        self.core.open_sender(streams["stdout"])
        self.core.open_sender(streams["stderr"])
        self.streams.append(streams)
        return {"process_id": len(self.streams)}

    def end_process(self, process_id: int, exit_code: int) -> None:
        """End a process as a good guest does."""
        streams = self.streams[process_id - 1]
        for name in ("stdout", "stderr"):
            self.core.send_eof(streams[name])
        self.core.send_reset(streams["stdin"])
        self.core.send_event("process_exited", {"process_id": process_id, "exit_code": exit_code})
        self.flush()


@contextlib.asynccontextmanager
async def session_with(guest: ScriptedGuest) -> AsyncIterator[NativeSession]:
    """A session of the native driver with *guest*, which is started for it."""
    async with guest:
        session = await NativeAgent().connect(FakeVm(guest.path).as_vm, timeout_s=LIMIT_S)
        assert isinstance(session, NativeSession)
        try:
            yield session
        finally:
            await session.close()
