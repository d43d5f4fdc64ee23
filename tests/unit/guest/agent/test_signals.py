"""Which signals end a process that is not process 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vcnode.guest.agent import signals

STATUS = "Name:\tx\nSigPnd:\t0\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
TERM_BIT = 1 << (signal.SIGTERM - 1)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({}, True),
        ({"blocked": TERM_BIT}, False),
        ({"ignored": TERM_BIT}, False),
        ({"caught": TERM_BIT}, False),
        ({"caught": TERM_BIT << 1, "ignored": TERM_BIT >> 1}, True),
    ],
)
def test_a_signal_that_nobody_handles_has_its_default_action(masks: dict[str, int], expected: bool) -> None:
    text = STATUS.format(**{"blocked": 0, "ignored": 0, "caught": 0, **masks})
    assert signals.defaults(text, signal.SIGTERM) is expected


def test_a_status_without_masks_promises_nothing() -> None:
    assert not signals.defaults("Name:\tx\n", signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGCHLD, signal.SIGSTOP, signal.SIGWINCH])
def test_signals_that_do_not_end_or_need_no_help_are_left_alone(number: int) -> None:
    assert not signals.would_end(os.getpid(), number)


def test_a_process_that_is_gone_needs_no_signal() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=30)
    assert not signals.would_end(child.pid, signal.SIGTERM)


def test_a_real_process_is_judged_by_its_handlers() -> None:
    program = "import signal; signal.signal(15, lambda *_: None); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        assert not signals.would_end(child.pid, signal.SIGTERM)
        assert signals.would_end(child.pid, signal.SIGUSR1)
        child.communicate("\n", timeout=30)
