"""Many nodes as one: where to put a pod, and what became of it.

::

    async with await Client.connect(url) as client, Fleet(client) as fleet:
        placed = await fleet.place(PodSpec(id="web", containers=(...,)), Constraints(labels={"zone": "a"}))
        async for change in fleet.watch():
            ...
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import nats.errors
import nats.js.errors
from pydantic import ValidationError

from vcnode import aio
from vcnode.bus.library import uncancelled
from vcnode.client.client import Client
from vcnode.client.placement import HOLD_S, best_first, rounds
from vcnode.client.replicas import Replicas
from vcnode.client.requests import NobodyListensError
from vcnode.client.view import FleetChange, FleetView, NodeView, PodKey
from vcnode.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    VcnodeError,
)
from vcnode.models.fleet import Bid, Constraints, PodBid, PodRelease
from vcnode.models.pod import PodSpec, PodStatus
from vcnode.models.wire import SERVICE_ERROR

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = logging.getLogger(__name__)

ENOUGH_BIDS = 6
"""Bids after which nobody else is waited for."""
BID_WAIT_S = 0.5
"""Seconds for which the first bid is waited for."""
SETTLE_S = 0.03
"""Seconds after the first bid for others to come: who answers later is busy, and no better choice."""
EXPLAIN_WAIT_S = 1.0
PATIENCE_S = 2.0
ASK_AGAIN_S = (0.02, 0.1)
"""Least and most seconds before nodes are asked again whose room is promised to others."""
ANOTHER_NODE = (ResourceExhaustedError, FailedPreconditionError, NotFoundError, AlreadyExistsError)
"""Refusals of a node after which the next best is asked: nothing runs there."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pod runs."""

    node: str
    """The node."""
    pod: PodStatus
    """The pod, running."""
    bid: Bid
    """The bid that won."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Nodes that had bid better and then refused, and why."""


