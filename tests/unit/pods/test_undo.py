"""Undo stacks."""

from __future__ import annotations

import asyncio

import pytest

from vcnode.errors import StorageError
from vcnode.pods.undo import UndoStack


def step(log: list[str], name: str, error: Exception | None = None):
    async def undo() -> None:
        await asyncio.sleep(0)
        log.append(name)
        if error is not None:
            raise error

    return undo


async def test_undos_run_in_reverse_order() -> None:
    log: list[str] = []
    undo = UndoStack()
    for name in "abc":
        undo.push(name, step(log, name))
    assert await undo.unwind() == ()
    assert log == ["c", "b", "a"]
    assert len(undo) == 0


async def test_an_undo_that_fails_is_a_leftover_keeps_none_of_the_others_and_can_be_repeated() -> None:
    log: list[str] = []
    errors: list[Exception | None] = [StorageError("Busy."), ValueError("secret"), None]
    undo = UndoStack()

    async def fails() -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    undo.push("a", step(log, "a"))
    undo.push("mount /x", fails)
    undo.push("c", step(log, "c"))
    assert await undo.unwind() == ("mount /x: Busy.",)
    assert log == ["c", "a"]
    assert len(undo) == 1
    assert await undo.unwind() == ("mount /x: ValueError",)
    assert await undo.unwind() == ()
    assert undo.leftovers == ()


async def test_an_undo_that_hangs_is_given_up_after_its_limit() -> None:
    log: list[str] = []
    undo = UndoStack(step_limit_s=0.01)
    undo.push("a", step(log, "a"))
    undo.push("b", asyncio.Event().wait)
    assert await undo.unwind() == ("b: no answer in time",)
    assert log == ["a"]


async def test_cancelling_twice_holds_no_undo_up() -> None:
    log: list[str] = []
    undo = UndoStack()
    gate = asyncio.Event()
    undo.push("a", step(log, "a", StorageError("Left.")))
    undo.push("b", gate.wait)
    task = asyncio.ensure_future(undo.unwind())
    await asyncio.sleep(0)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["a"]
    assert undo.leftovers == ("a: Left.",)


async def test_a_dropped_stack_undoes_nothing() -> None:
    log: list[str] = []
    undo = UndoStack()
    undo.push("a", step(log, "a"))
    undo.drop()
    assert await undo.unwind() == ()
    assert log == []
