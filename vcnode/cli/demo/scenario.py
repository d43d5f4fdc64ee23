"""The play itself: what a central scheduler does with one pod, over NATS, and a look at what is left."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vcnode.aio import Tasks, deadline_as, finish
from vcnode.bus.embedded import EmbeddedNats
from vcnode.cli import views
from vcnode.cli.demo import traces
from vcnode.cli.demo.busybox import make_root
from vcnode.cli.demo.screen import Screen
from vcnode.cli.demo.stage import NODE, NodeProcess, Place, node_agent
from vcnode.cli.events import remark_on
from vcnode.client import Client, NodeClient
from vcnode.errors import AbortedError, AgentError, UnavailableError, VcnodeError
from vcnode.models.events import EventKind
from vcnode.models.node import NodeInfo
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodStatus, Resources
from vcnode.settings import NatsSettings

log = logging.getLogger(__name__)

POD = "hello"
CONTAINER = "main"
IMAGE = "busybox"
# Process 1 of a container ends at SIGTERM only if it handles it, as with any container.
SERVICE = "trap 'exit 0' TERM; sleep 3600 & wait"
SCRIPT = 'echo "Hello from $(hostname), Linux $(uname -r)"; echo "I am process $$ of user $(id -un)"; exit 7'
EXPECTED_EXIT_CODE = 7
READY_TIMEOUT_S = 60.0
READY_POLL_S = 0.05
RETRY_S = 0.2
EVENTS_TIMEOUT_S = 10.0
UNDO_TIMEOUT_S = 60.0
MAX_TEMP_PATH_BYTES = 40
METRICS_TIMEOUT_S = 5.0
METRICS_SHOWN = (
    "vcnode_commands_total",
    "vcnode_pods{",
    "vcnode_pod_start_phase_seconds_sum",
    "vcnode_events_published_total",
    "vcnode_nats_connected",
)


@dataclass(frozen=True, slots=True)
class Play:
    """What the caller chose."""

    hypervisor: str
    accel: str
    guest_dir: Path
    memory_mib: int


async def perform(play: Play, screen: Screen) -> bool:
    """Run the demo from an empty directory to an empty directory.

    Returns:
        Whether nothing of it is left on the host.

    Raises:
        VcnodeError: A step failed. All is cleaned up then, too, as it is after a cancellation.
    """
    place = Place(Path(tempfile.mkdtemp(prefix="vcdemo-", dir=short_temp_dir())))
    try:
        async with AsyncExitStack() as stack:
            client, agent = await _set_the_stage(stack, play, place, screen)
            async with _deleted_pod(client.node(NODE)):
                held = await _act(client, agent, play, screen, place)
            screen.title("What is left of the pod on the host")
            clean = _report(screen, traces.of_pod(place.root, held))
    except VcnodeError:
        if tail := place.log_tail():
            screen.title("The node agent's last words")
            screen.output("log", tail)
        raise
    finally:
        swept = sweep(place.root)
    screen.title("What is left on the host, node agent and NATS ended")
    gone = traces.Check("file", () if not place.root.exists() else (str(place.root),))
    return _report(screen, (*swept, gone)) and clean


def short_temp_dir() -> str:
    """The directory for temporary files, or /tmp if its path is too long for the sockets to come below it."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= MAX_TEMP_PATH_BYTES else "/tmp"  # noqa: S108


async def _set_the_stage(
    stack: AsyncExitStack, play: Play, place: Place, screen: Screen
) -> tuple[Client, NodeProcess]:
    screen.title("The stage")
    nats = EmbeddedNats(place.root / "nats")
    with screen.step("nats-server, private, with JetStream"):
        await stack.enter_async_context(nats)
    with screen.step(f"node agent '{NODE}' ({play.hypervisor})"):
        agent = await stack.enter_async_context(
            node_agent(
                place,
                nats_url=nats.url,
                hypervisor=play.hypervisor,
                accel=play.accel,
                guest_dir=play.guest_dir,
            )
        )
        client = await Client.connect(NatsSettings(url=nats.url))
        stack.push_async_callback(client.close)
        info = await _ready(client.node(NODE), agent)
    screen.note(f"NATS at {nats.url}, accelerator {info.accelerator or 'none (mock: no VM will run)'}", "dim")
    return client, agent


async def _ready(node: NodeClient, agent: NodeProcess) -> NodeInfo:
    """Wait until the node agent takes commands."""
    async with deadline_as(
        READY_TIMEOUT_S, lambda: UnavailableError(f"The node agent is not ready after {READY_TIMEOUT_S:g} s.")
    ):
        while True:
            agent.check()
            try:
                return await node.node_info(deadline_s=READY_TIMEOUT_S)
            except UnavailableError:
                # Nobody listens yet, and nothing would tell us when that changes.
                await asyncio.sleep(READY_POLL_S)


