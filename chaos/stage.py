"""Where it happens: a NATS server, a proxy, a node agent as a process of its own, and its VMs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import nats

from chaos.proxy import Proxy
from vcnode.bus.embedded import EmbeddedNats
from vcnode.cli.demo.busybox import make_root
from vcnode.client import Client
from vcnode.drivers.hypervisor.qemu.process import Named, named
from vcnode.errors import UnavailableError
from vcnode.models.subjects import Subjects
from vcnode.pods.marks import mark_of
from vcnode.settings import NatsSettings, Settings

NODE = "chaos"
READY_LIMIT_S = 60.0
READY_POLL_S = 0.1
STOP_LIMIT_S = 60.0


class Stage:
    """Everything that can be broken, and mended again."""

    def __init__(
        self,
        root: Path,
        nats: EmbeddedNats,
        proxy: Proxy,
        *,
        hypervisor: str,
        network: str,
        guest_dir: Path,
    ) -> None:
        self.root = root
        self.nats = nats
        self.proxy = proxy
        self.mark = mark_of(Settings(node_name=NODE, state_dir=root / "state"))
        self.starts = 0
        self.failed = True
        """Until it is known that all is well."""
        self._process: asyncio.subprocess.Process | None = None
        self._config = root / "node.toml"
        self._config.write_text(
            f'node_name = "{NODE}"\nhypervisor = "{hypervisor}"\nnetwork = "{network}"\n'
            f'metrics_address = ""\nlog_format = "text"\n'
            f'state_dir = "{root}/state"\nrun_dir = "{root}/run"\nguest_dir = "{guest_dir}"\n'
            f'allowed_roots = ["{root}/roots"]\nstop_grace_s = 1\naudit_interval_s = 5\n'
            f'[qemu]\naccel = "auto"\n[nats]\nurl = "nats://127.0.0.1:{proxy.port}"\nlease_s = 5\n'
        )

    # ---- the node agent ------------------------------------------------------------------------------

    @property
    def node_pid(self) -> int | None:
        """The node agent's process while it runs."""
        return None if self._process is None else self._process.pid

    async def start_node(self) -> None:
        """Start the node agent; returns at once."""
        self.starts += 1
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VCNODE_")}
        with (self.root / "node.log").open("ab") as log:
            log.write(f"---- start {self.starts}\n".encode())
            log.flush()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "vcnode.cli", "node", "run", "--config", str(self._config),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    async def end_node(self, number: signal.Signals) -> int | None:
        """Send the node agent a signal and wait for its end; its exit code, None if it did not run."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        async with asyncio.timeout(STOP_LIMIT_S):
            return await process.wait()

    def ended_by_itself(self) -> int | None:
        """The exit code of a node agent that nobody ended; None if it runs."""
        return None if self._process is None else self._process.returncode

    async def ready(self, client: Client) -> None:
        """Wait until the node answers.

        Raises:
            UnavailableError: It does not, or has ended.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_LIMIT_S):
                while True:
                    if (code := self.ended_by_itself()) is not None:
                        raise UnavailableError(f"The node agent ended by itself with code {code}.")
                    try:
                        await client.node(NODE).node_ping()
                        return
                    except UnavailableError:
                        await asyncio.sleep(READY_POLL_S)  # nobody listens yet, and nothing tells when
        raise UnavailableError("The node agent does not answer.")

    async def events_count(self) -> int:
        """How many events the stream has."""
        raw = await nats.connect(self.nats.url)
        try:
            return (await raw.jetstream().stream_info(Subjects().event_stream)).state.messages
        finally:
            await raw.close()

    # ---- what is on the host -------------------------------------------------------------------------

    def qemus(self) -> list[Named]:
        """The QEMUs of the node."""
        return named(self.mark)

    def left(self) -> list[str]:
        """What is on the host that should be gone once all pods are deleted."""
        vms = self.root / "run" / "vms"
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = Path("/sys/fs/cgroup").glob(f"**/vcnode/{self.mark}*")
        return [
            *(f"process {found.pid} of {found.vm_id}" for found in self.qemus()),
            *(f"directory {path}" for path in (vms.iterdir() if vms.exists() else ())),
            *(
                f"mount {line.split(' ')[4]}"
                for line in mounts
                if line.split(" ")[4].startswith(f"{self.root}/")
            ),
            *(f"cgroup {path}" for path in groups),
            *(f"namespace {path}" for path in Path("/run/netns").glob(f"{self.mark}*")),
        ]

    def rootfs(self, pod_id: str) -> Path:
        """The directory of the host that the pod's container has for a root."""
        return self.root / "roots" / pod_id

    def tokens(self) -> list[str]:
        """All that execs have written, in all pods."""
        found: list[str] = []
        for path in (self.root / "roots").glob("*/log"):
            found += path.read_text().split()
        return found

    def kill_everything(self) -> None:
        """Leave nothing behind, however the run ended."""
        for found in self.qemus():
            with contextlib.suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (point := line.split(" ")[4]).startswith(f"{self.root}/"):
                subprocess.run(["umount", "-l", point], check=False)
        for path in Path("/run/netns").glob(f"{self.mark}*"):
            subprocess.run(["ip", "netns", "delete", path.name], check=False)


@contextlib.asynccontextmanager
async def stage(
    *, hypervisor: str, network: str, guest_dir: Path, pods: int, keep: bool
) -> AsyncIterator[Stage]:
    """Set everything up; afterwards nothing is left but, with *keep* and after a failure, the directory."""
    # Short: sockets lie below it. On a disk: templates are files of the guest's size.
    root = Path(tempfile.mkdtemp(prefix="vcchaos-", dir="/var/tmp"))
    made: Stage | None = None
    try:
        async with EmbeddedNats(root / "nats") as nats, Proxy(nats.port) as proxy:
            (root / "roots").mkdir()
            made = Stage(root, nats, proxy, hypervisor=hypervisor, network=network, guest_dir=guest_dir)
            for number in range(pods):
                await asyncio.to_thread(make_root, made.rootfs(f"p{number}"))
            try:
                yield made
            finally:
                await made.end_node(signal.SIGKILL)
                made.kill_everything()
    finally:
        if keep and (made is None or made.failed):
            print(f"kept: {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)


async def connect(stage: Stage) -> Client:
    """A client that goes to the server itself, not through the proxy."""
    return await Client.connect(NatsSettings(url=stage.nats.url), name="chaos")
