from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from vcnode.cli.output import age, printable, show_facts, show_table, size

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172800, "2d")]
)
def test_age_in_the_largest_unit_that_says_enough(seconds: int, text: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), now=NOW) == text


def test_age_of_what_never_happened() -> None:
    assert age(None) == "-"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**52, "4096.0 TiB")],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


def test_control_characters_are_made_visible() -> None:
    assert printable("a\x1b[31mb\x9bc\td\n") == "a\\x1b[31mb\\x9bc\td\n"


def test_tables_are_not_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("A", "B"), [("x" * 300, "last"), (None, "")])

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["x" * 300, "last"]
    assert lines[2].split() == ["-", "-"]
    assert all(line == line.rstrip() for line in lines)


def test_markup_and_escapes_from_a_guest_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("REASON",), [("[red]\x1b]0;x\x07 :smile:\nnext",)])

    assert capsys.readouterr().out.splitlines()[1] == "[red]\\x1b]0;x\\x07 :smile: next"


def test_facts_that_are_not_known_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts((("a", 0), ("b", None), ("c", ""), ("d", ()), ("e", "x")))

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["a", "0"], ["e", "x"]]
