"""Sends the commands of a plan, each until its outcome is known, as a careful scheduler would."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats

from chaos.ledger import Entry, Ledger, answer
from chaos.plan import VERBS, Copy, Send
from chaos.stage import NODE, Stage
from vcnode.models import wire
from vcnode.models.commands import COMMANDS
from vcnode.models.subjects import Subjects

TRY_LIMIT_S = 20.0
"""Longest wait for one reply; then the same command is sent again."""
BID_LIMIT_S = 0.5
PAUSE_S = 0.3
"""Before a command is sent again that nobody took, or that may succeed later."""
CONTAINER = "main"
MEM_MIB = 128


class Scheduler:
    """Commands to one node.

    Args:
        stage: Where the node is.
        ledger: Notes what was sent and answered.
        seed: Part of the ids.
    """

    def __init__(self, stage: Stage, ledger: Ledger, *, seed: int) -> None:
        self._stage = stage
        self._ledger = ledger
        self._seed = seed
        self._subjects = Subjects()
        self._patience = asyncio.Event()
        """Set: what has no final reply by now gets none."""
        self.sent = 0
        self.resent = 0
        self.answered = 0
        """Copies by request with a reply that stays."""
        self.bids = 0
        """Of the node, for pods to be run."""

    def give_up(self) -> None:
        """Wait for no more replies."""
        self._patience.set()

    async def run(self, sends: Sequence[Send]) -> None:
        """Send everything at its time; returns when every copy has its outcome, or was given up."""
        client = await nats.connect(
            self._stage.nats.url,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            error_cb=_ignore,
            pending_size=16 * 1024 * 1024,
        )
        begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as copies:
                for send in sends:
                    await asyncio.sleep(max(0.0, begun + send.at_s - asyncio.get_running_loop().time()))
                    command_id = f"chaos-{self._seed}-{send.number}"
                    entry = self._ledger.add(command_id, send.verb, send.pod_id, f"t{send.number}")
                    self.sent += 1
                    copies.create_task(self._send_all(client, entry, send.copies))
        finally:
            await client.close()

    async def _send_all(self, client: Nats, entry: Entry, copies: Sequence[Copy]) -> None:
        """Send all copies of one command, which say the same."""
        body = self._body(entry)
        if entry.verb == "pod.run" and (reservation := await self._reserve(client, body["pod"])):
            body["reservation"] = reservation
        raw = json.dumps(body).encode()
        async with asyncio.TaskGroup() as group:
            for number, copy in enumerate(copies):
                group.create_task(self._send(client, entry, copy, number, raw))

    async def _reserve(self, client: Nats, pod: dict[str, Any]) -> str | None:
        """Room that the node promises, if it bids in time; the run may come too late for it."""
        subject, body = self._subjects.rpc(NODE, "pod.bid"), {"pod": pod}
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            msg = await client.request(subject, json.dumps(body).encode(), timeout=BID_LIMIT_S)
            self.bids += 1
            reservation: str | None = json.loads(msg.data).get("reservation")
            return reservation
        return None

    def _body(self, entry: Entry) -> dict[str, Any]:
        match entry.verb:
            case "pod.run" | "pod.create":
                return {"pod": pod_spec(entry.pod_id, str(self._stage.rootfs(entry.pod_id)))}
            case "pod.start" | "pod.pause" | "pod.resume":
                return {"pod_id": entry.pod_id}
            case "pod.stop":
                return {"pod_id": entry.pod_id, "grace_s": 1}
            case "pod.delete":
                return {"pod_id": entry.pod_id, "force": True}
            case "container.kill":
                return {"pod_id": entry.pod_id, "container_id": CONTAINER, "signal": "SIGKILL"}
            case "container.exec":
                script = f"echo {entry.token} >> /log"
                return {
                    "pod_id": entry.pod_id,
                    "container_id": CONTAINER,
                    "cmd": {"args": ["/bin/sh", "-c", script]},
                    "timeout_s": 15,
                }
        raise ValueError(entry.verb)

    async def _send(self, client: Nats, entry: Entry, copy: Copy, number: int, body: bytes) -> None:
        await asyncio.sleep(copy.after_s)
        if copy.way == "rpc":
            await self._ask(client, entry, body)
        else:
            await self._enqueue(client, entry, number, body)

    async def _ask(self, client: Nats, entry: Entry, body: bytes) -> None:
        """Ask until there is a reply that stays."""
        headers = {wire.COMMAND_ID: entry.command_id}
        subject = self._subjects.rpc(NODE, entry.verb)
        while not self._patience.is_set():
            try:
                msg = await client.request(subject, body, timeout=TRY_LIMIT_S, headers=headers)
            except (nats.errors.Error, OSError, TimeoutError):
                self.resent += 1
                await self._pause()
                continue
            reply = json.loads(msg.data)
            if not (reply.get("retryable") and "message" in reply):
                entry.answers.append(answer(reply, msg.data))
                self.answered += 1
                return
            entry.put_off = reply["message"]
            await self._pause()
        entry.given_up += 1

    async def _enqueue(self, client: Nats, entry: Entry, number: int, body: bytes) -> None:
        """Publish until the stream has it; JetStream drops repetitions by the message id."""
        headers = {wire.COMMAND_ID: entry.command_id, "Nats-Msg-Id": f"{entry.command_id}-{number}"}
        subject = self._subjects.cmd(NODE, entry.verb)
        js = client.jetstream(timeout=TRY_LIMIT_S / 4)
        while True:
            try:
                await js.publish(subject, body, stream=self._subjects.command_stream, headers=headers)
            except (nats.errors.Error, OSError, TimeoutError):
                self.resent += 1
                await self._pause()
                continue
            entry.durable += 1
            return

    async def _pause(self) -> None:
        await asyncio.sleep(PAUSE_S)


def pod_spec(pod_id: str, rootfs: str) -> dict[str, Any]:
    """The pod of that id: always the same, so that running it again is no conflict.

    Every second pod and its container are started again by the node when they end.
    """
    again = "always" if int(pod_id[1:]) % 2 else "never"
    return {
        "id": pod_id,
        "restart_policy": again,
        "resources": {"mem_size_mib": MEM_MIB},
        "containers": [
            {
                "id": CONTAINER,
                "rootfs": rootfs,
                "restart_policy": again,
                "cmd": {"args": ["/bin/sleep", "100000"]},
                "stop_timeout_s": 1,
            }
        ],
    }


async def _ignore(exc: Exception) -> None:
    """Connections break here all the time."""


if unknown := VERBS.keys() - COMMANDS.keys():
    raise RuntimeError(f"There are no commands {unknown}.")
