"""vcnode.drivers.hypervisor.qemu.explain: one sentence from what is known."""

from __future__ import annotations

import pytest

from vcnode.drivers.hypervisor.qemu.explain import MAX_QUOTE_CHARS, Evidence, explain


def evidence(**changes: object) -> Evidence:
    known: dict[str, object] = {
        "exit_code": 0,
        "shutdown": None,
        "console": "",
        "stopping": False,
    }
    return Evidence(**{**known, **changes})  # type: ignore[arg-type]


PANIC = "[ 1.8] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\n[ 1.9] CPU: 0"
PANICKED = "The guest's kernel panicked: Attempted to kill init! exitcode=0x00000300."
DIED = "Traceback …\nvcnode-agent: died: signal 11"


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"shutdown": "guest-shutdown"}, "The guest powered off."),
        ({"shutdown": "guest-reset"}, "The guest powered off."),
        (
            {"shutdown": "guest-reset", "console": PANIC},
            PANICKED,
        ),
        ({"shutdown": "guest-panic"}, "The guest's kernel panicked."),
        ({"shutdown": "guest-reset", "console": DIED}, "The guest agent died: signal 11."),
        ({"shutdown": "host-qmp-quit", "console": PANIC}, "QEMU was told to quit."),
        ({"shutdown": "host-signal"}, "QEMU was ended by a signal from outside."),
        ({"exit_code": -9}, "QEMU was killed by SIGKILL."),
        ({"exit_code": -6, "shutdown": "guest-shutdown"}, "QEMU was killed by SIGABRT."),
        ({"exit_code": -35}, "QEMU was killed by signal 35."),
        ({"exit_code": 1}, "QEMU failed with exit code 1; the node's log has its last words."),
        ({"exit_code": 0}, "QEMU ended."),
        ({"exit_code": None}, "QEMU ended; its exit code went to the node agent that started it."),
        ({"exit_code": None, "console": PANIC}, PANICKED),
    ],
)
def test_reasons(known: dict[str, object], reason: str):
    assert explain(evidence(**known)).reason == reason


def test_a_guest_cannot_flood_the_reason():
    console = "Kernel panic - not syncing: " + "x" * 100_000
    assert len(explain(evidence(console=console)).reason) < MAX_QUOTE_CHARS + 50


def test_facts_are_handed_on():
    found = explain(evidence(exit_code=3, console="last line", stopping=True))
    assert (found.exit_code, found.console_tail, found.expected) == (3, "last line", True)


def test_a_panic_is_found_above_its_call_trace_and_the_tail_is_short():
    console = PANIC + "\n" + "\n".join(f"[ 2.0] frame {n}" for n in range(60))
    found = explain(evidence(shutdown="guest-reset", console=console))
    assert found.reason == PANICKED
    assert found.console_tail.split("\n")[0] == "[ 2.0] frame 40"
