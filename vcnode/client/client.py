"""The client: a connection, the nodes behind it, and their events."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from vcnode.client.events import EventStream
from vcnode.client.node import NodeClient
from vcnode.client.requests import Requester
from vcnode.errors import InvalidArgumentError
from vcnode.models.node import NodePing
from vcnode.models.subjects import Subjects
from vcnode.models.wire import SERVICE_ERROR
from vcnode.settings import NatsSettings

log = logging.getLogger(__name__)


class Client:
    """A connection to NATS through which nodes are driven; made by `connect`."""

    def __init__(self, requester: Requester, subjects: Subjects) -> None:
        self._requester = requester
        self._subjects = subjects

    @classmethod
    async def connect(
        cls,
        server: NatsSettings | str = "nats://127.0.0.1:4222",
        *,
        prefix: str | None = None,
        name: str = "vcnode-client",
    ) -> Client:
        """Connect; afterwards the connection comes back by itself whenever it is lost.

        Args:
            server: URLs separated by commas, or settings with credentials and TLS.
            prefix: First token of every subject; None: that of the settings (``vcnode``).
            name: Shown by the NATS server.

        Raises:
            UnavailableError: NATS cannot be reached within the settings' ``connect_timeout_s``.
            InvalidArgumentError: The settings contradict each other.
        """
        settings = NatsSettings(url=server) if isinstance(server, str) else server
        try:
            subjects = Subjects(prefix or settings.prefix)
        except ValueError as exc:
            raise InvalidArgumentError.field("prefix", str(exc)) from exc
        requester = Requester(settings)
        await requester.connect(name=name)
        return cls(requester, subjects)

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._requester.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def node(self, name: str) -> NodeClient:
        """The node called *name*, whether or not it is there.

        Raises:
            InvalidArgumentError: No node can be called so.
        """
        return NodeClient(self._requester, self._subjects, name)

    async def ping_all(self, *, timeout_s: float = 1.0, enough: int = 100_000) -> tuple[NodePing, ...]:
        """Ask every node for a sign of life.

        Args:
            timeout_s: Seconds for which replies are collected.
            enough: Stop early once so many have answered.
        """
        replies = await self._requester.scatter(
            [self._subjects.everyone("node.ping")], b"", timeout_s=timeout_s, enough=enough
        )
        pings = []
        for msg in replies:
            if SERVICE_ERROR in (msg.headers or {}):
                continue  # a node too busy to say more
            try:
                pings.append(NodePing.model_validate_json(msg.data))
            except ValidationError:
                log.warning("Something that is no node answered a ping")
        return tuple(pings)

    def events(
        self,
        *,
        node: str | None = None,
        pods: Sequence[str] = (),
        kinds: Sequence[str] = (),
        since: Literal["now", "all"] | int | datetime = "now",
        follow: bool = True,
    ) -> EventStream:
        """Events as they come, in the order of the stream; enter it with ``async with``, then iterate.

        Args:
            node: Only of this node.
            pods: Only of these pods and their containers; empty means any.
            kinds: Only these, such as ``pod.started`` or ``container.*``; empty means any.
            since: ``now``; ``all`` that the stream still holds; a time; or a position in the stream, such as
                ``EventStream.position + 1`` of an earlier one.
            follow: Whether to wait for new events once all that the stream holds have been given.

        Raises:
            InvalidArgumentError: A kind that does not exist, or an id that cannot be one.
        """
        try:
            filters = tuple(
                dict.fromkeys(
                    subject
                    for pod_id in pods or (None,)
                    for subject in self._subjects.event_filters(node=node, pod_id=pod_id, kinds=tuple(kinds))
                )
            )
        except ValueError as exc:
            raise InvalidArgumentError(str(exc)) from exc
        return EventStream(
            self._requester,
            self._subjects,
            filters,
            since=since,
            follow=follow,
            complete=not pods and not kinds,
        )
