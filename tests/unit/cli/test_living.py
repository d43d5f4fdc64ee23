"""``vcnode container wait``, as long as it takes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vcnode.cli import living
from vcnode.errors import DeadlineExceededError
from vcnode.models.living import ContainerWaited


class Waiting:
    """A command line, and the node that it asks: the first request is never answered."""

    options = SimpleNamespace(deadline_s=None)

    def __init__(self) -> None:
        self.deadlines: list[float | None] = []

    @contextlib.asynccontextmanager
    async def node(self) -> AsyncIterator[Waiting]:
        yield self

    async def container_wait(self, *_: object, deadline_s: float | None) -> ContainerWaited:
        self.deadlines.append(deadline_s)
        if len(self.deadlines) == 1:
            raise DeadlineExceededError("no answer")
        return ContainerWaited(pod_id="p1", container_id="c1", condition="removed")

    def show(self, *_: object) -> None:
        pass


async def test_a_node_agent_that_was_killed_is_asked_again_within_a_minute() -> None:
    cli: Any = Waiting()
    assert await living.wait(cli, "p1", "c1", "removed") == 0
    assert cli.deadlines == [60.0, 60.0]
