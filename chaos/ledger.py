"""What was asked against what happened."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

UNDONE = ("pod.stopped", "pod.failed")
"""Events by which a command takes its start back: then it may be tried again."""
CAUSED = {
    "pod.run": "pod.started",
    "pod.start": "pod.started",
}
"""The event that a success of a command must have caused."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply, or the outcome of one durable command."""

    ok: bool
    code: str
    """``ok``, or that of the error."""
    digest: str
    """Of the reply."""
    exit_code: int | None = None
    """Of an exec that was carried out."""


def answer(body: dict[str, Any], raw: bytes) -> Answer:
    """Read a reply."""
    code = body.get("code") if "retryable" in body and "message" in body else None
    return Answer(code is None, code or "ok", hashlib.sha256(raw).hexdigest()[:12], body.get("exit_code"))


@dataclass(slots=True)
class Entry:
    """One command."""

    command_id: str
    verb: str
    pod_id: str
    token: str
    durable: int = 0
    """Copies that the work queue took."""
    answers: list[Answer] = field(default_factory=list)
    """By request."""
    given_up: int = 0
    """Copies by request that never got a final reply."""
    put_off: str = ""
    """What the last reply said that asked for another try."""


@dataclass(slots=True)
class Ledger:
    """All commands of a run."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, command_id: str, verb: str, pod_id: str, token: str) -> Entry:
        """Note a command that is about to be sent."""
        return self.entries.setdefault(command_id, Entry(command_id, verb, pod_id, token))

    def outcomes(self) -> Counter[tuple[str, str]]:
        """How many commands ended how, by verb and code."""
        return Counter(
            (entry.verb, entry.answers[0].code if entry.answers else "(event only)")
            for entry in self.entries.values()
        )

    def judge(self, events: Sequence[dict[str, Any]], tokens: Iterable[str]) -> list[str]:
        """Compare with the events of the stream and the effects on the host; what is wrong, in words."""
        caused: dict[tuple[str, str], int] = Counter()
        outcomes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            command_id = event.get("commandid")
            kind = event["type"].removeprefix("vcnode.")
            if command_id is not None:
                caused[command_id, kind] += 1
                if kind.startswith("command."):
                    outcomes[command_id].append(event["data"])
        written = Counter(tokens)
        problems = gaps(events)
        for token in written.keys() - {entry.token for entry in self.entries.values()}:
            problems.append(f"token {token} is of no command")
        for entry in self.entries.values():
            problems += self._judge_one(entry, caused, outcomes[entry.command_id], written[entry.token])
        return problems

    def _judge_one(
        self,
        entry: Entry,
        caused: dict[tuple[str, str], int],
        outcomes: list[dict[str, Any]],
        written: int,
    ) -> list[str]:
        who = f"{entry.command_id} ({entry.verb} {entry.pod_id})"
        problems = []
        if entry.given_up and not entry.answers and not outcomes:
            problems.append(f"{who}: no outcome is known; {entry.put_off or 'nobody ever answered'}")
        if len(outcomes) != entry.durable:
            problems.append(f"{who}: {entry.durable} durable copies have {len(outcomes)} outcomes")
        finals = {(a.code, a.digest) for a in entry.answers}
        if len(finals) > 1:
            problems.append(f"{who}: answered in different ways: {sorted(finals)}")
        codes = {a.code for a in entry.answers} | {o["code"] for o in outcomes if not _passing(o)}
        if len(codes) > 1:
            problems.append(f"{who}: request and queue disagree: {sorted(codes)}")
        undone = sum(caused.get((entry.command_id, kind), 0) for kind in UNDONE)
        if (started := caused.get((entry.command_id, "pod.started"), 0)) > 1 + undone:
            problems.append(f"{who}: started its pod {started} times")
        if "ok" in codes and (kind := CAUSED.get(entry.verb)) and not caused.get((entry.command_id, kind)):
            problems.append(f"{who}: succeeded without {kind}")
        return problems + self._judge_exec(entry, who, codes, outcomes, written)

    def _judge_exec(
        self, entry: Entry, who: str, codes: set[str], outcomes: list[dict[str, Any]], written: int
    ) -> list[str]:
        if written > 1:
            return [f"{who}: was carried out {written} times"]
        exits = {a.exit_code for a in entry.answers if a.ok}
        exits |= {(o.get("reply") or {}).get("exit_code") for o in outcomes if o["ok"]}
        if entry.verb == "container.exec" and exits == {0} and written != 1:
            return [f"{who}: succeeded without its effect"]
        if written and codes and codes <= {"not_found", "failed_precondition", "invalid_argument"}:
            return [f"{who}: was refused ({sorted(codes)}), and has had its effect"]
        return []


def _passing(outcome: dict[str, Any]) -> bool:
    """Whether a durable command ended with an error that is not stored: the same id may succeed later."""
    return bool((outcome.get("error") or {}).get("retryable"))


def gaps(events: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the numbers of events."""
    numbers = [int(event["sequence"]) for event in events]
    problems = []
    if numbers != sorted(numbers):
        problems.append("events are not in order")
    if doubles := [number for number, count in Counter(numbers).items() if count > 1]:
        problems.append(f"events are there twice: {doubles[:10]}")
    if missing := sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers)):
        problems.append(f"events are missing: {missing[:10]}")
    return problems
