from __future__ import annotations

import io

import pytest
from rich.console import Console

from vcnode.cli.demo.screen import Screen, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.0124, "12 ms"), (1.234, "1.23 s"), (75, "75.00 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200))

    screen.title("T")
    with screen.step("a step"):
        screen.event("pod.failed", "p", "why \x1b[2J [red]")
    screen.output("stdout", "one\ntwo\x07\n")
    screen.check("mounts", [])
    screen.check("mounts", ["/m"])

    text = out.getvalue()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "pod.failed p  why \\x1b[2J [red]" in text
    assert "stdout │ two\\x07" in text
    assert "✔ no mounts" in text
    assert "✘ mounts:\n    /m" in text


def test_a_step_that_fails_is_not_ticked_off() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=200))

    with pytest.raises(ValueError, match="no"), screen.step("a step"):
        raise ValueError("no")

    assert "✔" not in out.getvalue()
