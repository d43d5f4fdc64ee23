"""The frames of sessions over core NATS: two subscriptions for all sessions of the node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vcnode.bus.connection import Connection
from vcnode.bus.library import SturdyClient
from vcnode.models.subjects import IoChannel, Subjects
from vcnode.sessions.frames import Parts

if TYPE_CHECKING:
    from nats.aio.msg import Msg

_FROM_CLIENTS: tuple[IoChannel, ...] = ("stdin", "control")


class Receiver(Protocol):
    """Who the frames are for; `vcnode.pods.sessions.SessionRegistry`."""

    async def receive(self, session_id: str, raw: bytes) -> None:
        """Take a frame; never raises."""
        ...

    def reconnected(self) -> None:
        """Frames may have been lost."""
        ...


class SessionTraffic:
    """Moves frames between NATS and the node's sessions; a `vcnode.pods.sessions.Transport`.

    Args:
        connection: Its clients are set up with the subscriptions.
        receiver: The sessions.
        node_name: The node's name, a token of each subject.
        subjects: Names under the prefix.
    """

    def __init__(
        self, connection: Connection, receiver: Receiver, *, node_name: str, subjects: Subjects
    ) -> None:
        self._connection = connection
        self._receiver = receiver
        self._node_name = node_name
        self._subjects = subjects
        connection.on_client(self._set_up)
        connection.on_change(self._on_change)

    @property
    def max_payload(self) -> int:
        """See `Transport.max_payload`."""
        return self._connection.max_payload

    async def publish_frame(self, session_id: str, channel: IoChannel, parts: Parts) -> None:
        """See `Transport.publish_frame`."""
        await self._connection.publish_parts(self._subjects.io(self._node_name, session_id, channel), parts)

    async def _set_up(self, client: SturdyClient) -> None:
        for channel in _FROM_CLIENTS:
            await client.subscribe(self._subjects.every_io(self._node_name, channel), cb=self._on_message)

    async def _on_message(self, msg: Msg) -> None:
        await self._receiver.receive(self._subjects.parse_io(msg.subject), msg.data)

    def _on_change(self, up: bool) -> None:
        if up:
            self._receiver.reconnected()
