"""Checks of what a guest says of itself in answer to ``stats``; see `messages`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vcnode.drivers.agent.native.messages import MAX_LISTED, BadFieldError, clean, is_id
from vcnode.models.stats import (
    BlockStats,
    ContainerMemory,
    ContainerStats,
    CpuStats,
    GuestStats,
    InterfaceStats,
)

MAX_NUMBER = (1 << 53) - 1
"""Largest number: JSON readers in other languages know no larger ones."""
MAX_INTERFACES = 64
_MAX_NAME = 15
"""Characters of an interface's name. Source: linux/if.h, IFNAMSIZ."""
_WAYS = ("received", "sent")
_COUNTERS = ("bytes", "packets", "errors", "dropped")


def guest(result: Mapping[str, Any]) -> GuestStats:
    """The guest's own numbers in the result of ``stats``. Raises BadFieldError."""
    fields = _object(result, "guest")
    interfaces = _array(fields, "interfaces", MAX_INTERFACES)
    return GuestStats(
        cpu=_cpu(fields),
        mem_total_bytes=_number(fields, "mem_total_bytes"),
        mem_available_bytes=_number(fields, "mem_available_bytes"),
        pid_count=_number(fields, "pid_count"),
        block=_block(_object(fields, "block")),
        interfaces=tuple(_interface(entry) for entry in interfaces),
    )


def containers(result: Mapping[str, Any]) -> Sequence[ContainerStats]:
    """The containers in the result of ``stats``. Raises BadFieldError."""
    entries = [_container(entry) for entry in _array(result, "containers", MAX_LISTED)]
    if len({entry.container_id for entry in entries}) != len(entries):
        raise BadFieldError("container_id")
    return entries


def _container(fields: Mapping[str, Any]) -> ContainerStats:
    container_id = fields.get("container_id")
    if type(container_id) is not str or not is_id(container_id):
        raise BadFieldError("container_id")
    memory = _object(fields, "memory")
    return ContainerStats(
        container_id=container_id,
        cpu=_cpu(fields),
        memory=ContainerMemory(
            used_bytes=_number(memory, "used_bytes"),
            working_set_bytes=_number(memory, "working_set_bytes"),
            peak_bytes=_optional(memory, "peak_bytes"),
            limit_bytes=_optional(memory, "limit_bytes"),
            oom_kill_count=_number(memory, "oom_kill_count"),
        ),
        pid_count=_number(fields, "pid_count"),
        pid_limit=_optional(fields, "pid_limit"),
        block=None if fields.get("block") is None else _block(_object(fields, "block")),
    )


def _cpu(fields: Mapping[str, Any]) -> CpuStats:
    cpu = _object(fields, "cpu")
    return CpuStats(
        usage_us=_number(cpu, "usage_us"),
        user_us=_number(cpu, "user_us"),
        system_us=_number(cpu, "system_us"),
        throttled_us=_optional(cpu, "throttled_us"),
    )


def _block(fields: Mapping[str, Any]) -> BlockStats:
    return BlockStats(
        read_bytes=_number(fields, "read_bytes"),
        written_bytes=_number(fields, "written_bytes"),
        read_count=_number(fields, "read_count"),
        write_count=_number(fields, "write_count"),
    )


def _interface(fields: Mapping[str, Any]) -> InterfaceStats:
    name = fields.get("name")
    if type(name) is not str:
        raise BadFieldError("name")
    counters = {f"{way}_{what}": _number(fields, f"{way}_{what}") for way in _WAYS for what in _COUNTERS}
    return InterfaceStats.model_validate({"name": clean(name, _MAX_NAME), **counters})


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name)
    if type(value) is not dict:
        raise BadFieldError(name)
    return value


def _array(fields: Mapping[str, Any], name: str, most: int) -> Sequence[Mapping[str, Any]]:
    value = fields.get(name)
    if type(value) is not list or len(value) > most or any(type(entry) is not dict for entry in value):
        raise BadFieldError(name)
    return value


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:  # not isinstance: True is no number
        raise BadFieldError(name)
    return value


def _optional(fields: Mapping[str, Any], name: str) -> int | None:
    return None if fields.get(name) is None else _number(fields, name)
