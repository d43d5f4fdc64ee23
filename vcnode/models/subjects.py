"""Every NATS subject, stream and bucket name: built here, parsed here, written out nowhere else.

::

    P.rpc.N.pod.create                    immediate commands, request/reply
    P.cmd.N.pod.create                    the same commands, durable
    P.all.node.ping                       every node answers
    P.all.pod.bid.17                      the nodes of one share answer
    P.all.pod.bid.17.3                    those of one part of a share
    P.evt.N.pod.started.<pod>             events; container events end <pod>.<container>,
                                          node events end with their kind, image events too
    P.io.N.S.stdin                        streams of session S

``P`` is the prefix (setting ``nats.prefix``), ``N`` the node's name. Ids hold no dots, so each is exactly
one token.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from vcnode.models.base import ID_PATTERN
from vcnode.models.events import Event, EventKind

_TOKEN = re.compile(ID_PATTERN)
_PREFIX = re.compile(r"[A-Za-z0-9_-]+")

SHARES = 256
"""Shares into which nodes fall by their names, so that a question need not go to all of a large fleet."""
PARTS = 32
"""Parts of each share, for fleets in which one share is too many."""

IoChannel = Literal["stdin", "stdout", "stderr", "control"]


@dataclass(frozen=True, slots=True)
class EventAddress:
    """What the subject of an event tells without its body."""

    node: str
    kind: str
    pod_id: str | None = None
    container_id: str | None = None


@dataclass(frozen=True, slots=True)
class Subjects:
    """The names under one prefix."""

    prefix: str = "vcnode"

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(f"Subject prefix {self.prefix!r} is not one token of letters, digits, '_', '-'.")

    def rpc(self, node: str, verb: str) -> str:
        """Where *node* takes the immediate command *verb*."""
        return f"{self.prefix}.rpc.{_token(node)}.{verb}"

    def cmd(self, node: str, verb: str) -> str:
        """Where *node* takes the durable command *verb*."""
        return f"{self.prefix}.cmd.{_token(node)}.{verb}"

    def node_commands(self, node: str) -> str:
        """All durable commands to one node."""
        return f"{self.prefix}.cmd.{_token(node)}.>"

    @property
    def every_command(self) -> str:
        """All durable commands to all nodes."""
        return f"{self.prefix}.cmd.>"

    def parse_cmd(self, node: str, subject: str) -> str:
        """The verb of a durable command to *node*; it may be none that exists.

        Raises:
            ValueError: It is not the subject of a durable command to *node*.
        """
        start = self.cmd(node, "")
        if not subject.startswith(start) or subject == start:
            raise ValueError(f"{subject!r} is not the subject of a command to {node!r}.")
        return subject.removeprefix(start)

    def everyone(self, verb: str) -> str:
        """Where all nodes answer *verb*."""
        return f"{self.prefix}.all.{verb}"

    def some(self, verb: str, share: str) -> str:
        """Where the nodes of one share, or of one part of it, answer *verb*; see `shares_of`."""
        return f"{self.everyone(verb)}.{share}"

    def io(self, node: str, session: str, channel: IoChannel) -> str:
        """One stream of a session."""
        return f"{self.prefix}.io.{_token(node)}.{_token(session)}.{channel}"

    def every_io(self, node: str, channel: IoChannel) -> str:
        """One stream of each session of *node*."""
        return f"{self.prefix}.io.{_token(node)}.*.{channel}"

    @staticmethod
    def parse_io(subject: str) -> str:
        """The session of the subject of a stream."""
        return subject.split(".")[-2]

    @property
    def event_prefix(self) -> str:
        """What the subjects of all events begin with."""
        return f"{self.prefix}.evt."

    def event(self, node: str, event: Event) -> str:
        """Where *event* of *node* is published."""
        kind = event.kind
        base = f"{self.prefix}.evt.{_token(node)}.{kind}"
        if kind.startswith(("pod.", "container.")):
            return ".".join([base, *(_token(part) for part in event.subject.split("/"))])
        return base

    @property
    def every_event(self) -> str:
        """All events of all nodes."""
        return f"{self.prefix}.evt.>"

    def node_events(self, node: str) -> str:
        """All events of one node."""
        return f"{self.prefix}.evt.{_token(node)}.>"

    def event_filters(
        self, *, node: str | None = None, pod_id: str | None = None, kinds: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Subjects that together match exactly the events asked for (None and empty mean any).

        Args:
            node: Only events of this node.
            pod_id: Only events of this pod and of its containers.
            kinds: Only these kinds; ``pod.*`` stands for all kinds about pods.

        Returns:
            Filters of which no two match the same subject, as JetStream demands.

        Raises:
            ValueError: A kind that does not exist or that no pod has, or an id that cannot be one.
        """
        who = "*" if node is None else _token(node)
        base = f"{self.prefix}.evt.{who}"
        wanted = _distinct(tuple(_kind(kind) for kind in kinds))
        if pod_id is None:
            if not wanted:
                return (f"{base}.>",)
            # ">" does not match an empty rest: kinds of node and image end with the kind itself.
            return tuple(
                f"{base}.{kind}.>" if kind.startswith(("pod.", "container.")) else f"{base}.{kind}"
                for kind in wanted
            )
        pod = _token(pod_id)
        about_pods = [kind for kind in wanted or ("pod.*", "container.*") if kind.startswith("pod.")]
        about_containers = [
            kind for kind in wanted or ("pod.*", "container.*") if kind.startswith("container.")
        ]
        if not about_pods and not about_containers:
            raise ValueError(f"No event of kind {', '.join(wanted)} is about a pod.")
        return (
            *(f"{base}.{kind}.{pod}" for kind in about_pods),
            *(f"{base}.{kind}.{pod}.*" for kind in about_containers),
        )

    def parse_event(self, subject: str) -> EventAddress:
        """Take an event's subject apart.

        Raises:
            ValueError: It is not the subject of an event under this prefix.
        """
        tokens = subject.split(".")
        if len(tokens) < 5 or tokens[:2] != [self.prefix, "evt"]:
            raise ValueError(f"{subject!r} is not the subject of an event under {self.prefix!r}.")
        node, kind, rest = tokens[2], f"{tokens[3]}.{tokens[4]}", tokens[5:]
        expected = {"pod": 1, "container": 2}.get(tokens[3], 0)
        if len(rest) != expected:
            raise ValueError(f"{subject!r} should have {expected} tokens after the kind.")
        return EventAddress(node, kind, *rest)

    @property
    def event_stream(self) -> str:
        """JetStream stream that keeps the events."""
        return f"{self.prefix}-events"

    def published_consumer(self, node: str) -> str:
        """Consumer by which a node looks up which of its events the stream has."""
        return f"{_token(node)}-published"

    @property
    def command_stream(self) -> str:
        """JetStream stream that keeps durable commands until they are done."""
        return f"{self.prefix}-commands"

    @property
    def node_bucket(self) -> str:
        """KV bucket of the nodes' leases."""
        return f"{self.prefix}-nodes"

    @property
    def pod_bucket(self) -> str:
        """KV bucket of the pods' last status."""
        return f"{self.prefix}-pods"


def shares_of(node: str) -> tuple[str, str]:
    """The share that a node of that name falls into, such as ``17``, and its part of it, such as ``17.3``.

    By the first byte of the name's SHA-256, and the second one modulo `PARTS`.
    """
    share, second = hashlib.sha256(node.encode()).digest()[:2]
    return str(share), f"{share}.{second % PARTS}"


def _token(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"{text!r} cannot be one token of a subject.")
    return text


def _kind(kind: str) -> str:
    group, _, rest = kind.partition(".")
    if kind in set(EventKind) or (rest == "*" and any(k.startswith(f"{group}.") for k in EventKind)):
        return kind
    raise ValueError(f"There are no events of kind {kind!r}; kinds are {', '.join(EventKind)}.")


def _distinct(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Without repetitions, and without kinds that a wildcard among them covers."""
    whole_groups = {kind.partition(".")[0] for kind in kinds if kind.endswith(".*")}
    return tuple(
        kind
        for kind in dict.fromkeys(kinds)
        if kind.endswith(".*") or kind.partition(".")[0] not in whole_groups
    )
