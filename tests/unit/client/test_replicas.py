"""What `Replicas` does beside deciding: a copy that the buckets never show must not count for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.handlers.fakes import pod_status
from vcnode.client.fleet import Fleet
from vcnode.client.replicas import LABEL, Replicas
from vcnode.errors import NotFoundError, UnavailableError
from vcnode.models.pod import PodSpec, PodStatus


class World:
    """A fleet of one node that takes every pod, and whose bucket shows what the test puts there."""

    def __init__(self) -> None:
        self.pods: dict[tuple[str, str], PodStatus] = {}
        self.nodes = {"n1": SimpleNamespace(alive=True)}
        self.there: dict[str, PodStatus] = {}
        self.placed: list[str] = []
        self.asked = 0
        self.silent = False
        self.client = SimpleNamespace(node=lambda _: self)

    def gone_for_s(self, node: str) -> float | None:
        return None if self.nodes[node].alive else 1.0

    async def place(self, spec: PodSpec, _: object) -> Any:
        assert spec.id is not None
        self.placed.append(spec.id)
        status = pod_status(spec.id).model_copy(update={"labels": spec.labels})
        self.there[spec.id] = status
        return SimpleNamespace(node="n1", pod=status)

    async def pod_status(self, pod_id: str, **_: object) -> PodStatus:
        self.asked += 1
        if self.silent:
            raise UnavailableError("busy")
        if pod_id not in self.there:
            raise NotFoundError("none")
        return self.there[pod_id]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def replicas(world: World, monkeypatch: pytest.MonkeyPatch) -> Replicas:
    made = Replicas(cast(Fleet, world), "web", PodSpec(), 1)
    await made._step()
    assert world.placed == ["web-0"]
    monkeypatch.setattr("vcnode.client.replicas.SHOWN_S", 0.0)
    return made


async def test_a_copy_that_was_removed_before_it_was_seen_is_placed_again(
    replicas: Replicas, world: World
) -> None:
    del world.there["web-0"]
    assert await replicas._step() is not None  # it looks again by itself: nothing will ever change
    assert world.placed == ["web-0", "web-0"]


@pytest.mark.parametrize("silent", [False, True])
async def test_a_copy_that_shows_late_is_asked_for_and_kept(
    replicas: Replicas, world: World, silent: bool
) -> None:
    world.silent = silent
    await replicas._step()
    assert (world.placed, world.asked) == (["web-0"], 1)
    world.pods["n1", "web-0"] = pod_status("web-0").model_copy(update={"labels": {LABEL: "web"}})
    assert await replicas._step() is None
    assert (world.placed, world.asked) == (["web-0"], 1)
