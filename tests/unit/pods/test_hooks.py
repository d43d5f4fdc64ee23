"""Hooks: what they are told, what their failures do, and that none outlives its time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import sys
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.drivers.storage.local import LocalStorage
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from vcnode.models.hooks import Hook, Hooks
from vcnode.models.pod import PodState
from vcnode.pods.hooks import HookFailedError, run, state_of


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    path = tmp_path / "hooks"
    path.mkdir()
    return path


@pytest.fixture
def storage(tmp_path: Path, hooks: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "state", tmp_path / "run", [tmp_path / "roots"], hook_dirs=[hooks])


def script(path: Path, text: str, *, mode: int = 0o755) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return str(path)


async def test_a_hook_gets_arguments_environment_and_the_state(
    storage: LocalStorage, hooks: Path, tmp_path: Path, world: World
) -> None:
    await world.pods.run(pod(annotations={"team": "blue"}), world.call())
    record = world.store.pods["p1"]
    hook = Hook(
        path=script(
            hooks / "tell",
            f'cat > {tmp_path}/state; echo "$1 $HOOK_A" > {tmp_path}/rest; pwd >> {tmp_path}/rest',
        ),
        args=("first",),
        env=("HOOK_A=b c",),
    )
    await run(storage, hook, state_of(record, "running"))
    state = json.loads((tmp_path / "state").read_text())
    assert state["id"] == "p1"
    assert state["status"] == "running"
    assert state["ociVersion"]
    assert state["annotations"]["team"] == "blue"
    assert (tmp_path / "rest").read_text() == "first b c\n/\n"


async def test_a_hook_that_fails_says_why(storage: LocalStorage, hooks: Path) -> None:
    hook = Hook(path=script(hooks / "fails", "echo no such thing >&2; exit 3"))
    with pytest.raises(HookFailedError, match="code 3: no such thing") as caught:
        await run(storage, hook, b"{}")
    assert caught.value.details["exit_code"] == 3


async def test_a_hook_has_ended_when_its_program_has(
    storage: LocalStorage, hooks: Path, tmp_path: Path
) -> None:
    """What it leaves behind with its output open is ended, and holds nobody up."""
    text = f"sleep 1000 & echo $! > {tmp_path}/child; echo done"
    await run(storage, Hook(path=script(hooks / "forks", text), timeout_s=20), b"{}")
    with contextlib.suppress(ProcessLookupError):  # init has reaped it
        pidfd = os.pidfd_open(int((tmp_path / "child").read_text()))
        try:
            assert select.select([pidfd], [], [], 10)[0], "it goes on"
        finally:
            os.close(pidfd)


async def test_a_hook_and_its_children_end_with_its_time(
    storage: LocalStorage, hooks: Path, tmp_path: Path
) -> None:
    text = f"sleep 1000 & echo $! > {tmp_path}/pid; wait"
    hook = Hook(path=script(hooks / "hangs", text), timeout_s=0.5)
    with pytest.raises(HookFailedError, match=r"within 0.5 s"):
        await run(storage, hook, b"{}")
    try:
        pidfd = os.pidfd_open(int((tmp_path / "pid").read_text()))
    except ProcessLookupError:
        return
    with open(pidfd, "rb", buffering=0):
        assert await asyncio.to_thread(select.select, [pidfd], [], [], 5) == ([pidfd], [], [])


async def test_only_what_the_settings_allow_is_run(
    storage: LocalStorage, hooks: Path, tmp_path: Path
) -> None:
    outside = script(tmp_path / "outside", "true")
    (hooks / "link").symlink_to(outside)
    for path in (outside, str(hooks / "link"), f"{hooks}/../outside"):
        with pytest.raises(InvalidArgumentError):
            await storage.open_hook(path)
    for name, mode in (("plain", 0o644), ("loose", 0o757)):
        with pytest.raises(InvalidArgumentError):
            await storage.open_hook(script(hooks / name, "true", mode=mode))
    with pytest.raises(NotFoundError):
        await storage.open_hook(str(hooks / "missing"))
    os.close(await storage.open_hook(script(hooks / "good", "true")))
    with pytest.raises(InvalidArgumentError, match="none is configured"):
        await LocalStorage(tmp_path / "s", tmp_path / "r", [tmp_path]).open_hook(outside)


async def test_a_failed_hook_undoes_the_start_and_later_ones_run(world: World) -> None:
    wanted = Hooks(
        pre_start=(Hook(path="/hooks/ok"), Hook(path="/hooks/fail")),
        post_stop=(Hook(path="/hooks/fail"), Hook(path="/hooks/last")),
    )
    await world.pods.create(pod(hooks=wanted), world.call())
    world.plan.log.clear()
    with pytest.raises(FailedPreconditionError, match="/hooks/fail"):
        await world.pods.start("p1", world.call())
    status = world.pods.status("p1")
    assert status.state is PodState.FAILED
    assert "/hooks/fail" in (status.reason or "")
    assert status.leftovers == ()
    assert world.host.empty
    assert not world.vms.alive
    assert world.plan.log.count("storage.open_hook") == 4
    assert "hypervisor.launch" not in world.plan.log


async def test_hooks_run_around_the_life_of_a_pod(world: World) -> None:
    every = Hooks(
        pre_start=(Hook(path="/hooks/a"),),
        post_start=(Hook(path="/hooks/b"),),
        post_stop=(Hook(path="/hooks/c"),),
    )
    await world.pods.run(pod(hooks=every), world.call())
    await world.pods.stop("p1", 0, world.call())
    log = [
        what
        for what in world.plan.log
        if what in ("storage.open_hook", "hypervisor.launch", "storage.remove_vm_dir")
    ]
    opened = [n for n, what in enumerate(log) if what == "storage.open_hook"]
    # Three checks; before the launch; after the start, and after all is freed.
    assert len(opened) == 6
    assert log.index("hypervisor.launch") == 4
    assert log[-1] == "storage.open_hook"


def test_hooks_of_one_point_are_bounded_together() -> None:
    with pytest.raises(ValueError, match="together"):
        Hooks(post_stop=tuple(Hook(path="/hooks/a", timeout_s=10) for _ in range(3)))


async def test_a_hook_ends_with_the_node_agent(hooks: Path, tmp_path: Path) -> None:
    """A process that runs one is killed in the midst of it."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    hook = script(hooks / "hangs", f"echo $$ > {fifo}; exec sleep 1000")
    program = f"""
import asyncio
from pathlib import Path
from vcnode.drivers.storage.local import LocalStorage
from vcnode.models.hooks import Hook
from vcnode.pods.hooks import run
storage = LocalStorage(Path("s"), Path("r"), [], hook_dirs=[Path({str(hooks)!r})])
asyncio.run(run(storage, Hook(path={hook!r}, timeout_s=20), b"{{}}"))
"""
    node = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=tmp_path)
    try:
        async with asyncio.timeout(20):
            pidfd = os.pidfd_open(int(await asyncio.to_thread(fifo.read_text)))
    finally:
        node.kill()
        await node.wait()
    with open(pidfd, "rb", buffering=0):
        assert await asyncio.to_thread(select.select, [pidfd], [], [], 10) == ([pidfd], [], [])
