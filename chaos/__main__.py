"""``python -m chaos``: a run, its progress, and its verdict."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nats
from rich.console import Console
from rich.table import Table

from chaos import plan
from chaos.havoc import Havoc
from chaos.ledger import Ledger
from chaos.scheduler import CONTAINER, Scheduler
from chaos.stage import NODE, Stage, connect, stage
from vcnode.client import Client
from vcnode.client.node import NodeClient
from vcnode.errors import VcnodeError
from vcnode.models.pod import ContainerState, PodState, PodStatus
from vcnode.models.subjects import Subjects

SETTLE_LIMIT_S = 60.0
"""Seconds after the havoc within which something must happen, until every command has its outcome."""
PROGRESS_S = 5.0
CLONE_NEWNET = 0x40000000
"""Linux sched.h."""
EXEC_LIMIT_S = 20.0


async def main(options: argparse.Namespace) -> int:
    """Run, judge, report; 0 when all is well."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    planned = plan.make(options.seed, options.seconds, options.pods)
    console.print(
        f"seed {options.seed}: {len(planned.sends)} commands and {len(planned.acts)} acts of havoc"
        f" in {options.seconds:g} s on {options.pods} pods"
    )
    ledger = Ledger()
    async with stage(
        hypervisor=options.hypervisor,
        network=options.network,
        guest_dir=options.guest_dir,
        pods=options.pods,
        keep=options.keep,
    ) as here:
        await here.start_node()
        async with await connect(here) as client:
            await here.ready(client)
            scheduler = Scheduler(here, ledger, seed=options.seed)
            havoc = Havoc(here, client)
            problems = await _run(planned, scheduler, havoc, console)
            problems += await _settle(here, client)
            problems += await _delete_all(here, client)
            events = await _events(here)
            problems += await _last_look(here, events)
            problems += havoc.surprises
        problems += ledger.judge(events, here.tokens())
        _report(console, ledger, scheduler, havoc, here, len(events), problems)
        here.failed = bool(problems)
    return int(here.failed)


async def _run(planned: plan.Plan, scheduler: Scheduler, havoc: Havoc, console: Console) -> list[str]:
    async def progress() -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            acts = ", ".join(f"{count} x {kind}" for kind, count in sorted(havoc.done.items()))
            console.print(
                f"  {scheduler.sent} commands sent, {scheduler.resent} again; {acts or 'no havoc yet'}"
            )

    here = havoc.stage
    telling = asyncio.create_task(progress())
    sending = asyncio.create_task(scheduler.run(planned.sends))
    try:
        await havoc.run(planned.acts)
        seen, quiet_s = -1, 0.0
        while not sending.done() and quiet_s < SETTLE_LIMIT_S:
            await asyncio.wait({sending}, timeout=PROGRESS_S)
            # On a busy host what waits in the queue may hold a pod for long; while that goes on, so do we.
            done = scheduler.answered + await here.events_count()
            seen, quiet_s = (done, 0.0) if done != seen else (seen, quiet_s + PROGRESS_S)
        if sending.done():
            await sending
            return []
        scheduler.give_up()
        await sending
        return [f"nothing has happened for {SETTLE_LIMIT_S:g} s, and there are commands without an outcome"]
    finally:
        telling.cancel()
        sending.cancel()
    return []


async def _settle(here: Stage, client: Client) -> list[str]:
    """Wait for the durable commands; then every pod is as it says, and nothing is nobody's."""
    problems = []
    await here.ready(client)
    raw = await nats.connect(here.nats.url)
    try:
        js = raw.jetstream()
        async with asyncio.timeout(SETTLE_LIMIT_S):
            while (await js.stream_info(Subjects().command_stream)).state.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    except TimeoutError:
        problems.append("durable commands are left in the queue")
    finally:
        await raw.close()
    node = client.node(NODE)
    audit = await node.node_audit()
    problems += [f"orphan: {h.kind} {h.name}" for h in audit.holdings if h.orphan]
    problems += [f"audit: {problem}" for problem in audit.problems]
    for pod in await _at_rest(node):
        if pod.state is PodState.PAUSED:  # what ended in it before the pause is heard of now
            with contextlib.suppress(VcnodeError):
                await node.pod_resume(pod.pod_id)
                await node.pod_exec(pod.pod_id, ["/bin/true"], timeout_s=EXEC_LIMIT_S)
    for pod in await _at_rest(node):
        if pod.state is PodState.RUNNING:
            if all(c.state is ContainerState.RUNNING for c in pod.containers):
                try:
                    result = await node.container_exec(
                        pod.pod_id, CONTAINER, ["/bin/true"], timeout_s=EXEC_LIMIT_S
                    )
                    if result.exit_code:
                        problems.append(f"pod {pod.pod_id} runs, and exec ends with {result.exit_code}")
                except VcnodeError as exc:
                    problems.append(f"pod {pod.pod_id} runs, and exec fails: {exc.message}")
        elif pod.state is PodState.FAILED:
            if not pod.reason:
                problems.append(f"pod {pod.pod_id} failed without a reason")
        elif pod.state not in (PodState.READY, PodState.STOPPED):
            problems.append(f"pod {pod.pod_id} is {pod.state} for good")
    return problems


