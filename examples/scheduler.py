"""A scheduler in one file: keeps the replica sets of a TOML file running on a fleet of vcnode nodes.

    python examples/scheduler.py fleet.toml --nats-url nats://127.0.0.1:4222

    # fleet.toml
    [web]
    count = 3
    fence_s = 0                    # above 0: never two of a copy; by then a lost node has stopped it
    require = { zone = "a" }       # labels that the node must carry
    [web.pod.resources]
    mem_size_mib = 256
    [[web.pod.containers]]
    id = "main"
    image = "busybox"
    cmd = { args = ["sleep", "86400"] }

The file is read again on SIGHUP. A set that is gone from it is removed. When the scheduler ends, the pods go
on; the next one takes them over. Only the SDK is used: `vcnode.client` and `vcnode.models`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from vcnode.client import Client, Fleet
from vcnode.errors import VcnodeError
from vcnode.models.fleet import Constraints
from vcnode.models.pod import PodSpec


@dataclass(frozen=True)
class ReplicaSet:
    """What the file says of one set."""

    count: int
    spec: PodSpec
    constraints: Constraints
    fence_s: float | None

    @classmethod
    def parse(cls, entry: dict[str, object]) -> ReplicaSet:
        """Read one table of the file. Raises ValueError with the field that is wrong."""
        unknown = entry.keys() - {"count", "fence_s", "require", "avoid", "pod"}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        return cls(
            count=int(entry.get("count", 1)),  # type: ignore[call-overload]
            spec=PodSpec.model_validate(entry.get("pod", {}), strict=False),
            constraints=Constraints.model_validate(
                {"labels": entry.get("require", {}), "anti_affinity": entry.get("avoid", {})}
            ),
            fence_s=float(entry.get("fence_s", 0)) or None,  # type: ignore[arg-type]
        )


def load(path: Path) -> dict[str, ReplicaSet]:
    """All sets of the file, by name.

    Raises:
        OSError, ValueError: It cannot be read, or something in it is wrong.
    """
    return {name: ReplicaSet.parse(entry) for name, entry in tomllib.loads(path.read_text()).items()}


class Scheduler:
    """Runs one keeper for each set, and says what happens."""

    def __init__(self, fleet: Fleet, path: Path) -> None:
        self._fleet = fleet
        self._path = path
        self._wanted: dict[str, ReplicaSet] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self.reload_asked = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report())
            self.reload_asked.set()
            while True:
                await self.reload_asked.wait()
                self.reload_asked.clear()
                try:
                    wanted = load(self._path)
                except (OSError, ValueError) as exc:
                    print(f"{self._path} is left as it was: {exc}", file=sys.stderr, flush=True)
                    continue
                self._apply(wanted, tasks)

    def _apply(self, wanted: dict[str, ReplicaSet], tasks: asyncio.TaskGroup) -> None:
        for name in self._wanted.keys() | wanted.keys():
            before, after = self._wanted.get(name), wanted.get(name)
            if before == after:
                continue
            if name in self._keepers:
                self._keepers.pop(name).cancel()
            # A set that is gone is kept with no copies: that removes them.
            target = after or ReplicaSet(0, PodSpec(), Constraints(), None)
            print(f"{name}: {target.count} wanted", flush=True)
            self._keepers[name] = tasks.create_task(self._keep(name, target))
        self._wanted = wanted

    async def _keep(self, name: str, target: ReplicaSet) -> None:
        try:
            await self._fleet.run_replicas(
                name, target.spec, target.count, target.constraints, fence_s=target.fence_s
            )
        except VcnodeError as exc:
            print(f"{name}: {exc.message}", file=sys.stderr, flush=True)

    async def _report(self) -> None:
        async for change in self._fleet.watch():
            if change.kind == "pod.changed" and change.pod is not None:
                reason = f" ({change.pod.reason})" if change.pod.reason else ""
                print(f"{change.node}/{change.pod_id}: {change.pod.state}{reason}", flush=True)
            elif change.kind == "pod.gone":
                print(f"{change.node}/{change.pod_id}: gone", flush=True)
            elif change.kind != "node.changed":
                print(f"{change.node}: {change.kind.removeprefix('node.')}", flush=True)


async def main() -> int:
    """Read the command line and run until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description="Keeps the replica sets of a TOML file running.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--nats-url", default="nats://127.0.0.1:4222")
    parser.add_argument("--prefix", default=None)
    options = parser.parse_args()
    try:
        load(options.file)
        async with (
            await Client.connect(options.nats_url, prefix=options.prefix) as client,
            Fleet(client) as fleet,
        ):
            scheduler = Scheduler(fleet, options.file)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, scheduler.reload_asked.set)
            running = asyncio.ensure_future(scheduler.run())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, running.cancel)
            try:
                await running
            except asyncio.CancelledError:
                return 0
    except (VcnodeError, OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
