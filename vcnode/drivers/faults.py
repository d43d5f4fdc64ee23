"""Fault plans: make the mock drivers fail, stall or die at a chosen call. The grammar is in docs/mock.md.

A plan counts the calls of each operation from 1 and is deterministic: the same plan and the same calls give
the same faults. An empty plan does nothing.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from vcnode.errors import (
    AgentError,
    DriverError,
    HypervisorError,
    InvalidArgumentError,
    NetworkError,
    StorageError,
)

OPERATIONS = frozenset(
    f"{owner}.{verb}"
    for owner, verbs in {
        "hypervisor": "launch recover kill clone save_template held free",
        "vm": "attach_disk attach_port detach_disk pause resume read_stats set_memory stop",
        "agent": "attach connect connect_port copy configure set_clock set_watchdog create_container"
        " start_container signal_container pause_container resume_container list_processes read_stats"
        " delete_container update_container available_memory list_containers execute ping shutdown",
        "network": "prepare attach open_taps detach recover held free",
        "storage": "make_vm_dir remove_vm_dir check_rootfs open_file open_disk share unshare build_image"
        " image_file image_files remove_image pull_image blank_image make_layer remove_layer held write_note"
        " read_notes read_secret open_hook listen connect",
    }.items()
    for verb in verbs.split()
) | {"vm"}
"""What a plan can name: the calls of the driver Protocols, and ``vm``, counted once for each VM launched."""

ERRORS: dict[str, type[DriverError]] = {
    "hypervisor": HypervisorError,
    "vm": HypervisorError,
    "agent": AgentError,
    "network": NetworkError,
    "storage": StorageError,
}
"""What ``fail`` raises, by the part of the operation before the dot."""

ActionName = Literal["fail", "delay", "hang", "die", "kill", "trace"]

MAX_DELAY_S = 86_400.0

_RULE = re.compile(
    r"(?P<op>[^:=\s]+)\s*:\s*(?P<when>[^=\s]+)\s*=\s*(?P<action>[a-z]+)\s*(?:\((?P<arg>[^()]*)\))?"
)
_POINT = re.compile(r"(store|image)\.[a-z_]+")
"""Commits of the database, named after what they do, and steps of an image; only failpoints know them."""
_WHEN = re.compile(r"(?P<any>\*)|(?P<first>\d{1,9})?(?P<to>-)?(?P<last>\d{1,9})?")
_EXAMPLE = "hypervisor.launch:2=fail; agent.execute:*=delay(0.2); vm:1=die"


@dataclass(frozen=True, slots=True)
class Rule:
    """One fault: what happens at which calls of one operation."""

    operation: str
    """One of `OPERATIONS`."""
    first: int
    """First call that it applies to, counted from 1."""
    last: int | None
    """Last such call; None: no end."""
    action: ActionName
    """What happens."""
    seconds: float = 0.0
    """Length of ``delay``, or how long after the call the VM dies."""
    after: bool = False
    """For ``kill``: after the call has done its work, instead of before."""

    def applies(self, call: int) -> bool:
        """Whether the *call*-th call of the operation is meant."""
        return self.first <= call and (self.last is None or call <= self.last)


class FaultPlan:
    """What goes wrong, and when.

    The drivers that share a plan call `hit` at the start of each operation. ``die`` needs somebody who can
    end VMs: the mock hypervisor registers itself with `on_die`.
    """

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self.calls: Counter[str] = Counter()
        """How often each operation was called."""
        self._die: Callable[[str, float], None] | None = None

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Read a plan such as ``hypervisor.launch:2=fail; agent.execute:*=delay(0.2); vm:1=die``.

        Raises:
            InvalidArgumentError: The text is not a plan; the message says which rule, and what would be.
        """
        return cls(*(parse_rule(part) for part in text.split(";") if part.strip()))

    def on_die(self, die: Callable[[str, float], None]) -> None:
        """Let ``die(vm_id, seconds)`` end a VM after so many seconds when a rule asks for it."""
        self._die = die

    async def hit(self, operation: str, *, vm_id: str | None = None) -> None:
        """Count one call of *operation* and do what the plan has for it, in the order of its rules.

        Args:
            operation: One of `OPERATIONS`.
            vm_id: The VM that the call is about, which ``die`` ends.

        Raises:
            DriverError: The plan says ``fail`` (or ``die`` where no VM is known): of the class that the
                operation's driver raises.
            ValueError: No such operation.
        """
        if operation not in OPERATIONS:
            raise ValueError(f"{operation} is not an operation of a fault plan.")
        self.calls[operation] += 1
        call = self.calls[operation]
        for rule in self.rules:
            if rule.operation == operation and rule.applies(call):
                await self._carry_out(rule, call, vm_id)

    async def _carry_out(self, rule: Rule, call: int, vm_id: str | None) -> None:
        match rule.action:
            case "fail":
                raise _error(rule.operation, call)
            case "delay":
                await asyncio.sleep(rule.seconds)
            case "hang":
                await asyncio.get_running_loop().create_future()  # for ever: the caller's limit ends it
            case "die":
                if vm_id is None or self._die is None:
                    raise _error(rule.operation, call)
                self._die(vm_id, rule.seconds)


