"""A question to many: who answers late is heard later, and nobody waits where nobody listens."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vcnode.client.requests import Poll

SILENCE = SimpleNamespace(data=b"", headers={"Status": "503"})


class Line:
    """What was asked, and what comes back."""

    def __init__(self) -> None:
        self.subjects: list[str] = []
        self.replies: asyncio.Queue[Any] = asyncio.Queue()
        self.poll = Poll(self.put, self.replies)

    async def put(self, subject: str) -> None:
        self.subjects.append(subject)

    def reply(self, text: str) -> None:
        self.replies.put_nowait(SimpleNamespace(data=text.encode(), headers=None))


@pytest.fixture
def line() -> Line:
    return Line()


async def texts(line: Line, **limits: Any) -> list[str]:
    async with asyncio.timeout(5):
        return [msg.data.decode() for msg in await line.poll.collect(**limits)]


async def test_a_late_answer_counts_in_the_next_round(line: Line) -> None:
    await line.poll.ask(["a"])
    assert await texts(line, timeout_s=0.01, enough=1) == []
    line.reply("late")
    await line.poll.ask(["b"])
    assert await texts(line, timeout_s=60, enough=1) == ["late"]
    assert line.subjects == ["a", "b"]


async def test_nobody_waits_where_nobody_listens(line: Line) -> None:
    await line.poll.ask(["a", "b"])
    line.replies.put_nowait(SILENCE)
    line.replies.put_nowait(SILENCE)
    assert await texts(line, timeout_s=60, enough=1) == []
    assert await texts(line, timeout_s=60, enough=1) == []


async def test_after_the_first_answer_the_others_have_a_moment(line: Line) -> None:
    await line.poll.ask(["a"])
    line.reply("first")
    line.reply("second")
    assert await texts(line, timeout_s=60, enough=9, settle_s=0.01) == ["first", "second"]
