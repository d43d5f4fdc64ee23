"""How replies reach the terminal: tables for people, the reply's own JSON for programs.

Whatever a node sends is shown without control characters: it may repeat what a hostile guest wrote.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pydantic import BaseModel

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

STATE_STYLES = {
    "running": "green",
    "started": "green",
    "ready": "cyan",
    "paused": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
    "draining": "yellow",
    "failed": "bold red",
    "stopped": "dim",
}
"""Colours of states, on terminals that have them."""


def printable(text: str) -> str:
    """*text* with its control characters made visible (``\\x1b``); tabs and line ends stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def console(*, error: bool = False) -> Console:
    """The terminal; where there is none, lines are as long as they must be, so that they can be searched."""
    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 10_000, highlight=False, emoji=False)


def show_json(reply: BaseModel) -> None:
    """Print *reply* as its model writes it."""
    print(reply.model_dump_json(indent=2))


def cell(value: object, style: str = "") -> Text:
    """*value* as the content of a table cell; None and '' become '-'."""
    text = "" if value is None else printable(str(value)).replace("\n", " ")
    return Text(text or "-", style=style)


def state(value: str) -> Text:
    """A state in its colour."""
    return cell(value, STATE_STYLES.get(value, ""))


def show_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print *rows* below *heads*."""
    _print(make_table(heads, rows))


def make_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """*rows* below *heads*, to be printed."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head in ("POD", "CONTAINER", "STATE", "NODE"))
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else cell(value) for value in row))
    return table


def show_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print name-value pairs, one a line; those whose value is None or empty are left out."""
    table = Table(box=None, pad_edge=False, show_header=False, show_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value is None or value == "" or value == ():
            continue
        table.add_row(name, value if isinstance(value, Text) else cell(value))
    _print(table)


def _print(table: Table) -> None:
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def age(moment: datetime | None, *, now: datetime | None = None) -> str:
    """How long ago *moment* was, in the largest unit that says enough: ``42s``, ``7m``, ``3h``, ``12d``."""
    if moment is None:
        return "-"
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def size(size_bytes: int) -> str:
    """*size_bytes* in the unit that reads best: ``812 B``, ``4.1 MiB``."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def labels(values: dict[str, str]) -> str:
    """Labels on one line."""
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items()))
