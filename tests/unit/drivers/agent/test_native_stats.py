"""What a guest says of itself is checked field by field."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vcnode.drivers.agent.native import stats
from vcnode.drivers.agent.native.messages import BadFieldError

BLOCK = {"read_bytes": 1, "written_bytes": 2, "read_count": 3, "write_count": 4}
COUNTERS = {
    f"{way}_{what}": 1 for way in ("received", "sent") for what in ("bytes", "packets", "errors", "dropped")
}
GOOD: dict[str, Any] = {
    "guest": {
        "cpu": {"usage_us": 3, "user_us": 2, "system_us": 1},
        "mem_total_bytes": 100,
        "mem_available_bytes": 50,
        "pid_count": 9,
        "block": BLOCK,
        "interfaces": [{"name": "eth0", **COUNTERS}],
    },
    "containers": [
        {
            "container_id": "c1",
            "cpu": {"usage_us": 3, "user_us": 2, "system_us": 1, "throttled_us": 0},
            "memory": {
                "used_bytes": 9,
                "working_set_bytes": 8,
                "peak_bytes": None,
                "limit_bytes": 1 << 20,
                "oom_kill_count": 0,
            },
            "pid_count": 1,
            "pid_limit": None,
            "block": None,
        }
    ],
}


def changed(path: str, value: object) -> dict[str, Any]:
    result = copy.deepcopy(GOOD)
    at: Any = result
    *way, last = path.split(".")
    for name in way:
        at = at[int(name) if name.isdigit() else name]
    at[last] = value
    return result


def test_a_good_answer_is_taken() -> None:
    guest, (container,) = stats.guest(GOOD), stats.containers(GOOD)
    assert guest.cpu.throttled_us is None
    assert guest.interfaces[0].sent_packets == 1
    assert container.block is None
    assert container.memory.limit_bytes == 1 << 20


def test_names_of_interfaces_are_made_fit_to_be_shown() -> None:
    told = stats.guest(changed("guest.interfaces.0.name", "\x1b[2J" + "x" * 1000))
    assert told.interfaces[0].name == " [2Jxxxxxxxxxxx…"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("guest", None),
        ("guest.cpu", []),
        ("guest.cpu.usage_us", -1),
        ("guest.cpu.user_us", True),
        ("guest.cpu.system_us", 1.5),
        ("guest.mem_total_bytes", 1 << 53),
        ("guest.pid_count", "9"),
        ("guest.block", {}),
        ("guest.interfaces", [{"name": "eth0", **COUNTERS}] * 65),
        ("guest.interfaces", [1]),
        ("guest.interfaces.0.name", 7),
        ("containers", {}),
        ("containers", [GOOD["containers"][0]] * 2),
        ("containers", [{"container_id": f"c{n}"} for n in range(1025)]),
        ("containers.0.container_id", "../c1"),
        ("containers.0.memory", None),
        ("containers.0.memory.limit_bytes", "max"),
        ("containers.0.block", {"read_bytes": 1}),
        ("containers.0.pid_limit", -1),
    ],
)
def test_a_field_that_is_wrong_is_named(path: str, value: object) -> None:
    result = changed(path, value)
    read = stats.guest if path.startswith("guest") else stats.containers
    with pytest.raises(BadFieldError):
        read(result)