class Fleet:
    """All nodes behind one client; ``async with`` it to have `nodes`, `pods` and `watch`.

    Args:
        client: An open connection, which stays the caller's.
        dice: For choosing among equals.
    """

    def __init__(self, client: Client, *, dice: random.Random | None = None) -> None:
        self._client = client
        self._requester = client._requester
        self._subjects = client._subjects
        self._dice = dice or random.Random()  # noqa: S311 -- spreading, not secrets
        self._view: FleetView | None = None

    async def __aenter__(self) -> Self:
        view = FleetView(self._requester, self._subjects)
        view.start()
        try:
            await view.ready()
        except BaseException:
            await view.close()
            raise
        self._view = view
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._view is not None:
            await self._view.close()
            self._view = None

    # ---- the view ------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """The connection."""
        return self._client

    @property
    def nodes(self) -> Mapping[str, NodeView]:
        """All nodes of which a lease is known, by name; those whose lease ran out are not ``alive``."""
        return self._entered.nodes

    @property
    def pods(self) -> Mapping[PodKey, PodStatus]:
        """The last status of every pod, by node and pod id."""
        return self._entered.pods

    def gone_for_s(self, node: str) -> float | None:
        """Seconds since a node's lease ran out or was given back; None while it holds.

        Only time in which the server was heard counts. A node that was never seen counts as gone since the
        fleet was entered: it may have been there until then.
        """
        return self._entered.gone_for_s(node)

    def watch(self) -> AsyncIterator[FleetChange]:
        """What is known now, then every change: nodes that join, change, are lost or leave, and pods."""
        return self._entered.changes()

    @property
    def _entered(self) -> FleetView:
        if self._view is None:
            raise RuntimeError("Enter the fleet with 'async with' first.")
        return self._view

    # ---- placement -----------------------------------------------------------------------------------

    async def bids(
        self,
        spec: PodSpec,
        constraints: Constraints | None = None,
        *,
        hold_s: float = 0.0,
        explain: bool = False,
    ) -> tuple[Bid, ...]:
        """Ask all nodes whether they could run a pod, the best bid first.

        Args:
            spec: The pod.
            constraints: Where it may go.
            hold_s: Seconds for which each node that can keeps what the pod needs.
            explain: Whether nodes that cannot say why; their bids come last.
        """
        body = _request(spec, constraints, hold_s=hold_s, explain=explain)
        enough = await self._size()
        found = _bids(
            await self._requester.scatter(self._asked(None), body, timeout_s=EXPLAIN_WAIT_S, enough=enough)
        )
        able = best_first(found, self._dice)
        return (*able, *sorted((bid for bid in found if not bid.able), key=lambda bid: bid.node))

    async def place(
        self,
        spec: PodSpec,
        constraints: Constraints | None = None,
        *,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        hold_s: float | None = None,
    ) -> Placement:
        """Run a pod on the node that bids best; when that one refuses, on the next.

        A pod without an id gets one here. Each node is told to run it under a command id, so nothing runs
        twice there, whatever is lost on the way.

        Args:
            spec: The pod.
            constraints: Where it may go, and where it had better go.
            deadline_s: Limit of each ``pod.run``; None: the verb's own.
            patience_s: Seconds for which nodes are asked that say nothing or have promised their room.
            hold_s: Seconds for which nodes keep what the pod needs; more where a command takes seconds to
                arrive. None: `HOLD_S`.

        Raises:
            ResourceExhaustedError: No node can take it; ``details["refused"]`` has what nodes said. `bids`
                with *explain* has the reasons of all.
            DeadlineExceededError, UnavailableError: A node was told to run the pod and its answer was lost:
                the pod may run there (``details["node"]``). Ask it, before the pod is placed elsewhere.
            VcnodeError: The pod itself is at fault, or failed to start there.
        """
        if spec.id is None:
            spec = spec.model_copy(update={"id": f"pod-{secrets.token_hex(6)}"})
        body = _request(spec, constraints, hold_s=HOLD_S if hold_s is None else hold_s, explain=False)
        refused: dict[str, str] = {}
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + patience_s
        wait_s = BID_WAIT_S
        # One poll for all rounds: whoever answers late is heard in a later round, so a fleet that is busy is
        # not asked ever more.
        with self._requester.poll(body) as poll:
            while True:
                again = True
                for shares in rounds(await self._size(), self._dice):
                    await poll.ask(self._asked(shares))
                    # Never much beyond the patience: rounds that are answered at once double it often.
                    limit_s = max(BID_WAIT_S, min(wait_s, give_up_at - loop.time()))
                    replies = await poll.collect(timeout_s=limit_s, enough=ENOUGH_BIDS, settle_s=SETTLE_S)
                    found = _bids(replies)
                    bids = [bid for bid in best_first(found, self._dice) if bid.node not in refused]
                    late: set[str] = set()
                    if (placed := await self._run(spec, bids, refused, late, deadline_s)) is not None:
                        return placed
                    # Silence is "no", or "busy"; who is out of room for what others were promised says so.
                    held = any(bid.held_s is not None for bid in found)
                    again = again and (not found or held or bool(late))
                if not again or loop.time() >= give_up_at:
                    break
                # What others were promised and do not take is given back within milliseconds.
                await asyncio.sleep(self._dice.uniform(*ASK_AGAIN_S))
                wait_s *= 2
        raise ResourceExhaustedError(
            f"No node can take pod {spec.id}{'; ' + str(len(refused)) + ' refused' if refused else ''}.",
            pod_id=spec.id,
            refused=refused,
        )

    async def _run(
        self,
        spec: PodSpec,
        bids: Sequence[Bid],
        refused: dict[str, str],
        late: set[str],
        deadline_s: float | None,
    ) -> Placement | None:
        """Run the pod on the first node that takes it; what the others kept is given back.

        Nodes that do not take it are added to *refused*, with what they say; those whose reservation had
        expired when they were told, because they or we are busy, to *late*: they may be asked again.
        """
        todo = list(bids)
        try:
            while todo:
                bid = todo.pop(0)
                try:
                    status = await self._run_on(spec, bid, deadline_s)
                except VcnodeError as exc:
                    if not _is_refusal(exc):
                        exc.details.setdefault("node", bid.node)
                        raise
                    if isinstance(exc, FailedPreconditionError) and "reservation" in exc.details:
                        late.add(bid.node)
                    else:
                        refused[bid.node] = exc.message
                else:
                    return Placement(bid.node, status, bid, refused)
            return None
        finally:
            await self._give_back(todo)

    async def _run_on(self, spec: PodSpec, bid: Bid, deadline_s: float | None) -> PodStatus:
        """Run the pod there; gives up when the node is lost meanwhile."""
        async with aio.Interruptible() as section:

            def listen(change: FleetChange) -> None:
                if change.node == bid.node and change.kind in ("node.lost", "node.left"):
                    section.interrupt(
                        UnavailableError(
                            f"Node {bid.node} was lost while it started pod {spec.id}; it may run there."
                        )
                    )

            with self._view.listening(listen) if self._view else contextlib.nullcontext():
                return await self._client.node(bid.node).pod_run(
                    spec,
                    reservation=bid.reservation,
                    deadline_s=deadline_s,
                    command_id=f"place-{secrets.token_hex(8)}",
                )
        raise AssertionError("a section that was not interrupted has returned")

    async def _give_back(self, bids: Sequence[Bid]) -> None:
        """Release reservations that are not wanted; nobody waits for the answers."""
        for bid in bids:
            if bid.reservation is not None:
                body = PodRelease(reservation=bid.reservation).model_dump_json().encode()
                await self._requester.tell(self._subjects.rpc(bid.node, "pod.release"), body)

    async def run_replicas(
        self,
        name: str,
        spec: PodSpec,
        count: int,
        constraints: Constraints | None = None,
        *,
        fence_s: float | None = None,
    ) -> None:
        """Keep *count* copies of a pod running, spread over the nodes; those of lost nodes are replaced.

        Runs until cancelled; the copies go on then, and the same call takes them over again. With a *count*
        of 0 it removes them all, and runs on.

        Args:
            name: Of the set; the pods are called ``<name>-<index>``.
            spec: The pod; its id is not used.
            count: How many.
            constraints: Where they may go.
            fence_s: For pods of which there must never be two: a copy on a node whose lease ran out or was
                given back is replaced only after so many seconds, by when nothing of it may run there any
                more; see docs/fleet.md for what that rests on. One scheduler at a time. Default: with an
                ``on_disconnect`` that pauses or stops, as long as that takes; else at once.

        Raises:
            InvalidArgumentError: By then ``on_disconnect`` would not have ended a copy.
            UnavailableError: The connection was closed.
        """
        await Replicas(self, name, spec, count, constraints, fence_s=fence_s).run()

    def _asked(self, shares: tuple[str, ...] | None) -> list[str]:
        """Where some shares of the fleet are asked, or everybody (None)."""
        if shares is None:
            return [self._subjects.everyone("pod.bid")]
        return [self._subjects.some("pod.bid", share) for share in shares]

    async def _size(self) -> int:
        """About how many nodes there are: the leases in the bucket."""
        if self._view is not None:
            return max(1, len(self._view.nodes))
        try:
            js = self._requester.client.jetstream()
            info = await uncancelled(js.stream_info(f"KV_{self._subjects.node_bucket}"))
        except (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError):
            return 1  # no JetStream, no leases: everybody is asked
        return max(1, info.state.messages)


def _request(spec: PodSpec, constraints: Constraints | None, *, hold_s: float, explain: bool) -> bytes:
    fields = {"pod": spec, "hold_s": hold_s, "explain": explain}
    if constraints is not None:
        fields["constraints"] = constraints
    return PodBid.model_validate(fields).model_dump_json(exclude_unset=True).encode()


def _bids(replies: Iterable[Msg]) -> list[Bid]:
    """What nodes have answered to a call for bids."""
    bids: list[Bid] = []
    for msg in replies:
        if SERVICE_ERROR in (msg.headers or {}):
            continue  # a node too busy to bid
        try:
            bids.append(Bid.model_validate_json(msg.data))
        except ValidationError:
            log.warning("Something that is no node answered a call for bids")
    return bids


def _is_refusal(exc: VcnodeError) -> bool:
    """Whether nothing runs there because of this command, and another node may do better."""
    if isinstance(exc, (*ANOTHER_NODE, NobodyListensError)):
        return True
    # Cordoned or draining: said by the node itself, before it did anything.
    return isinstance(exc, UnavailableError) and "state" in exc.details
