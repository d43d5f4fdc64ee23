"""The driver for guests without an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.unit.drivers.agent.guests import LIMIT_S, FakeVm
from vcnode.drivers.agent.noop import NoopAgent
from vcnode.drivers.base import GuestSession
from vcnode.errors import AgentError, UnsupportedError
from vcnode.models.vm import ContainerRoot, GuestConfig, GuestContainer, GuestProcess

PROCESS = GuestProcess(args=("true",))
CONTAINER = GuestContainer(
    container_id="c", root=ContainerRoot(shared_name="x"), hostname="h", process=PROCESS
)
CONFIG = GuestConfig(hostname="h", time_ns=0, entropy=b"", machine_id="")

Call = Callable[[GuestSession], Coroutine[Any, Any, object]]
ACCEPTED: dict[str, Call] = {
    "configure": lambda s: s.configure(CONFIG, timeout_s=LIMIT_S),
    "delete_container": lambda s: s.delete_container("c", timeout_s=LIMIT_S),
    "list_containers": lambda s: s.list_containers(timeout_s=LIMIT_S),
    "ping": lambda s: s.ping(timeout_s=LIMIT_S),
    "shutdown": lambda s: s.shutdown(timeout_s=LIMIT_S),
}
REFUSED: dict[str, Call] = {
    "create_container": lambda s: s.create_container(CONTAINER, timeout_s=LIMIT_S),
    "start_container": lambda s: s.start_container("c", timeout_s=LIMIT_S),
    "signal_container": lambda s: s.signal_container("c", 9, everyone=False, timeout_s=LIMIT_S),
    "execute": lambda s: s.execute(PROCESS, container_id=None, timeout_s=LIMIT_S),
}


@pytest.fixture
async def session() -> GuestSession:
    return await NoopAgent().connect(FakeVm(Path("/nowhere")).as_vm, timeout_s=LIMIT_S)


def test_it_declares_no_capability() -> None:
    assert NoopAgent().info.capabilities == ()


@pytest.mark.parametrize("call", ACCEPTED.values(), ids=ACCEPTED.keys())
async def test_what_asks_for_nothing_succeeds(session: GuestSession, call: Call) -> None:
    assert not await call(session)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
async def test_what_needs_an_agent_is_unsupported(session: GuestSession, call: Call) -> None:
    with pytest.raises(UnsupportedError, match="native"):
        await call(session)


@pytest.mark.parametrize("call", [*ACCEPTED.values(), *REFUSED.values()], ids=[*ACCEPTED, *REFUSED])
async def test_closed_session_refuses_everything(session: GuestSession, call: Call) -> None:
    await session.close()
    with pytest.raises(AgentError):
        await call(session)


async def test_events_end_with_close_and_hold_nothing(session: GuestSession) -> None:
    reading = asyncio.ensure_future(_all(session))
    await asyncio.sleep(0)
    assert not reading.done()
    await session.close()
    assert await asyncio.wait_for(reading, LIMIT_S) == []


async def _all(session: GuestSession) -> list[object]:
    return [event async for event in session.events()]