async def _act(client: Client, agent: NodeProcess, play: Play, screen: Screen, place: Place) -> traces.Held:
    """Everything that a scheduler does with one pod; returns what the pod had on the host."""
    node = client.node(NODE)
    deleted = asyncio.Event()
    async with client.events(node=NODE, since="all") as stream, Tasks() as tasks:

        async def show() -> None:
            async for event in stream:
                screen.event(event.kind, event.subject, remark_on(event))
                if event.kind == EventKind.POD_DELETED:
                    deleted.set()

        screen.title("A scheduler at work: commands (✔) over NATS, events (⇠) as they come")
        tasks.spawn(show(), name="demo-events")
        with screen.step(f"image.import {IMAGE}, from this host's busybox"):
            root = await asyncio.to_thread(make_root, place.roots / IMAGE)
            await node.image_import(IMAGE, str(root))
        pod = await _run_pod(node, play, screen)
        held = traces.Held.by(pod)
        await _exec(node, play, screen)
        await _show_metrics(agent, screen)
        screen.title("The end of the pod")
        with screen.step(f"pod.stop {POD}"):
            await node.pod_stop(POD)
        with screen.step(f"pod.delete {POD}"):
            await node.pod_delete(POD)
        late = UnavailableError("The last event did not arrive.")
        async with deadline_as(EVENTS_TIMEOUT_S, lambda: late):
            await deleted.wait()
    return held


async def _run_pod(node: NodeClient, play: Play, screen: Screen) -> PodStatus:
    container = ContainerSpec(id=CONTAINER, image=IMAGE, cmd=Cmd(args=("sh", "-c", SERVICE)))
    spec = PodSpec(id=POD, resources=Resources(mem_size_mib=play.memory_mib), containers=(container,))
    with screen.step(f"pod.run {POD}: 1 vCPU, {play.memory_mib} MiB, 1 container"):
        pod = await node.pod_run(spec)
    screen.note(f"the start took {views.phases(pod.phases_ms)}", "dim")
    return pod


async def _exec(node: NodeClient, play: Play, screen: Screen) -> None:
    screen.note(f"container.exec: sh -c '{SCRIPT}'", "dim")
    with screen.step(f"container.exec {POD}/{CONTAINER}"):
        result = await node.container_exec(POD, CONTAINER, ["sh", "-c", SCRIPT])
    screen.output("stdout", result.stdout.raw.decode(errors="replace"))
    screen.output("stderr", result.stderr.raw.decode(errors="replace"))
    screen.note(f"exit code {result.exit_code}")
    if play.hypervisor != "mock" and result.exit_code != EXPECTED_EXIT_CODE:
        raise AgentError(f"The command ended with {result.exit_code}; it says 'exit {EXPECTED_EXIT_CODE}'.")


async def _show_metrics(agent: NodeProcess, screen: Screen) -> None:
    def fetch() -> str:
        with urllib.request.urlopen(agent.metrics_url, timeout=METRICS_TIMEOUT_S) as reply:  # noqa: S310
            body: bytes = reply.read()
        return body.decode()

    screen.title(f"Some of the metrics at {agent.metrics_url}")
    try:
        text = await asyncio.to_thread(fetch)
    except OSError as exc:
        raise UnavailableError(f"The metrics cannot be read ({exc}).") from exc
    for line in text.splitlines():
        if line.startswith(METRICS_SHOWN) and not line.endswith(" 0.0"):
            screen.note(line)


@asynccontextmanager
async def _deleted_pod(node: NodeClient) -> AsyncIterator[None]:
    """Delete the pod when the block was left early: a node agent that ends leaves its pods running."""
    try:
        yield
    except BaseException:
        try:
            await finish(_delete(node), timeout_s=UNDO_TIMEOUT_S)
        except (VcnodeError, TimeoutError) as exc:
            log.warning("The pod could not be deleted", exc_info=exc)
        raise


async def _delete(node: NodeClient) -> None:
    while True:
        try:
            await node.pod_delete(POD, force=True, deadline_s=UNDO_TIMEOUT_S)
        except AbortedError:
            # The command that was interrupted here goes on there, and nothing tells us when it is done.
            await asyncio.sleep(RETRY_S)
        else:
            return


def _report(screen: Screen, checks: tuple[traces.Check, ...]) -> bool:
    for check in checks:
        screen.check(check.what, check.found)
    return not any(check.found for check in checks)


def sweep(root: Path) -> tuple[traces.Check, ...]:
    """Remove *root* after everything has ended; returns what should not have been there any more.

    Processes and mounts that are left are a bug of the node agent and reported as such; they are removed all
    the same.
    """
    found = traces.of_demo(root)
    for line in traces.processes(str(root)):
        with suppress(ProcessLookupError):
            os.kill(int(line.split(" ")[0]), signal.SIGKILL)
    for point in traces.mounts(root):
        subprocess.run(["umount", "-l", point], check=False, timeout=UNDO_TIMEOUT_S)
    # What is mounted may be somebody's files: never delete through a mount.
    if not traces.mounts(root):
        shutil.rmtree(root)
    return found
