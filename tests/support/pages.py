"""What stands in the pages for people: fenced blocks, and code in the midst of sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "contracts/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
"""Every page that tells people what to type."""

_FENCED = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: Path
    language: str
    """As the fence names it: ``sh``, ``python``, ``toml``, …; ``text`` is only to be looked at."""
    text: str

    @property
    def id(self) -> str:
        """Names it in the list of tests."""
        return f"{self.page.relative_to(ROOT)}: {self.text.strip()[:40]}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of *page*."""
    return [Block(page, language, text) for language, text in _FENCED.findall(page.read_text())]


def spans(page: Path) -> list[str]:
    """What stands between backticks in the sentences of *page*, each in one line."""
    prose = _FENCED.sub("", page.read_text())
    found = (span for paragraph in prose.split("\n\n") for span in re.findall(r"`([^`]+)`", paragraph))
    return [" ".join(span.split()) for span in found]
