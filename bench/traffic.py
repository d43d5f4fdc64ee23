"""What a NATS server is told to carry: every message, counted by what it is for."""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import nats
from nats.aio.msg import Msg


@dataclass(slots=True)
class Traffic:
    """Messages that clients have published, by purpose."""

    count: Counter[str] = field(default_factory=Counter)
    size: Counter[str] = field(default_factory=Counter)
    """Bytes of their bodies."""

    def note(self, subject: str, size: int) -> None:
        """Count one message."""
        purpose = purpose_of(subject)
        self.count[purpose] += 1
        self.size[purpose] += size

    def mean_bytes(self, purpose: str) -> int:
        """Bytes of a message of this purpose; 0 if there was none."""
        return round(self.size[purpose] / self.count[purpose]) if self.count[purpose] else 0


def purpose_of(subject: str) -> str:
    """What a message on *subject* is for; the subjects are those of docs/durable.md and of KV (ADR-8)."""
    tokens = subject.split(".")
    match tokens:
        case ["vcnode", "all", "pod", "bid", *_]:
            return "call for bids"
        case ["vcnode", "rpc", _, *verb]:
            return ".".join(verb)
        case ["vcnode", "evt", *_]:
            return "event"
        case ["$KV", "vcnode-pods", *_]:
            return "status of a pod"
        case ["$KV", "vcnode-nodes", *_]:
            return "lease"
        case ["_INBOX", *_]:
            return "reply"
    return "other"


@contextlib.asynccontextmanager
async def counted(url: str) -> AsyncIterator[Traffic]:
    """Count every message of the block. This costs the server and this process much: time nothing then."""
    traffic = Traffic()
    client = await nats.connect(url)

    async def note(msg: Msg) -> None:
        traffic.note(msg.subject, len(msg.data))

    try:
        await client.subscribe(">", cb=note)
        await client.flush()
        yield traffic
        await client.drain()
    finally:
        await client.close()


def free_port() -> int:
    """A port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_variables(port: int) -> dict[str, int]:
    """What the server's monitoring tells of it: bytes and messages in and out, connections, subscriptions."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/varz", timeout=10) as reply:
        return dict(json.load(reply))
