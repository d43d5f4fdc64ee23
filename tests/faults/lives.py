"""Lives of real node agents, one after another on the same host, and a scheduler that sees them die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client as Nats

from vcnode.drivers.hypervisor.qemu.process import named
from vcnode.drivers.storage.trees import mounted, unmount
from vcnode.models import wire
from vcnode.models.subjects import Subjects
from vcnode.pods.marks import mark_of
from vcnode.settings import Settings

WAIT_S = 90.0
"""Longest wait for something that must happen."""
PING_S = 1.0
"""Seconds for one sign of life."""
POLL_S = 0.02
SAFE = {"failed_precondition", "not_found", "already_exists", "internal", "aborted"}
"""What a command may end with when the node agent died under it or before it."""


class Zygote:
    """Forks node agents; an async context manager."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._forked: asyncio.Queue[int] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Zygote:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.zygote",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if not k.startswith("VCNODE_")},
        )
        self._reading = asyncio.ensure_future(self._read(self._process))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for pid, ended in list(self._ended.items()):
            if not ended.done():
                os.kill(pid, signal.SIGKILL)
                await ended
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading

    async def fork(
        self, settings: dict[str, Any], log: Path, arms: Path | None = None
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a node agent; its pid, and its wait status once it has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._turn:
            request = {"settings": settings, "log": str(log), "arms": None if arms is None else str(arms)}
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            pid = await asyncio.wait_for(self._forked.get(), WAIT_S)
        return pid, self._ended.setdefault(pid, asyncio.get_running_loop().create_future())

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            said = json.loads(line)
            if "status" not in said:
                self._forked.put_nowait(said["pid"])
                continue
            ended = self._ended.setdefault(said["pid"], asyncio.get_running_loop().create_future())
            ended.set_result(said["status"])


class Died(Exception):  # noqa: N818 -- what the tests are for
    """The node agent is gone."""


@dataclass
class Host:
    """One node's host, with a name and subjects of its own."""

    zygote: Zygote
    client: Nats
    path: Path
    settings: dict[str, Any]
    subjects: Subjects
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Final answers by command id."""
    asked: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Commands in the order in which they were sent."""
    queued: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    """Commands that were put into the work queue."""
    pid: int = 0
    ended: asyncio.Future[int] | None = None

    @property
    def name(self) -> str:
        name: str = self.settings["node_name"]
        return name

    @property
    def _arms(self) -> Path:
        return self.path / "arms"

    @property
    def log(self) -> Path:
        return self.path / "log"

    async def start(self, faults: str = "", *, armed: bool = False) -> None:
        """Begin a life; returns when the node answers. With *armed*, `arm` can be used in it.

        Raises:
            Died: It ended first.
        """
        settings = {**self.settings, "faults": faults}
        self.pid, self.ended = await self.zygote.fork(settings, self.log, self._arms if armed else None)
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await self._request("node.ping", {}, {}, timeout_s=PING_S)
                    return
                except nats.errors.NoRespondersError:
                    await asyncio.sleep(POLL_S)  # nobody listens yet, and nothing tells when
                except nats.errors.TimeoutError:
                    continue  # it went to the life before, whose death the server had not noticed yet

    async def arm(self, faults: str) -> None:
        """Let these failpoints count from now on, in the place of any others."""
        self._arms.write_text(faults)
        os.kill(self.pid, signal.SIGUSR1)
        async with asyncio.timeout(WAIT_S):
            while self._arms.exists():  # noqa: ASYNC110 -- another process takes it away
                await asyncio.sleep(0.002)

    async def kill(self) -> None:
        """End this life now."""
        if self.ended is not None and not self.ended.done():
            os.kill(self.pid, signal.SIGKILL)
            await self.ended

    async def stop(self) -> int:
        """End this life in good order; the wait status."""
        assert self.ended is not None
        os.kill(self.pid, signal.SIGTERM)
        return await asyncio.wait_for(asyncio.shield(self.ended), WAIT_S)

    async def ask(self, command_id: str, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a command until its answer is final.

        Raises:
            Died: The node agent did, before it had answered.
        """
        self.asked[command_id] = (verb, body)
        while True:
            reply = await self._request(verb, body, {wire.COMMAND_ID: command_id}, timeout_s=WAIT_S)
            if not (reply.get("retryable") and "message" in reply):
                self.answers[command_id] = reply
                return reply
            await asyncio.sleep(POLL_S)

    async def read(self, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask something that changes nothing."""
        return await self._request(verb, body or {}, {}, timeout_s=WAIT_S)

    async def enqueue(self, command_id: str, verb: str, body: dict[str, Any]) -> None:
        """Put a command into the work queue."""
        self.queued[command_id] = (verb, body)
        await self.client.jetstream().publish(
            self.subjects.cmd(self.name, verb),
            json.dumps(body).encode(),
            stream=self.subjects.command_stream,
            headers={wire.COMMAND_ID: command_id, "Nats-Msg-Id": command_id},
        )

    async def done(self, command_id: str) -> dict[str, Any]:
        """Wait for the outcome of a durable command. Raises Died."""
        assert self.ended is not None
        async with asyncio.timeout(WAIT_S):
            while True:
                for event in await self.events(f"{self.subjects.prefix}.evt.*.command.>"):
                    if event.get("commandid") == command_id and ".command." in event["type"]:
                        return event
                if self.ended.done():
                    raise Died
                await asyncio.sleep(POLL_S)

    async def events(self, subject: str = "") -> list[dict[str, Any]]:
        """All events of the stream so far, or those on a subject."""
        chosen = subject or self.subjects.every_event
        sub = await self.client.jetstream().subscribe(chosen, ordered_consumer=True)
        try:
            info = await sub.consumer_info()
            left = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
            found = []
            while left:
                msg = await sub.next_msg(timeout=WAIT_S)
                found.append(json.loads(msg.data))
                left = msg.metadata.num_pending
            return found
        finally:
            await sub.unsubscribe()

    def sweep(self) -> None:
        """End the VMs that are left when no node agent is, and unmount what is theirs."""
        mark = mark_of(Settings(node_name=self.name, state_dir=Path(self.settings["state_dir"])))
        for vm in named(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(vm.pid, signal.SIGKILL)
        for point in reversed(mounted(str(self.path))):
            unmount(point)

    def tail(self, lines: int = 30) -> str:
        """The last words of all lives."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    async def _request(
        self, verb: str, body: dict[str, Any], headers: dict[str, str], *, timeout_s: float
    ) -> dict[str, Any]:
        assert self.ended is not None
        asking = asyncio.ensure_future(
            self.client.request(
                self.subjects.rpc(self.name, verb),
                json.dumps(body).encode(),
                timeout=timeout_s,
                headers=headers or None,
            )
        )
        await asyncio.wait({asking, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            asking.cancel()
        await asyncio.wait({asking})
        if asking.cancelled() or (self.ended.done() and asking.exception() is not None):
            raise Died
        reply: dict[str, Any] = json.loads(asking.result().data)
        return reply


@contextlib.asynccontextmanager
async def hosts(url: str, settings: dict[str, Any], place: Path) -> AsyncIterator[Any]:
    """Gives hosts, ``make(name, **settings)``; node agents, and VMs that a failed test left, end with it."""
    client = await nats.connect(url)
    made: list[Host] = []
    try:
        async with Zygote() as zygote:

            def make(name: str, **changes: Any) -> Host:
                path = place / name
                path.mkdir()
                nats_settings = {"url": url, "prefix": name, "stream_storage": "memory", "lease_s": 1.0}
                mine = {
                    "node_name": "n1",
                    "state_dir": str(path / "state"),
                    "run_dir": str(path / "run"),
                    "metrics_address": "",
                    "network": "noop",
                    "stop_grace_s": 0.2,
                    "nats": nats_settings,
                    **settings,
                    **changes,
                }
                made.append(Host(zygote, client, path, mine, Subjects(name)))
                return made[-1]

            yield make
    finally:
        await client.close()
        for host in made:
            host.sweep()
