"""Keeping copies of a pod: what to do next, given what the fleet shows. The deciding is pure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vcnode.client.placement import HOLD_S
from vcnode.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    VcnodeError,
)
from vcnode.models.fleet import Constraints
from vcnode.models.pod import PodSpec, PodState, PodStatus

if TYPE_CHECKING:
    from vcnode.client.fleet import Fleet

log = logging.getLogger(__name__)

LABEL = "vcnode.replicas-of"
"""Label that all copies carry; its value is the set's name."""
ENDED = frozenset({PodState.STOPPED, PodState.FAILED})
RETRY_S = 2.0
"""Seconds before what the fleet refused is tried again, if nothing changes in the meantime."""
LOOK_S = 0.5
"""Least seconds to wait for time to pass: it passes in steps, whenever the server is heard."""
TAKE_OVER_S = HOLD_S + 1.0
"""Seconds before a copy that must be one is first placed: what an earlier scheduler had asked for shows by
then, or is refused since its reservation has expired."""
ASK_S = 5.0
"""Seconds for a node to say what became of a pod."""
SHOWN_S = 3.0
"""Seconds after which the node is asked for a copy that was placed and that the buckets do not show."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One pod of the set, on one node."""

    index: int
    node: str
    status: PodStatus
    lost_for_s: float | None = None
    """Seconds since the node's lease ran out or was given back; None while it holds."""


@dataclass(frozen=True, slots=True)
class Place:
    """Run a copy."""

    index: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a copy, provided that it is still what was seen."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done for a copy before so many seconds have passed."""

    index: int
    seconds: float


Action = Place | Delete | Wait


def decide(copies: Iterable[Copy], count: int, *, fence_s: float | None) -> list[Action]:
    """What to do next.

    Args:
        copies: All pods of the set that are known, on whatever nodes.
        count: How many there shall be: indexes 0 to count - 1, one of each.
        fence_s: None: a copy whose node is lost is replaced at once, and may run twice for a while. Otherwise
            it is replaced only when its node has been gone for so many seconds: long enough for nothing of it
            to run there any more.
    """
    by_index: dict[int, list[Copy]] = {index: [] for index in range(count)}
    actions: list[Action] = []
    for copy in copies:
        if copy.index in by_index:
            by_index[copy.index].append(copy)
        elif copy.lost_for_s is None:
            actions.append(Delete(copy))
    for index, found in by_index.items():
        actions += _decide_one(index, found, fence_s)
    return actions


def _decide_one(index: int, copies: list[Copy], fence_s: float | None) -> list[Action]:
    there = [copy for copy in copies if copy.lost_for_s is None]
    # The newest counts: an older one is on a node that had been lost, or was placed when an answer was lost.
    living = sorted(
        (copy for copy in there if copy.status.state not in ENDED),
        key=lambda copy: (copy.status.created_at, copy.node),
        reverse=True,
    )
    actions: list[Action] = [Delete(copy) for copy in living[1:]]
    actions += [Delete(copy) for copy in there if copy.status.state in ENDED]
    if living:
        return actions
    if fence_s is not None:
        left = [
            fence_s - copy.lost_for_s
            for copy in copies
            if copy.lost_for_s is not None and copy.status.state not in ENDED
        ]
        if left and max(left) > 0:
            return [*actions, Wait(index, max(left))]
    return [*actions, Place(index)]


def fence_of(spec: PodSpec, fence_s: float | None) -> float | None:
    """Seconds that a node must be gone before a copy on it is replaced, by the copy's ``on_disconnect``.

    Args:
        spec: The pod.
        fence_s: What the caller wants; None: what the spec needs, if anything.

    Raises:
        InvalidArgumentError: By then a copy could still run, or run again.
    """
    ends_after_s = spec.ends_after_s
    if fence_s is None or ends_after_s is None:
        return ends_after_s if fence_s is None else fence_s
    if spec.on_disconnect.action == "pause":
        raise InvalidArgumentError(
            "fence_s does not go with on_disconnect 'pause': such a copy goes on when its node is back, "
            "beside its replacement; use 'stop'."
        )
    if fence_s < ends_after_s:
        raise InvalidArgumentError(
            f"fence_s must be at least {ends_after_s:g}, by when on_disconnect has ended a copy: after_s, "
            "the longest stop_timeout_s, and a margin."
        )
    return fence_s