def _error(operation: str, call: int) -> DriverError:
    cls = ERRORS[operation.partition(".")[0]]
    return cls(f"The fault plan failed call {call} of {operation}.", operation=operation, call=call)


def parse_rule(text: str) -> Rule:
    """Read one rule, ``OPERATION:WHEN=ACTION``; raises InvalidArgumentError as `FaultPlan.parse`."""
    text = text.strip()
    match = _RULE.fullmatch(text)
    if match is None:
        raise _bad(text, f"is not OPERATION:WHEN=ACTION; a plan looks like {_EXAMPLE!r}")
    operation = match["op"]
    action, seconds = _parse_action(text, match["action"], match["arg"])
    point = action in ("kill", "trace") and (operation == "*" or _POINT.fullmatch(operation))
    if operation not in OPERATIONS and not point:
        near = difflib.get_close_matches(operation, OPERATIONS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"operations are {', '.join(sorted(OPERATIONS))}"
        raise _bad(text, f"{operation!r} is not an operation; {hint}")
    first, last = _parse_when(text, match["when"])
    if operation == "vm" and action != "die":
        raise _bad(text, "'vm' stands for a VM's life and knows only 'die' and 'die(SECONDS)'")
    return Rule(operation, first, last, action, after=match["arg"] == "after", seconds=seconds)


def _parse_when(text: str, when: str) -> tuple[int, int | None]:
    """First and last call of ``N``, ``N-``, ``-N``, ``N-M`` or ``*``."""
    match = _WHEN.fullmatch(when)
    if match is None or when == "-":
        raise _bad(text, f"{when!r} is not a call number; use N, N- (from), -N (through), N-M or *")
    if match["any"]:
        return 1, None
    first = int(match["first"]) if match["first"] else 1
    last = int(match["last"]) if match["last"] else None
    if not match["to"]:
        last = first
    if first < 1 or (last is not None and last < first):
        raise _bad(text, f"{when!r} names no call; calls are counted from 1")
    return first, last


def _parse_action(text: str, action: str, arg: str | None) -> tuple[ActionName, float]:
    match action, arg:
        case (("fail" | "hang" | "die"), None):
            return action, 0.0
        case ("kill", None | "after") | ("trace", None):
            return cast(ActionName, action), 0.0
        case "kill", str():
            raise _bad(text, "'kill' knows only kill and kill(after)")
        case (("delay" | "die"), str()):
            return action, _parse_seconds(text, arg)
        case "delay", None:
            raise _bad(text, "'delay' needs its seconds, such as delay(0.5)")
        case (("fail" | "hang" | "trace"), str()):
            raise _bad(text, f"{action!r} takes nothing in parentheses")
        case _:
            raise _bad(
                text,
                f"{action!r} is not an action; use fail, delay(SECONDS), hang, die, die(SECONDS) or kill",
            )


def _parse_seconds(text: str, arg: str) -> float:
    if not re.fullmatch(r"\s*\d{1,5}(\.\d{1,9})?\s*", arg) or float(arg) > MAX_DELAY_S:
        raise _bad(text, f"{arg!r} is not a number of seconds from 0 to {MAX_DELAY_S:.0f}")
    return float(arg)


def _bad(rule: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError.field("faults", f"{rule!r}: {problem}")
