"""``on_disconnect``: what becomes of pods when the fleet has not heard of their node for too long.

A scheduler that must never run a pod twice counts on it (docs/fleet.md), so the time is counted from the
last renewal of the lease that was acknowledged, over restarts of the node agent, and the end of a pod that
is due comes even if NATS is back by then. For the node agent that is dead meanwhile, the guest has a
watchdog: it ends by itself `WATCHDOG_LATE_S` later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from vcnode import logs
from vcnode.errors import AbortedError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.pod import WATCHDOG_LATE_S, PodState
from vcnode.models.records import PodRecord
from vcnode.models.vm import Watchdog
from vcnode.pods.contact import Contact
from vcnode.pods.live import LivePod
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.pause import Pauser
from vcnode.pods.stop import Stopper
from vcnode.pods.watch import ENDS_ITSELF

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Most seconds between two looks: the loop's own clock stands while the host sleeps. It is also the pause
before what has failed is tried again."""

Act = Literal["pause", "resume", "stop"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a pod now."""

    act: Act | None = None
    in_s: float | None = None
    """Seconds after which it may be something else, if nothing else changes."""


def limit_s(record: PodRecord, *, lease_s: float) -> float | None:
    """Seconds without contact that the pod may go on for; None: for ever.

    Never less than *lease_s*: so long nobody takes the node for lost, and the lease is renewed by then.
    """
    after_s = record.spec.on_disconnect.after_s
    return None if after_s is None else max(after_s, lease_s)


def judge(record: PodRecord, *, silent_s: float, lease_s: float) -> Verdict:
    """What is to become of a pod when there was no contact for *silent_s* seconds. Pure."""
    limit = limit_s(record, lease_s=lease_s)
    if limit is None:
        return Verdict()
    if silent_s < limit:
        resumes = record.resumes and record.state is PodState.PAUSED
        return Verdict("resume" if resumes else None, limit - silent_s)
    if record.spec.on_disconnect.action == "pause":
        return Verdict("pause" if record.state is PodState.RUNNING else None)
    if record.state is PodState.STOPPING:
        return Verdict()
    runs = record.state in (PodState.STARTING, PodState.RUNNING, PodState.PAUSED)
    return Verdict("stop" if runs or record.vm is not None or record.restarts.at is not None else None)


def watchdog_of(record: PodRecord, contact: Contact, *, lease_s: float) -> Watchdog | None:
    """When the guest ends the pod by itself, unless it hears otherwise; None: never."""
    limit = limit_s(record, lease_s=lease_s)
    if limit is None or record.spec.on_disconnect.action != "stop":
        return None
    return Watchdog(
        after_s=max(1.0, limit - contact.silent_s + WATCHDOG_LATE_S),
        grace_s=record.spec.disconnect_grace_s,
    )


class Disconnects:
    """Acts on pods whose ``on_disconnect`` says so."""

    def __init__(self, parts: Parts, pauser: Pauser, stopper: Stopper) -> None:
        self._parts = parts
        self._pauser = pauser
        self._stopper = stopper
        self._acting: set[str] = set()
        """Pods that are being paused, resumed or stopped."""
        self._feeding: set[str] = set()
        """Pods whose guests are being told how long they may go on."""
        self._dogs: dict[str, float] = {}
        """When the guests of VMs end by themselves, by VM id and the contact's clock."""
        self._look_again = asyncio.Event()
        self._open = False

    def start(self) -> None:
        """Begin; to be called once, after the recovery: what has become due meanwhile is decided at once."""
        self._open = True
        self._parts.ledger.on_change.append(self._consider)
        self._parts.contact.on_heard.append(self._look_again.set)
        self.look()
        self._parts.tasks.spawn(self._run(), name="on-disconnect")

    def close(self) -> None:
        """Begin nothing any more. Idempotent."""
        self._open = False

    def look(self) -> float:
        """Decide about every pod, and set about what is to be done.

        Returns:
            Seconds after which to look again.
        """
        wait_s = LOOK_S
        for record in list(self._parts.ledger.records.values()) if self._open else ():
            if record.spec.on_disconnect.after_s is None or record.pod_id in self._acting:
                continue
            verdict = judge(record, silent_s=self._parts.contact.silent_s, lease_s=self._lease_s)
            if verdict.in_s is not None:
                wait_s = min(wait_s, verdict.in_s)
            if verdict.act is not None:
                self._spawn(self._acting, record, partial(self._act, record.pod_id, verdict.act))
            elif (live := self._hungry(record)) is not None:
                self._spawn(self._feeding, record, partial(self._feed, record, live))
        return wait_s

    @property
    def _lease_s(self) -> float:
        return self._parts.settings.nats.lease_s

    async def _run(self) -> None:
        while True:
            wait_s = self.look()
            await asyncio.to_thread(self._parts.contact.save)
            try:
                async with asyncio.timeout(wait_s):
                    await self._look_again.wait()
            except TimeoutError:
                continue
            self._look_again.clear()

    def _consider(self, pod_id: str) -> None:
        record = self._parts.ledger.find(pod_id)
        if record is not None and record.spec.on_disconnect.after_s is not None:
            self._look_again.set()

    def _spawn(self, busy: set[str], record: PodRecord, work: Callable[[], Awaitable[bool]]) -> None:
        """Do *work* beside, with the pod in *busy*; where it went well there may be more to do."""

        async def do() -> None:
            try:
                again = await work()
            finally:
                busy.discard(record.pod_id)
            if again:
                self._look_again.set()

        busy.add(record.pod_id)
        with logs.own_work(pod_id=record.pod_id):
            self._parts.tasks.spawn(do(), name=f"on-disconnect {record.pod_id}")

    async def _act(self, pod_id: str, act: Act) -> bool:
        try:
            if act == "stop":
                await self._stop(pod_id)
            else:
                await self._pause_or_resume(pod_id, act)
        except VcnodeError as exc:
            log.warning("Pod %s: on_disconnect could not %s it yet", pod_id, act, exc_info=exc)
            return False
        return True

    async def _stop(self, pod_id: str) -> None:
        """Stop a pod whose time is over, whatever holds it; it does not matter if NATS is back meanwhile."""

        def interrupted() -> VcnodeError:
            return AbortedError(f"Pod {pod_id} is stopped: its node has had no NATS for too long.")

        async with self._parts.locks.seize(pod_id, "pod.stop", interrupted, waits_for=ENDS_ITSELF):
            record = self._parts.ledger.find(pod_id)
            if record is None:
                return
            await self._stopper.stop(
                pod_id,
                Call("", "pod.stop"),
                grace_s=record.spec.disconnect_grace_s,
                reason=self._reason(record),
            )

    async def _pause_or_resume(self, pod_id: str, act: Act) -> None:
        async with self._parts.locks.hold(pod_id, f"pod.{act}", patient=True):
            record = self._parts.ledger.find(pod_id)
            if record is None:
                return
            silent_s = self._parts.contact.silent_s
            if judge(record, silent_s=silent_s, lease_s=self._lease_s).act != act:
                return  # NATS came or went while another command held the pod
            if act == "pause":
                why = self._reason(record)
                await self._pauser.pause(pod_id, Call("", "pod.pause"), until_connected=why)
            else:
                await self._pauser.resume(pod_id, Call("", "pod.resume"))

    def _reason(self, record: PodRecord) -> str:
        seconds = limit_s(record, lease_s=self._lease_s)
        return f"Its node had no NATS for {seconds:g} s (on_disconnect)."

    def _hungry(self, record: PodRecord) -> LivePod | None:
        """The pod's VM, if its watchdog is to hear that the pod may go on for longer."""
        live = self._parts.live.get(record.pod_id)
        if live is None or live.session is None or live.paused or live.ending:
            return None
        if record.pod_id in self._feeding:
            return None
        wanted = watchdog_of(record, self._parts.contact, lease_s=self._lease_s)
        known = self._dogs.get(live.vm.record.vm_id)
        if wanted is None or record.state is not PodState.RUNNING:
            return None
        if known is not None:
            left_s = known - self._parts.contact.clock()
            # Now and then is enough, but in time; and not to say what it knows.
            if left_s >= wanted.after_s or left_s > 0.75 * (record.spec.on_disconnect.after_s or 0.0):
                return None
        return live

    async def _feed(self, record: PodRecord, live: LivePod) -> bool:
        watchdog = watchdog_of(record, self._parts.contact, lease_s=self._lease_s)
        session = live.session
        if watchdog is None or session is None:
            return False
        ends_at = self._parts.contact.clock() + watchdog.after_s
        try:
            await session.set_watchdog(watchdog, timeout_s=REQUEST_LIMIT_S)
        except VcnodeError as exc:  # the session is watched by others; the next look tries again
            log.info("Pod %s: its watchdog was not told", record.pod_id, exc_info=exc)
            return False
        lives = {other.vm.record.vm_id for other in self._parts.live.values()}
        self._dogs = {vm_id: at for vm_id, at in self._dogs.items() if vm_id in lives}
        self._dogs[live.vm.record.vm_id] = ends_at
        return False
