"""A small synchronous client of the guest protocol, for tests that want to see every frame's effect."""

from __future__ import annotations

import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from vcnode.guest import protocol

SYNC_AGAIN_S = 0.25


class GuestError(Exception):
    """The guest refused a request."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Result:
    """How a process of ``execute`` ended."""

    def __init__(self, exit_code: int, stdout: bytes, stderr: bytes) -> None:
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr

    @property
    def text(self) -> str:
        return self.stdout.decode().strip()

    def __repr__(self) -> str:
        return f"Result({self.exit_code}, {self.stdout!r}, {self.stderr!r})"


def process(*args: str, **fields: Any) -> dict[str, Any]:
    """A ``process`` with everything that the protocol wants."""
    defaults = {
        "args": list(args),
        "envs": [],
        "workdir": "/",
        "user": "0",
        "group": None,
        "supplementary_groups": [],
        "rlimits": [],
        "no_new_privileges": True,
        "capabilities": [],
    }
    return defaults | fields


class GuestClient:
    """One connection and its session. All waits end with AssertionError after *timeout_s* seconds."""

    def __init__(self, sock: socket.socket, *, timeout_s: float = 30.0) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.timeout_s = timeout_s
        self.host = protocol.Host(secrets.token_hex(16))
        self._unsent = bytearray()
        self.hello: dict[str, Any] = {}
        self.replies: dict[int, protocol.ReplyReceived] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.received: dict[int, bytearray] = {}
        self.finished: set[int] = set()
        self.reset: set[int] = set()
        self.hold_credit: set[int] = set()
        """Streams whose bytes are counted as not consumed."""

    @classmethod
    def connect(cls, path: os.PathLike[str] | str, **options: Any) -> GuestClient:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.fspath(path))
        client = cls(sock, **options)
        try:
            client.start()
        except BaseException:
            sock.close()
            raise
        return client

    def start(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not self.hello:
            assert time.monotonic() < deadline, "the guest did not answer the hello"
            self.host.send_sync()
            until = time.monotonic() + SYNC_AGAIN_S
            while not self.hello and time.monotonic() < until:
                self._step(until - time.monotonic())

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> GuestClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- moving bytes ------------------------------------------------------------------------------

    def _step(self, timeout_s: float) -> None:
        self._unsent += self.host.data_to_send()
        writers = [self.sock] if self._unsent else []
        readable, writable, _ = select.select([self.sock], writers, [], max(0.0, timeout_s))
        if writable:
            del self._unsent[: self.sock.send(self._unsent)]
        if readable:
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError("the guest's port was closed")
            for event in self.host.receive_data(data):
                self._take(event)

    def _take(self, event: protocol.Event) -> None:
        match event:
            case protocol.SessionStarted():
                self.hello = event.hello
            case protocol.ReplyReceived():
                self.replies[event.id] = event
            case protocol.EventReceived():
                self.events.append((event.name, event.fields))
            case protocol.DataReceived():
                self.received.setdefault(event.stream, bytearray()).extend(event.data)
                if event.stream not in self.hold_credit:
                    self.host.consumed(event.stream, len(event.data))
            case protocol.EofReceived():
                self.finished.add(event.stream)
            case protocol.ResetReceived():
                self.reset.add(event.stream)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Move bytes until *condition* holds."""
        deadline = time.monotonic() + self.timeout_s
        while not condition():
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"{what} did not happen within {self.timeout_s} s"
            self._step(left_s)

    def flush(self) -> None:
        self.wait(lambda: not self._unsent and not self.host.pending_bytes, "sending")

    # -- requests ----------------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> int:
        return self.host.send_request(method, params)

    def reply(self, number: int) -> dict[str, Any]:
        self.wait(lambda: number in self.replies, "a reply")
        found = self.replies.pop(number)
        if found.error is not None:
            raise GuestError(*found.error)
        assert found.result is not None
        return found.result

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.reply(self.send(method, **params))

    def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields, and take it."""

        def find() -> Iterator[int]:
            for index, (found, content) in enumerate(self.events):
                if found == name and all(content.get(key) == value for key, value in fields.items()):
                    yield index

        self.wait(lambda: next(find(), None) is not None, f"event {name} {fields}")
        return self.events.pop(next(find()))[1]

    def execute(self, spec: dict[str, Any], container_id: str | None = None) -> Execution:
        streams = {
            "stdin": self.host.new_stream(sending=True),
            "stdout": self.host.new_stream(sending=False),
            "stderr": self.host.new_stream(sending=False),
        }
        result = self.call("execute", container_id=container_id, process=spec, streams=streams)
        return Execution(self, result["process_id"], streams)

    def run(self, *args: str, container_id: str | None = None, stdin: bytes = b"", **fields: Any) -> Result:
        """Execute to the end."""
        started = self.execute(process(*args, **fields), container_id)
        started.write(stdin)
        started.close_stdin()
        return started.finish()

    def create(self, container_id: str, *args: str, **fields: Any) -> None:
        """Create a container; ``root`` is a shared name unless given."""
        self.call("create_container", **container(container_id, *args, **fields))

    def states(self) -> dict[str, dict[str, Any]]:
        return {found["container_id"]: found for found in self.call("list_containers")["containers"]}


def container(container_id: str, *args: str, **fields: Any) -> dict[str, Any]:
    """The params of ``create_container``; what is not one of them goes into ``process``."""
    params: dict[str, Any] = {
        "container_id": container_id,
        "root": fields.pop("root", {"shared_name": "busybox"}),
        "readonly": fields.pop("readonly", False),
        "hostname": fields.pop("hostname", "box"),
        "resources": {
            "cpu_quota_us": None,
            "cpu_period_us": 100_000,
            "cpu_shares": None,
            "mem_limit_mib": None,
            "pids_limit": None,
        }
        | fields.pop("resources", {}),
    }
    return params | {"process": process(*args, **fields)}


class Execution:
    """A process of ``execute``."""

    def __init__(self, client: GuestClient, process_id: int, streams: dict[str, int]) -> None:
        self.client = client
        self.process_id = process_id
        self.streams = streams

    def write(self, data: bytes) -> None:
        stream, rest = self.streams["stdin"], memoryview(data)
        while rest and stream not in self.client.reset:
            self.client.wait(
                lambda: self.client.host.credit(stream) > 0 or stream in self.client.reset, "credit"
            )
            if stream not in self.client.reset:
                rest = rest[self.client.host.send_data(stream, rest) :]
        self.client.flush()

    def close_stdin(self) -> None:
        self.client.host.send_eof(self.streams["stdin"])

    def signal(self, number: int) -> None:
        self.client.call("signal_process", process_id=self.process_id, signal=number)

    def output(self, name: str = "stdout") -> bytes:
        return bytes(self.client.received.get(self.streams[name], b""))

    def wait_for(self, text: bytes) -> None:
        self.client.wait(lambda: text in self.output(), f"output {text!r}")

    def finish(self) -> Result:
        ended = self.client.event("process_exited", process_id=self.process_id)
        # The contract: the event comes after the end of both outputs.
        assert {self.streams["stdout"], self.streams["stderr"]} <= self.client.finished
        return Result(ended["exit_code"], self.output(), self.output("stderr"))
