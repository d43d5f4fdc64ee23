"""A session that asks its guest for nothing; sessions of agents that can do a little build on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NoReturn

from vcnode.drivers.base import (
    CopyDirection,
    GuestConnection,
    GuestEvent,
    LogFeed,
    LogPosition,
    RunningProcess,
)
from vcnode.errors import AgentError, UnsupportedError
from vcnode.models.living import ContainerProcess
from vcnode.models.pod import AgentType, ContainerResources
from vcnode.models.stats import ContainerStats, GuestStats
from vcnode.models.vm import (
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)


class RefusingSession:
    """A `GuestSession` that asks its guest for nothing.

    What asks for nothing in return succeeds (``configure``, ``ping``, ``shutdown``, deleting and listing
    containers, of which there are none); everything else is refused. It is never lost.
    """

    def __init__(self, agent: AgentType) -> None:
        self._agent = agent
        self._closed = asyncio.Event()

    @property
    def info(self) -> GuestInfo:
        """See `GuestSession.info`."""
        return GuestInfo(agent_version="none", boot_id="", kernel="")

    async def configure(self, config: GuestConfig, *, timeout_s: float) -> None:
        """Nothing is configured."""
        self._check()

    async def set_clock(self, time_ns: int, *, timeout_s: float) -> None:
        """Nobody is asked."""
        self._check()

    async def set_watchdog(self, watchdog: Watchdog, *, timeout_s: float) -> None:
        """Nobody in the guest would end it."""
        self._check()

    async def create_container(self, container: GuestContainer, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("containers")

    async def start_container(self, container_id: str, *, timeout_s: float) -> int:
        """Refused."""
        self._refuse("containers")

    async def signal_container(
        self, container_id: str, number: int, *, everyone: bool, timeout_s: float
    ) -> None:
        """Refused."""
        self._refuse("containers")

    async def pause_container(self, container_id: str, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("containers")

    async def resume_container(self, container_id: str, *, timeout_s: float) -> None:
        """Refused."""
        self._refuse("containers")

    async def update_container(
        self, container_id: str, resources: ContainerResources, *, timeout_s: float
    ) -> None:
        """Refused."""
        self._refuse("containers")

    async def available_memory(self, *, timeout_s: float) -> int:
        """Refused."""
        self._refuse("word of its memory")

    async def list_processes(
        self, container_id: str, *, limit: int, timeout_s: float
    ) -> tuple[Sequence[ContainerProcess], int]:
        """Refused."""
        self._refuse("containers")

    async def read_stats(self, *, timeout_s: float) -> tuple[GuestStats, Sequence[ContainerStats]]:
        """Refused."""
        self._refuse("statistics")

    async def delete_container(self, container_id: str, *, timeout_s: float) -> None:
        """There is none, so it is gone."""
        self._check()

    async def list_containers(self, *, timeout_s: float) -> Sequence[GuestContainerState]:
        """There are none."""
        self._check()
        return ()

    async def follow_logs(self, known: Mapping[str, LogPosition], *, timeout_s: float) -> LogFeed:
        """Refused."""
        self._refuse("containers")

    async def execute(
        self,
        process: GuestProcess,
        *,
        container_id: str | None,
        tty: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> RunningProcess:
        """Refused."""
        self._refuse("commands")

    async def copy(
        self, direction: CopyDirection, *, container_id: str, path: str, max_bytes: int, timeout_s: float
    ) -> RunningProcess:
        """Refused."""
        self._refuse("copies")

    async def attach(self, container_id: str, *, tty: bool, timeout_s: float) -> RunningProcess:
        """Refused."""
        self._refuse("containers")

    async def connect_port(self, port: int, *, timeout_s: float) -> GuestConnection:
        """Refused."""
        self._refuse("connections")

    async def ping(self, *, timeout_s: float) -> None:
        """Nobody is asked."""
        self._check()

    async def shutdown(self, *, timeout_s: float) -> None:
        """Nobody is asked; the hypervisor ends the VM."""
        self._check()

    async def events(self) -> AsyncIterator[GuestEvent]:
        """Nothing happens until ``close``."""
        await self._closed.wait()
        nothing: tuple[GuestEvent, ...] = ()
        for event in nothing:
            yield event

    async def close(self) -> None:
        """See `GuestSession.close`."""
        self._closed.set()

    def _check(self) -> None:
        if self._closed.is_set():
            raise AgentError("The session is closed.")

    def _refuse(self, what: str) -> NoReturn:
        self._check()
        raise UnsupportedError(
            f"The agent type {self._agent} has no {what} in guests like this; use the agent type native."
        )
