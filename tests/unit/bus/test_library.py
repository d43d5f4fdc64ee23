"""What is mended of nats-py, without a server."""

from __future__ import annotations

import asyncio
import contextlib

import nats.errors
import pytest

from vcnode.bus.library import SturdyClient, uncancelled


async def test_a_client_that_never_connected_can_be_closed() -> None:
    await SturdyClient(require_tls=False).close()


async def cancelled_while(work: object) -> asyncio.Task[None]:
    """A task that awaits `uncancelled(work)` and is cancelled meanwhile."""

    async def run() -> None:
        await uncancelled(work)  # type: ignore[arg-type]

    task = asyncio.ensure_future(run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return task


async def swallow() -> int:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return 1


async def replace() -> int:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as exc:
        raise nats.errors.TimeoutError from exc
    return 1


@pytest.mark.parametrize("work", [swallow, replace])
async def test_a_cancellation_comes_out_whatever_the_library_makes_of_it(work: object) -> None:
    assert (await cancelled_while(work())).cancelled()  # type: ignore[operator]


async def test_results_and_errors_pass() -> None:
    async def give() -> int:
        return 3

    async def fail() -> int:
        raise nats.errors.TimeoutError

    assert await uncancelled(give()) == 3
    with pytest.raises(nats.errors.TimeoutError):
        await uncancelled(fail())


async def test_a_time_limit_still_ends_a_call_that_swallows_its_cancellation() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await uncancelled(swallow())
