"""What the benchmarks run on: a private NATS server, and a node agent as a process, driven by the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.options import Options
from vcnode.bus.embedded import EmbeddedNats
from vcnode.cli.demo.busybox import make_root
from vcnode.client import Client, NodeClient
from vcnode.errors import UnavailableError
from vcnode.settings import NatsSettings

NODE = "bench"
IMAGE = "busybox"
READY_TIMEOUT_S = 120.0
READY_POLL_S = 0.05
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A node that takes commands."""

    root: Path
    nats: EmbeddedNats
    node: NodeClient
    client: Client
    pid: int
    """Process of the node agent."""

    def log_tail(self) -> str:
        """The node agent's last words."""
        return "\n".join((self.root / "node.log").read_text(errors="replace").splitlines()[-25:])


@contextlib.asynccontextmanager
async def stage(
    options: Options,
    *,
    hypervisor: str = "qemu",
    settings: str = "",
    wrapper: Sequence[str] = (),
) -> AsyncIterator[Stage]:
    """NATS and a node named ``bench`` with the image ``busybox``, for as long as the block runs.

    Args:
        options: Guest image and accelerator.
        hypervisor: ``qemu`` or ``mock``.
        settings: More lines of the node's settings file (TOML).
        wrapper: Put before the Python that runs the node, such as a profiler.
    """
    # Short: sockets lie below it. On a disk: templates are files of the guest's size.
    root = Path(tempfile.mkdtemp(prefix="vcbench-", dir="/var/tmp"))
    try:
        async with contextlib.AsyncExitStack() as stack:
            nats = await stack.enter_async_context(EmbeddedNats(root / "nats"))
            process = await stack.enter_async_context(
                _node_process(root, nats.url, hypervisor, options, settings, wrapper)
            )
            client = await Client.connect(NatsSettings(url=nats.url))
            stack.push_async_callback(client.close)
            node = client.node(NODE)
            await _ready(node, process, root)
            await node.image_import(IMAGE, str(await asyncio.to_thread(make_root, root / "roots" / IMAGE)))
            held = Stage(root, nats, node, client, process.pid)
            try:
                yield held
            except BaseException:
                print(held.log_tail(), file=sys.stderr)
                raise
            finally:
                await _delete_all(node)
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def _delete_all(node: NodeClient) -> None:
    """Pods outlive the node agent, so none may be left."""
    for pod in (await node.pod_list()).pods:
        await node.pod_delete(pod.pod_id, force=True)


@contextlib.asynccontextmanager
async def _node_process(
    root: Path, url: str, hypervisor: str, options: Options, settings: str, wrapper: Sequence[str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    (root / "roots").mkdir()
    config = root / "node.toml"
    config.write_text(
        f'node_name = "{NODE}"\nhypervisor = "{hypervisor}"\nmetrics_address = ""\nlog_format = "text"\n'
        f'state_dir = "{root}/state"\nrun_dir = "{root}/run"\nguest_dir = "{options.guest_dir}"\n'
        f'allowed_roots = ["{root}/roots"]\nstop_grace_s = 0\nnetwork = "noop"\n{settings}\n'
        f"[capacity]\ncpu_overcommit = 1000\n"  # crowds that do nothing are part of what is measured
        f'[qemu]\naccel = "{options.accel}"\n[nats]\nurl = "{url}"\n'
    )
    argv = (*wrapper, "-m", "vcnode.cli", "node", "run", "--config", str(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VCNODE_")}
    with (root / "node.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the node in good order
        )
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is None:
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
                return


async def _ready(node: NodeClient, process: asyncio.subprocess.Process, root: Path) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            if process.returncode is not None:
                raise UnavailableError(f"The node agent ended: {(root / 'node.log').read_text()[-2000:]}")
            try:
                await node.node_info()
                return
            except UnavailableError:
                await asyncio.sleep(READY_POLL_S)  # nobody listens yet, and nothing tells when that changes
