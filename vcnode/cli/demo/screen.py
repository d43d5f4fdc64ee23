"""How the demo looks: colours and a spinner on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from vcnode.cli.output import printable

NAME_WIDTH = 58
EVENT_STYLES = {"failed": "bold red", "lost": "bold red", "exited": "yellow"}


def duration(seconds: float) -> str:
    """*seconds* in the unit that reads best."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


class Screen:
    """Prints what the demo does, as it does it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def title(self, text: str) -> None:
        """A headline."""
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def note(self, text: str, style: str = "") -> None:
        """A line of its own."""
        self._console.print(Text(f"  {printable(text)}", style=style))

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Something that takes time: shown while it runs, and how long it took when it is done."""
        begin = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(Text(f"{what} …")):
                yield
        else:
            yield
        took = duration(time.monotonic() - begin)
        line = Text.assemble(("✔ ", "green"), what.ljust(NAME_WIDTH), (took.rjust(9), "cyan"))
        self._console.print(line)

    def event(self, kind: str, subject: str, extra: str = "") -> None:
        """An event that has just arrived."""
        style = next((style for word, style in EVENT_STYLES.items() if kind.endswith(word)), "magenta")
        line = Text.assemble(("    ⇠ ", "dim"), (printable(kind), style), f" {printable(subject)}")
        if extra:
            line.append(f"  {printable(extra)}", style="dim")
        self._console.print(line)

    def output(self, name: str, text: str) -> None:
        """What a command in the pod printed."""
        for line in text.splitlines():
            self._console.print(Text.assemble((f"    {name} │ ", "dim"), printable(line)))

    def check(self, what: str, found: Iterable[str]) -> None:
        """One thing that should not be there."""
        items = list(found)
        if not items:
            self._console.print(Text.assemble(("✔ ", "green"), f"no {what}"))
            return
        self._console.print(Text.assemble(("✘ ", "bold red"), f"{what}:"))
        for item in items:
            self.note(f"  {item}", style="red")
