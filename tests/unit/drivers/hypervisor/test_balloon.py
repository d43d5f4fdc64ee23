"""vcnode.drivers.hypervisor.qemu.balloon: waits for what the guest really does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from vcnode.drivers.hypervisor.qemu.balloon import Balloon
from vcnode.errors import FailedPreconditionError

MIB = 1 << 20


class Qmp:
    """A QEMU whose guest gives back as much as the test says."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.actual = 256 * MIB

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        if command == "balloon":
            assert arguments is not None
            self.asked.append(arguments["value"])
            return {}
        assert command == "query-balloon"
        return {"actual": self.actual}


async def test_it_is_done_when_the_guest_has_given_back_all() -> None:
    qmp = Qmp()
    balloon = Balloon("vm-1", qmp)  # type: ignore[arg-type]
    setting = asyncio.ensure_future(balloon.set(128, timeout_s=10))
    for actual in (200, 128):
        await asyncio.sleep(0)
        assert not setting.done()
        qmp.actual = actual * MIB
        balloon.on_event("SOMETHING_ELSE")
        await asyncio.sleep(0)
        assert not setting.done()
        balloon.on_event("BALLOON_CHANGE")
        await asyncio.sleep(0)
    await setting
    assert qmp.asked == [128 * MIB]


async def test_a_guest_that_keeps_its_memory_is_told_with_how_much_it_has() -> None:
    qmp = Qmp()
    qmp.actual = 200 * MIB
    with pytest.raises(FailedPreconditionError, match=r"has 200 MiB after 0.01 s, not 128") as caught:
        await Balloon("vm-1", qmp).set(128, timeout_s=0.01)  # type: ignore[arg-type]
    assert caught.value.details["actual_mib"] == 200
