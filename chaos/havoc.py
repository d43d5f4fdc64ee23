"""Breaks things at their time, and mends what nobody else would mend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Sequence

from chaos.plan import Act
from chaos.stage import NODE, Stage
from vcnode.client import Client
from vcnode.errors import VcnodeError
from vcnode.models.pod import PodState

AGENT_LIMIT_S = 5.0
KILL_AGENT = (
    "/bin/sh",
    "-c",
    "for d in /proc/[0-9]*; do grep -q vcnode $d/cmdline && kill -9 ${d#/proc/}; done",
)


class Havoc:
    """Carries out the acts of a plan.

    Args:
        stage: What is broken.
        client: For what must be done inside of guests.
    """

    def __init__(self, stage: Stage, client: Client) -> None:
        self.stage = stage
        self._client = client
        self.done: Counter[str] = Counter()
        self.surprises: list[str] = []
        """What broke without us."""

    async def run(self, acts: Sequence[Act]) -> None:
        """Break everything at its time; whatever was broken works again when this returns."""
        begun = asyncio.get_running_loop().time()
        for act in acts:
            await asyncio.sleep(max(0.0, begun + act.at_s - asyncio.get_running_loop().time()))
            if (code := self.stage.ended_by_itself()) is not None:
                self.surprises.append(
                    f"at {act.at_s:.1f} s the node agent had ended by itself with code {code}"
                )
                await self.stage.end_node(signal.SIGKILL)
                await self.stage.start_node()
            if await self._act(act):
                self.done[act.kind] += 1

    async def _act(self, act: Act) -> bool:
        match act.kind:
            case "kill node" | "stop node":
                await self._restart_node(act)
            case "freeze node":
                await _freeze(self.stage.node_pid, act.pause_s)
            case "kill QEMU" | "freeze QEMU":
                return await self._hit_qemu(act)
            case "kill guest agent":
                return await self._kill_agent(act)
            case "kill NATS":
                await self.stage.nats.kill()
                await asyncio.sleep(act.pause_s)
                await self.stage.nats.start()
            case "cut connections":
                return self.stage.proxy.cut() > 0
        return True

    async def _restart_node(self, act: Act) -> None:
        if act.kind == "kill node":
            await self.stage.end_node(signal.SIGKILL)
        else:
            code = await self.stage.end_node(signal.SIGTERM)
            if code not in (0, None, -signal.SIGTERM):  # the last: before it could handle the signal
                self.surprises.append(
                    f"at {act.at_s:.1f} s the node agent was stopped, and ended with code {code}"
                )
        await asyncio.sleep(act.pause_s)
        await self.stage.start_node()

    async def _hit_qemu(self, act: Act) -> bool:
        found = self.stage.qemus()
        if not found:
            return False
        chosen = found[act.pick % len(found)]
        if act.kind == "freeze QEMU":
            await _freeze(chosen.pid, act.pause_s)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chosen.pid, signal.SIGKILL)
        return True

    async def _kill_agent(self, act: Act) -> bool:
        node = self._client.node(NODE)
        try:
            pods = [p for p in (await node.pod_list()).pods if p.state is PodState.RUNNING]
            if not pods:
                return False
            chosen = pods[act.pick % len(pods)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGENT_LIMIT_S):
                    await node.pod_exec(chosen.pod_id, KILL_AGENT, timeout_s=AGENT_LIMIT_S)
        except VcnodeError:
            pass  # its session is gone, as it should be; or the node is
        return True


async def _freeze(pid: int | None, seconds: float) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
