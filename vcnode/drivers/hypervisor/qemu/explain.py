"""Why a VM ended, in one sentence, from what is known of it. Pure."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from vcnode.drivers.hypervisor.qemu.fifolog import last_lines
from vcnode.models.vm import VmExit

TAIL_LINES = 20
"""Lines of the console that go along."""
MAX_QUOTE_CHARS = 200
"""Most characters of the guest's own words that enter a reason."""

_PANIC = re.compile(r"Kernel panic - not syncing: (.+)")
_AGENT_DIED = re.compile(r"vcnode-agent: died: (.+)")

_SHUTDOWN = {
    "guest-shutdown": "The guest powered off.",
    "guest-reset": "The guest powered off.",  # with -no-reboot a reset is how microvm is turned off
    "guest-panic": "The guest's kernel panicked.",
    "host-signal": "QEMU was ended by a signal from outside.",
    "host-qmp-quit": "QEMU was told to quit.",
    "host-error": "QEMU ended the VM after an error of its own.",
}
"""By the ``reason`` of QMP's event SHUTDOWN. Source: QEMU qapi/run-state.json, ShutdownCause."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the end of a VM."""

    exit_code: int | None
    """Of QEMU; negative for a signal, None if it was not our child."""
    shutdown: str | None
    """``reason`` of the event SHUTDOWN, if it came."""
    console: str
    """The end of the guest's console."""
    stopping: bool
    """Whether ``stop`` had been called."""


def explain(evidence: Evidence) -> VmExit:
    """Say how a VM ended. What a guest printed is quoted as such, never believed."""
    return VmExit(
        expected=evidence.stopping,
        exit_code=evidence.exit_code,
        reason=_reason(evidence),
        console_tail=last_lines(evidence.console, TAIL_LINES),
    )


def _reason(e: Evidence) -> str:
    if e.shutdown in (None, "guest-reset", "guest-panic") and (found := _last(_PANIC, e.console)):
        return f"The guest's kernel panicked: {found}."
    if e.shutdown in (None, "guest-reset", "guest-shutdown") and (found := _last(_AGENT_DIED, e.console)):
        return f"The guest agent died: {found}."
    if e.exit_code is not None and e.exit_code < 0:
        return f"QEMU was killed by {_signal_name(-e.exit_code)}."
    if e.shutdown in _SHUTDOWN:
        return _SHUTDOWN[e.shutdown]
    if e.exit_code:
        return f"QEMU failed with exit code {e.exit_code}; the node's log has its last words."
    if e.exit_code is None:
        return "QEMU ended; its exit code went to the node agent that started it."
    return "QEMU ended."


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].rstrip(". ")[:MAX_QUOTE_CHARS] if found else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
