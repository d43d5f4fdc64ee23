"""Pausing and resuming a pod: its vCPUs stop, its memory and the containers in it stay what they are.

A paused guest answers nothing. Whatever needs it is refused meanwhile, and nobody waits for its agent: not
the watcher of its session, nor a node agent that was restarted. What was half done is taken back, so that
record and VM agree: here on failure, and in `recovery` after a restart.
"""

from __future__ import annotations

import logging

from vcnode import aio
from vcnode.errors import AgentError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.pods import edits
from vcnode.pods.lifecycle import PodStep, next_pod_state
from vcnode.pods.live import LivePod, require_live
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.watch import Watcher

log = logging.getLogger(__name__)

WAKE_LIMIT_S = 15.0
"""Seconds for the agent of a resumed guest to answer."""
UNDO_LIMIT_S = 2 * REQUEST_LIMIT_S + WAKE_LIMIT_S
"""Seconds for taking a pause or a resume back."""


class Pauser:
    """Pauses and resumes pods; the caller holds the pod's lock."""

    def __init__(self, parts: Parts, watcher: Watcher) -> None:
        self._parts = parts
        self._watcher = watcher

    async def pause(self, pod_id: str, call: Call, *, until_connected: str | None = None) -> PodRecord:
        """Stop the vCPUs of a running pod. Idempotent: a paused pod stays paused.

        Commands that run in it (``container.exec``) stand still, while their own time limits go on.

        Args:
            pod_id: The pod.
            call: The command.
            until_connected: Set: nobody has asked for it, this is why, and it is to run again once NATS is
                back.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: It does not run.
            AgentError: The session with its guest is being restored; nothing changed.
            HypervisorError: QEMU did not do it; the pod runs on.
        """
        record = self._parts.ledger.get(pod_id, call)
        if record.state is PodState.PAUSED:
            if until_connected is None:
                return await self._parts.ledger.change(pod_id, edits.stays_paused(), call)
            return record
        next_pod_state(pod_id, record.state, PodStep.PAUSE, call.verb)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        live.require_session()
        _require_settled(live)
        live.paused = True
        try:
            await live.vm.pause(timeout_s=REQUEST_LIMIT_S)
            edit = edits.paused(call.verb, reason=until_connected, resumes=until_connected is not None)
            return await self._parts.ledger.change(pod_id, edit, call)
        except BaseException:
            if self._state(pod_id) is PodState.RUNNING:
                await aio.finish(self._undo_pause(live), timeout_s=UNDO_LIMIT_S)
            raise

    async def resume(self, pod_id: str, call: Call) -> PodRecord:
        """Let the vCPUs of a paused pod run again, and set its clock. Idempotent: a running pod runs on.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: It is not paused.
            AgentError, DeadlineExceededError: Its agent does not answer; the pod is paused again.
            HypervisorError: QEMU did not do it; the pod is paused still.
        """
        record = self._parts.ledger.get(pod_id, call)
        if record.state is PodState.RUNNING:
            return record
        next_pod_state(pod_id, record.state, PodStep.RESUME, call.verb)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        _require_settled(live)
        try:
            await self._wake(live)
            return await self._parts.ledger.change(pod_id, edits.resumed(call.verb), call)
        except BaseException:
            if self._state(pod_id) is PodState.PAUSED:
                await aio.finish(self._undo_resume(live), timeout_s=UNDO_LIMIT_S)
            raise

    async def _wake(self, live: LivePod) -> None:
        """Let the vCPUs run; afterwards the guest has answered and knows the time."""
        await live.vm.resume(timeout_s=REQUEST_LIMIT_S)
        live.paused = False
        if live.session is None:  # it was lost meanwhile, or the node agent has restarted
            await self._watcher.join(live, timeout_s=WAKE_LIMIT_S, set_clock=True)
            self._watcher.follow(live)
        else:
            await self._watcher.set_clock(live, timeout_s=WAKE_LIMIT_S)

    async def _undo_pause(self, live: LivePod) -> None:
        try:
            await self._wake(live)
        except VcnodeError as exc:
            # If the VM has ended, its end says more; if its agent is silent, the loss of its session does.
            log.warning("Pod %s: a pause could not be taken back", live.pod_id, exc_info=exc)

    async def _undo_resume(self, live: LivePod) -> None:
        live.paused = True
        try:
            await live.vm.pause(timeout_s=REQUEST_LIMIT_S)
        except VcnodeError as exc:
            log.warning("Pod %s: a resume could not be taken back", live.pod_id, exc_info=exc)

    def _state(self, pod_id: str) -> PodState | None:
        record = self._parts.ledger.find(pod_id)
        return None if record is None else record.state


def _require_settled(live: LivePod) -> None:
    if live.restoring:
        raise AgentError(f"The session with the guest of pod {live.pod_id} is being restored; try again.")