class Replicas:
    """Keeps copies of a pod running; `run` until cancelled.

    Args:
        fleet: Entered.
        name: Of the set: the pods are called ``<name>-<index>``.
        spec: The pod; its id is not used.
        count: How many copies.
        constraints: Where they may go. They are spread over the nodes in any case.
        fence_s: See `decide`. By then nothing of a copy may run on a node that is gone. None: as long as
            the spec's ``on_disconnect`` takes to end a copy, if it does.

    Raises:
        InvalidArgumentError: See `fence_of`.
    """

    def __init__(
        self,
        fleet: Fleet,
        name: str,
        spec: PodSpec,
        count: int,
        constraints: Constraints | None = None,
        *,
        fence_s: float | None = None,
    ) -> None:
        self._fleet = fleet
        self._name = name
        self._spec = spec
        self._count = count
        self._constraints = (constraints or Constraints()).model_copy(update={"spread_by": LABEL})
        self._fence_s = fence_of(spec, fence_s)
        self._placed: dict[tuple[str, str], PodStatus] = {}
        """Copies that were placed and that the buckets do not show yet."""
        self._placed_at: dict[tuple[str, str], float] = {}
        """When (loop time), or when the node last said that it has it."""
        self._unknown: dict[int, str] = {}
        """Copies of which the answer was lost, and the node that may run them."""
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Place, replace and remove copies as the fleet changes, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            if self._fence_s is not None:
                await asyncio.sleep(TAKE_OVER_S)
            while True:
                self._changed.clear()
                wait_s = await self._step()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    def copies(self) -> list[Copy]:
        """All pods of the set that are known now."""
        known = dict(self._fleet.pods)
        for key, status in list(self._placed.items()):
            if key in known or self._is_over(key[0]):
                self._forget(*key)
            else:
                known[key] = status
        return [
            Copy(index, node, status, self._fleet.gone_for_s(node))
            for (node, pod_id), status in known.items()
            if status.labels.get(LABEL) == self._name and (index := self._index(pod_id)) is not None
        ]

    async def _listen(self) -> None:
        async for change in self._fleet.watch():
            if change.kind != "node.changed":
                self._changed.set()

    async def _step(self) -> float | None:
        """Do what is to be done now; returns after how many seconds to look again (None: at a change)."""
        await self._find_out()
        await self._look_after()
        wait_s: list[float] = []
        for action in decide(self.copies(), self._count, fence_s=self._fence_s):
            try:
                match action:
                    case Wait(seconds=seconds):
                        wait_s.append(max(seconds, LOOK_S))
                    case Delete(copy):
                        await self._delete(copy)
                    case Place(index) if index not in self._unknown:
                        await self._place(index)
            except VcnodeError as exc:
                log.info("Replicas of %s: %s", self._name, exc.message)
                wait_s.append(RETRY_S)
        if self._unknown or self._placed:
            wait_s.append(RETRY_S)
        return min(wait_s, default=None)

    async def _place(self, index: int) -> None:
        spec = self._spec.model_copy(
            update={
                "id": f"{self._name}-{index}",
                "labels": {**self._spec.labels, LABEL: self._name},
            }
        )
        try:
            placed = await self._fleet.place(spec, self._constraints)
        except (ResourceExhaustedError, InvalidArgumentError):
            raise
        except VcnodeError as exc:
            if (node := exc.details.get("node")) is not None:
                self._unknown[index] = str(node)
            raise
        self._remember(placed.node, placed.pod)

    async def _delete(self, copy: Copy) -> None:
        try:
            await self._fleet.client.node(copy.node).pod_delete(
                copy.status.pod_id, force=True, expected_revision=copy.status.revision
            )
        except (NotFoundError, FailedPreconditionError):
            self._changed.set()  # it is not any more what was seen: look again
        self._forget(copy.node, copy.status.pod_id)

    def _remember(self, node: str, status: PodStatus) -> None:
        self._placed[node, status.pod_id] = status
        self._placed_at[node, status.pod_id] = asyncio.get_running_loop().time()

    def _forget(self, node: str, pod_id: str) -> None:
        self._placed.pop((node, pod_id), None)
        self._placed_at.pop((node, pod_id), None)

    async def _look_after(self) -> None:
        """Ask for copies that should show by now: one that was removed at once never shows at all."""
        now = asyncio.get_running_loop().time()
        for (node, pod_id), since in list(self._placed_at.items()):
            if now - since < SHOWN_S or (node, pod_id) in self._fleet.pods or not self._is_there(node):
                continue
            try:
                status = await self._fleet.client.node(node).pod_status(pod_id, deadline_s=ASK_S)
            except NotFoundError:
                self._forget(node, pod_id)
            except VcnodeError as exc:
                log.info("Node %s does not say what became of %s: %s", node, pod_id, exc.message)
            else:
                self._remember(node, status)

    async def _find_out(self) -> None:
        """Ask the nodes whose answers were lost what became of the copies."""
        for index, node in list(self._unknown.items()):
            if not self._is_there(node):
                if self._is_over(node):
                    del self._unknown[index]
                continue
            pod_id = f"{self._name}-{index}"
            try:
                status = await self._fleet.client.node(node).pod_status(pod_id, deadline_s=ASK_S)
            except NotFoundError:
                del self._unknown[index]
            except VcnodeError as exc:
                log.info("Node %s does not say what became of %s: %s", node, pod_id, exc.message)
            else:
                del self._unknown[index]
                self._remember(node, status)

    def _index(self, pod_id: str) -> int | None:
        text = pod_id.removeprefix(f"{self._name}-")
        return int(text) if text != pod_id and text.isdecimal() else None

    def _is_there(self, node: str) -> bool:
        known = self._fleet.nodes.get(node)
        return known is not None and known.alive

    def _is_over(self, node: str) -> bool:
        """Whether nothing that the node was told to run counts any more."""
        gone_for_s = self._fleet.gone_for_s(node)
        return gone_for_s is not None and gone_for_s >= (self._fence_s or 0.0)