async def _at_rest(node: NodeClient) -> Sequence[PodStatus]:
    """The pods, once the node has started again what it starts again by itself."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_LIMIT_S):
            while any(_moves(pod) for pod in (await node.pod_list()).pods):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    return (await node.pod_list()).pods


def _moves(pod: PodStatus) -> bool:
    if pod.state in (PodState.STARTING, PodState.STOPPING) or pod.restart_at is not None:
        return True
    return pod.state is PodState.RUNNING and any(c.restart_at is not None for c in pod.containers)


async def _delete_all(here: Stage, client: Client) -> list[str]:
    node = client.node(NODE)
    problems = []
    for pod in (await node.pod_list()).pods:
        try:
            await node.pod_delete(pod.pod_id, force=True)
        except VcnodeError as exc:
            problems.append(f"pod {pod.pod_id} ({pod.state}) cannot be deleted: {exc.message}")
    async with asyncio.timeout(SETTLE_LIMIT_S):
        code = await here.end_node(signal.SIGTERM)
    if code:
        problems.append(f"the node agent ended with code {code}")
    return problems + [f"left: {what}" for what in here.left()]


async def _events(here: Stage) -> list[dict[str, Any]]:
    """All that the stream has, in its order."""
    raw = await nats.connect(here.nats.url)
    try:
        js = raw.jetstream()
        sub = await js.subscribe(Subjects().every_event, ordered_consumer=True)
        count = (await js.stream_info(Subjects().event_stream)).state.messages
        return [json.loads((await sub.next_msg(timeout=10)).data) for _ in range(count)]
    finally:
        await raw.close()


async def _last_look(here: Stage, events: list[dict[str, Any]]) -> list[str]:
    problems = []
    if not events or events[-1]["type"] != "vcnode.node.stopping":
        problems.append("the last event is not that of the node's stop")
    raw = await nats.connect(here.nats.url)
    try:
        bucket = await raw.jetstream().key_value(Subjects().pod_bucket)
        with contextlib.suppress(nats.js.errors.NoKeysError):
            problems += [f"the bucket still has {key}" for key in await bucket.keys()]
    finally:
        await raw.close()
    return problems


def _report(
    console: Console,
    ledger: Ledger,
    scheduler: Scheduler,
    havoc: Havoc,
    here: Stage,
    events: int,
    problems: list[str],
) -> None:
    outcomes = ledger.outcomes()
    codes = sorted({code for _, code in outcomes}, key=lambda code: (code != "ok", code))
    table = Table(title="what became of the commands", title_justify="left")
    for heading in ("command", *codes):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for verb in sorted({verb for verb, _ in outcomes}):
        table.add_row(verb, *(str(outcomes[verb, code] or "") for code in codes))
    console.print(table)
    havoc_table = Table(title="what was broken", title_justify="left")
    for heading in ("act", "times"):
        havoc_table.add_column(heading)
    for kind, count in sorted(havoc.done.items()):
        havoc_table.add_row(kind, str(count))
    console.print(havoc_table)
    effects = len(here.tokens())
    console.print(
        f"{scheduler.sent} commands, {scheduler.resent} sent again, {scheduler.bids} bids, {events} events,"
        f" {effects} effects of"
        f" execs, {here.starts} starts of the node agent"
    )
    for problem in problems:
        console.print(f"[red]WRONG[/red] {problem}", markup=True)
    console.print(
        "nothing lost, nothing leaked, nothing done twice" if not problems else f"{len(problems)} wrong"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev/chaos",
        description="Kill a node and all that it works with at random while commands run; then compare what "
        "was asked with what happened.",
        epilog="Example: dev/chaos --seconds 600 --seed 7 --pods 4",
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long the havoc lasts (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="the plan: same seed, same plan (default 1)")
    parser.add_argument("--pods", type=int, default=3, help="how many pods there are at most (default 3)")
    parser.add_argument(
        "--network", choices=("bridge", "noop"), default="bridge", help="of pods; the host's is left alone"
    )
    parser.add_argument("--hypervisor", choices=("qemu", "mock"), default="qemu")
    parser.add_argument(
        "--guest-dir", type=Path, default=None, help="guest image (default: the installed one)"
    )
    parser.add_argument("--keep", action="store_true", help="keep logs and database of a run that went wrong")
    options = parser.parse_args()
    if options.guest_dir is None:
        from vcnode.guest import image

        options.guest_dir = Path(os.environ.get("VCNODE_GUEST_DIR", image.DEFAULT_DIR))
    return options


def _leave_the_host_alone() -> None:
    """Move to a network namespace of our own, with what all our children make there."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace can be made; use --network noop")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


async def _interruptible(options: argparse.Namespace) -> int:
    """Run; a signal ends the run, and everything that belongs to it."""
    running = asyncio.ensure_future(main(options))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    try:
        return await running
    except asyncio.CancelledError:
        return 130


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    given = _options()
    if given.network != "noop" and given.hypervisor != "mock":
        _leave_the_host_alone()
    sys.exit(asyncio.run(_interruptible(given)))
