"""The commands as a NATS micro service (ADR-32): one endpoint per verb, and the broadcasts.

nats-py runs the callbacks of one subscription one after another, and a ``CancelledError`` in one ends the
subscription for good. So a callback only takes a slot and hands over to a task.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nats.errors
from nats.micro.service import Service, ServiceConfig, ServiceStats

import vcnode
from vcnode import aio
from vcnode.bus.connection import Connection
from vcnode.bus.library import SturdyClient, uncancelled
from vcnode.errors import UnavailableError, VcnodeError
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.lanes import Slot
from vcnode.handlers.outcome import Outcome, oversized
from vcnode.handlers.routes import AT_ONCE
from vcnode.models.commands import BROADCAST, COMMANDS
from vcnode.models.subjects import Subjects, shares_of

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.micro.request import Request

log = logging.getLogger(__name__)

SERVICE_NAME = "vcnode"
HEADER_RESERVE_BYTES = 4096
"""Room for the headers: the server bounds headers and body together."""
STOP_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = 60.0
"""How long cancelled commands may take for their undo."""


@dataclass(slots=True)
class _Count:
    """What a verb's endpoint has done; nats-py itself sees only the hand-over."""

    errors: int = 0
    done: int = 0
    total_ns: int = 0
    last_error: str = ""


class _CountedService(Service):
    """A service whose statistics tell how the commands ended and how long they took."""

    def __init__(self, client: SturdyClient, config: ServiceConfig, counts: dict[str, _Count]) -> None:
        super().__init__(client, config)
        self._counts = counts

    def stats(self) -> ServiceStats:
        """The library's figures, corrected."""
        stats = super().stats()
        for endpoint in stats.endpoints:
            count = self._counts[endpoint.name]
            endpoint.num_errors = count.errors
            endpoint.processing_time = count.total_ns
            endpoint.average_processing_time = count.total_ns // count.done if count.done else 0
            endpoint.last_error = count.last_error
        return stats


