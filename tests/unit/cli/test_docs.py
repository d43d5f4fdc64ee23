"""Every ``vcnode`` command line in README and docs/ is one that the command line takes.

Nothing is run: a line is parsed down to its options and arguments. Words in capitals stand for what people
put there. What can be run is run by ``tests/integration/test_readme.py`` and ``test_docs.py``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from tests.support.pages import PAGES, blocks, spans
from vcnode.cli.app import app

COMMAND = typer.main.get_command(app)
UsageError = typer.BadParameter.__bases__[0]
"""What the command line says of words that it does not take; Typer gives it no public name."""


def lines(page: Path) -> Iterator[str]:
    """The command lines of a page: in fenced blocks, and in the midst of sentences."""
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            if found := re.match(r"\s*(?:[A-Z_]+=(?:'[^']*'|\S+)\s+)*(?:\S*/)?(vcnode\s.*)", line):
                yield found[1]
    yield from (span for span in spans(page) if span.startswith("vcnode "))


def parse(words: list[str]) -> None:
    """Let the command line take *words* as it would, and do nothing.

    Raises:
        UsageError: It would not.
    """
    command: Any = COMMAND
    parent = command.context_class(command, info_name="vcnode")
    while isinstance(command, TyperGroup):
        if not words or words[0].startswith("--"):
            command.make_parser(parent).parse_args(list(words))
            return  # a group alone is a way to name it
        name, command, words = command.resolve_command(parent, words)
        parent = command.context_class(command, info_name=name, parent=parent)
    if words in ([], ["--help"]):
        return  # "`vcnode place`" in a sentence names the command
    try:
        command.make_context(command.name, list(words), parent=parent.parent).close()
    except typer.BadParameter as exc:
        if not any(word.isupper() and f"'{word}'" in str(exc) for word in words):
            raise


def cases() -> list[object]:
    return [
        pytest.param(line, id=f"{page.name}: {line[:60]}")
        for page in PAGES
        for line in dict.fromkeys(lines(page))
    ]


@pytest.mark.parametrize("line", cases())
def test_a_command_of_the_docs_is_a_command(line: str) -> None:
    words = shlex.split(re.split(r"\s[<>|]\s|\s2>|\s&", line)[0], comments=True)[1:]
    if words[:1] == ["COMMAND"]:
        return
    parse(words)


@pytest.mark.parametrize(
    "line", ["pods --frobnicate", "frobnicate", "pod frobnicate", "pod run --memory plenty x", "exec web"]
)
def test_it_would_notice(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())
