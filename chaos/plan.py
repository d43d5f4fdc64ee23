"""What is going to be sent and what is going to be broken, and when: all of it follows from the seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Way = Literal["rpc", "cmd"]
T = TypeVar("T")

VERBS: dict[str, int] = {
    "container.exec": 10,
    "pod.run": 5,
    "pod.stop": 2,
    "pod.delete": 2,
    "pod.start": 2,
    "pod.create": 1,
    "pod.pause": 1,
    "pod.resume": 1,
    "container.kill": 1,
}
"""How often each command is sent, against the others."""
ACTS: dict[str, int] = {
    "kill node": 4,
    "stop node": 1,
    "freeze node": 1,
    "kill QEMU": 4,
    "freeze QEMU": 1,
    "kill guest agent": 2,
    "kill NATS": 3,
    "cut connections": 3,
}
"""How often each thing is broken, against the others."""
SEND_GAP_S = 0.35
ACT_GAP_S = 3.5
"""Mean seconds between two."""
FIRST_ACT_S = 2.0
COPY_CHANCE = 0.3
"""Of a command being sent more than once."""
DURABLE_CHANCE = 0.35
"""Of a command, or a copy, taking the work queue instead of a request."""
HOLD_S = 0.6
"""Copies and durable commands are held back for up to so long, so that they overtake each other."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One sending of a command."""

    after_s: float
    way: Way


@dataclass(frozen=True, slots=True)
class Send:
    """A command, and how often it is sent under its one id."""

    at_s: float
    number: int
    verb: str
    pod_id: str
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Act:
    """Something that breaks."""

    at_s: float
    kind: str
    pause_s: float
    """How long it stays broken, where that is for us to say."""
    pick: int
    """Chooses among several."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run."""

    sends: tuple[Send, ...]
    acts: tuple[Act, ...]


def make(seed: int, seconds: float, pods: int) -> Plan:
    """The plan of a seed: commands to *pods* pods, and havoc, for so many seconds."""
    chance = random.Random(f"scheduler {seed}")  # noqa: S311 -- it must be the same again
    sends = _times(
        chance,
        SEND_GAP_S,
        0.0,
        seconds,
        lambda at_s, number: Send(
            at_s, number, _choose(chance, VERBS), f"p{chance.randrange(pods)}", _copies(chance)
        ),
    )
    fate = random.Random(f"havoc {seed}")  # noqa: S311
    acts = _times(
        fate,
        ACT_GAP_S,
        FIRST_ACT_S,
        seconds,
        lambda at_s, number: Act(at_s, _choose(fate, ACTS), fate.uniform(0.05, 1.5), fate.randrange(1 << 16)),
    )
    return Plan(tuple(sends), tuple(acts))


def _times(
    chance: random.Random, gap_s: float, first_s: float, until_s: float, make_one: Callable[[float, int], T]
) -> list[T]:
    made: list[T] = []
    at_s = first_s + chance.expovariate(1 / gap_s)
    while at_s < until_s:
        made.append(make_one(at_s, len(made)))
        at_s += chance.expovariate(1 / gap_s)
    return made


def _choose(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def _copies(chance: random.Random) -> tuple[Copy, ...]:
    copies = [_copy(chance, 0.0)]
    while chance.random() < COPY_CHANCE:
        copies.append(_copy(chance, chance.uniform(0, HOLD_S)))
    return tuple(copies)


def _copy(chance: random.Random, after_s: float) -> Copy:
    if chance.random() < DURABLE_CHANCE:
        return Copy(chance.uniform(0, HOLD_S), "cmd")
    return Copy(after_s, "rpc")