class CommandService:
    """Takes commands from NATS.

    Args:
        connection: Its clients are set up with the endpoints.
        dispatcher: Runs the commands.
        node_name: The node's name, a token of each subject.
        subjects: Names under the prefix.
    """

    def __init__(
        self, connection: Connection, dispatcher: Dispatcher, *, node_name: str, subjects: Subjects
    ) -> None:
        self._connection = connection
        self._dispatcher = dispatcher
        self._node_name = node_name
        self._subjects = subjects
        self._tasks = aio.Tasks()
        self._counts = {verb: _Count() for verb in COMMANDS}
        self._service: Service | None = None
        connection.on_client(self._set_up)

    async def _set_up(self, client: SturdyClient) -> None:
        """Offer every command on *client*."""
        service = _CountedService(
            client,
            ServiceConfig(
                name=SERVICE_NAME,
                version=vcnode.__version__,
                description="Runs pods as small virtual machines on one host.",
                metadata={"node": self._node_name, "prefix": self._subjects.prefix},
            ),
            {endpoint_name(verb): count for verb, count in self._counts.items()},
        )
        await service.start()
        for command in COMMANDS.values():
            await service.add_endpoint(
                name=endpoint_name(command.verb),
                subject=self._subjects.rpc(self._node_name, command.verb),
                handler=self._endpoint(command.verb),
                metadata={
                    "verb": command.verb,
                    "summary": command.summary,
                    "request": command.request.__name__,
                    "reply": command.reply.__name__,
                    "mutates": json.dumps(command.mutates),
                },
            )
        for verb in BROADCAST:
            shares = (self._subjects.some(verb, share) for share in shares_of(self._node_name))
            for subject in (self._subjects.everyone(verb), *shares):
                await client.subscribe(subject, cb=self._broadcast(verb))
        self._service = service

    async def drain(self, *, timeout_s: float) -> bool:
        """Take no more commands, let those that run finish, then stop.

        New commands that change something are answered ``unavailable`` at once; reads are answered until the
        end. What has not ended after *timeout_s* seconds is cancelled, undone, and answered.

        Returns:
            Whether every command ended by itself.
        """
        self._dispatcher.drain()
        finished = await self._tasks.join(timeout_s=timeout_s)
        if not finished:
            log.warning("Giving up %d commands that still run", self._tasks.count)
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                await self._tasks.close()
        await self._stop_service()
        await self._tasks.close()
        return finished

    async def close(self) -> None:
        """Stop at once, cancelling what runs. Idempotent."""
        self._dispatcher.drain()
        await self._tasks.close()
        await self._stop_service()

    async def _stop_service(self) -> None:
        service, self._service = self._service, None
        if service is None or not self._connection.connected:
            return  # nothing is subscribed that the closing of the connection does not end
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await uncancelled(service.stop())
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            log.warning("The NATS service did not stop cleanly", exc_info=exc)

    def _endpoint(self, verb: str) -> Callable[[Request], Awaitable[None]]:
        take = self._answer if verb in AT_ONCE else self._take

        async def on_request(request: Request) -> None:
            await take(verb, request._msg)  # its public face hides whether a reply is wanted

        return on_request

    def _broadcast(self, verb: str) -> Callable[[Msg], Awaitable[None]]:
        """What is asked of many: all such commands are of `AT_ONCE`."""

        async def on_message(msg: Msg) -> None:
            await self._answer(verb, msg, among_all=True)

        return on_message

    async def _answer(self, verb: str, msg: Msg, *, among_all: bool = False) -> None:
        """Carry out a command that need not wait; never raises."""
        started = time.perf_counter_ns()
        outcome = self._dispatcher.answer(verb, msg.headers or {}, msg.data)
        self._count(verb, outcome, time.perf_counter_ns() - started)
        if not (among_all and outcome.quiet):
            await self._reply(verb, msg, outcome)

    async def _take(self, verb: str, msg: Msg) -> None:
        """Hand one message over to a task, or refuse it; never raises, never waits for the command."""
        try:
            slot = self._dispatcher.take_slot(verb)
        except VcnodeError as exc:
            outcome = self._dispatcher.refuse(verb, msg.headers or {}, exc)
            self._count(verb, outcome, 0)
            await self._reply(verb, msg, outcome)
            return
        try:
            self._tasks.spawn(self._run(verb, msg, slot), name=f"command-{verb}")
        except RuntimeError:  # closed already: the last requests of a drain
            slot.free()
            error = UnavailableError("The node is stopping and takes no new commands.")
            await self._reply(verb, msg, self._dispatcher.refuse(verb, msg.headers or {}, error))

    async def _run(self, verb: str, msg: Msg, slot: Slot) -> None:
        started = time.perf_counter_ns()
        try:
            outcome = await self._dispatcher.dispatch(verb, msg.headers or {}, msg.data)
        finally:
            slot.free()
        self._count(verb, outcome, time.perf_counter_ns() - started)
        await self._reply(verb, msg, outcome)

    async def _reply(self, verb: str, msg: Msg, outcome: Outcome) -> None:
        if not msg.reply:
            return  # the caller wants none; events tell what happened
        limit = self._connection.max_payload - HEADER_RESERVE_BYTES
        if len(outcome.body) > limit:
            # The server would end the connection for it, and nats-py would never come back.
            outcome = oversized(verb, outcome, limit_bytes=limit)
        try:
            await self._connection.publish(msg.reply, outcome.body, outcome.headers)
        except UnavailableError as exc:
            log.warning("A reply could not be sent; the same command id gets it later", exc_info=exc)

    def _count(self, verb: str, outcome: Outcome, nanoseconds: int) -> None:
        count = self._counts[verb]
        count.done += 1
        count.total_ns += nanoseconds
        if not outcome.ok:
            count.errors += 1
            count.last_error = outcome.code


def endpoint_name(verb: str) -> str:
    """A verb as ADR-32 allows it in an endpoint's name."""
    return verb.replace(".", "-")
