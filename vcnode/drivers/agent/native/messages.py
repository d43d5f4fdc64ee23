"""Params as the guest protocol wants them, and checks of everything that a guest says. Pure.

The guest is hostile: each field that is used has its type and range checked here, and text from the guest
loses its control characters and excess before anybody reads it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from vcnode.drivers.base import ContainerExited, ContainerHealth, LogPosition
from vcnode.errors import (
    AgentError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.models.base import ID_PATTERN
from vcnode.models.living import ContainerProcess
from vcnode.models.pod import ContainerResources
from vcnode.models.probes import Probe
from vcnode.models.vm import (
    GuestConfig,
    GuestContainer,
    GuestContainerState,
    GuestInfo,
    GuestProcess,
    Watchdog,
)

MAX_TEXT = 500
"""Characters of a text from the guest that are kept."""
MAX_LISTED = 1_024
"""Most containers that a guest may list."""
MAX_ARGS = 1_024
"""Most arguments of a process, and most characters of all of them together, as the protocol bounds them."""
_MAX_PID = 1 << 22
_MAX_TIME_NS = 253_402_300_799 * 10**9  # the end of the year 9999, the last that a datetime holds
_IS_ID = re.compile(ID_PATTERN)


class BadFieldError(Exception):
    """The guest sent a field of a wrong type or out of range; the text names it and holds nothing of it."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Make text from a guest fit to be logged and shown: printable, one line, at most *limit* characters."""
    kept = "".join(c if c.isprintable() else " " for c in text[:limit])
    return kept + "…" if len(text) > limit else kept


def is_id(text: str) -> bool:
    """Whether *text* can be the id of a container."""
    return _IS_ID.fullmatch(text) is not None


# -- what goes out -----------------------------------------------------------------------------------------


def configure_params(config: GuestConfig) -> dict[str, Any]:
    """Params of ``configure``."""
    return {
        "hostname": config.hostname,
        "time_ns": config.time_ns,
        "entropy": base64.b64encode(config.entropy).decode("ascii"),
        "machine_id": config.machine_id,
        "interfaces": [
            {
                "name": e.name,
                "mac": e.mac,
                "addresses": list(e.addresses),
                "mtu": e.mtu,
                "routes": [route.model_dump() for route in e.routes],
            }
            for e in config.endpoints
        ],
        "dns": {
            "servers": list(config.dns.servers),
            "search": list(config.dns.search),
            "options": list(config.dns.options),
            "hosts": [list(pair) for pair in config.dns.hosts.items()],
        },
        **({} if config.watchdog is None else watchdog_params(config.watchdog)),
    }


def watchdog_params(watchdog: Watchdog) -> dict[str, Any]:
    """Params of ``set_watchdog``."""
    return {
        "watchdog": {
            "after_ms": max(1, round(watchdog.after_s * 1000)),
            "grace_ms": round(watchdog.grace_s * 1000),
        }
    }


def create_container_params(container: GuestContainer) -> dict[str, Any]:
    """Params of ``create_container``."""
    return {
        "container_id": container.container_id,
        "root": container.root.model_dump(exclude_none=True),
        "readonly": container.readonly,
        "hostname": container.hostname,
        "process": container.process.model_dump(),
        "resources": container.resources.model_dump(),
        **{name: True for name in ("stdin", "tty") if getattr(container, name)},
        **_secret_params(container),
        **_mount_params(container),
        "stop_signal": container.stop_signal,
        "stop_timeout_ms": round(container.stop_timeout_s * 1000),
        **_probe_params(container),
    }


def _secret_params(container: GuestContainer) -> dict[str, Any]:
    """What ``create_container`` says of secrets; nothing if there are none, as older agents want."""
    if not container.secrets:
        return {}
    return {
        "secrets": [
            {"name": s.name, "mode": s.mode, "data": base64.b64encode(s.data).decode("ascii")}
            for s in container.secrets
        ]
    }


def _mount_params(container: GuestContainer) -> dict[str, Any]:
    """What ``create_container`` says of mounts; nothing if there are none, as older agents want."""
    if not container.mounts:
        return {}
    return {
        "mounts": [mount.model_dump(exclude_none=True, exclude_defaults=True) for mount in container.mounts]
    }


def _probe_params(container: GuestContainer) -> dict[str, Any]:
    """What ``create_container`` says of probes; nothing if there are none, as older agents want."""
    named = {
        "startup": container.probes.startup,
        "readiness": container.probes.readiness,
        "liveness": container.probes.liveness,
    }
    probes = {name: _probe(probe) for name, probe in named.items() if probe is not None}
    if not probes:
        return {}
    return {"probes": probes}


def _probe(probe: Probe) -> dict[str, Any]:
    action: dict[str, Any]
    if probe.exec is not None:
        action = {"exec": {"args": list(probe.exec.args)}}
    elif probe.http is not None:
        http = probe.http
        action = {"http": {"host": http.host, "port": http.port, "request": http.request}}
    elif probe.tcp is not None:
        action = {"tcp": {"host": probe.tcp.host, "port": probe.tcp.port}}
    else:
        raise ValueError("a probe without an action")
    return {
        **action,
        "initial_delay_ms": round(probe.initial_delay_s * 1000),
        "period_ms": round(probe.period_s * 1000),
        "timeout_ms": round(probe.timeout_s * 1000),
        "success_threshold": probe.success_threshold,
        "failure_threshold": probe.failure_threshold,
    }


def update_container_params(container_id: str, resources: ContainerResources) -> dict[str, Any]:
    """Params of ``update_container``."""
    return {"container_id": container_id, "resources": resources.model_dump()}


def execute_params(
    process: GuestProcess,
    container_id: str | None,
    tty: tuple[int, int] | None,
    *,
    stdin: int,
    stdout: int,
    stderr: int | None,
) -> dict[str, Any]:
    """Params of ``execute``."""
    return {
        "container_id": container_id,
        "process": {**process.model_dump(), "user": process.user or "0"},
        "tty": None if tty is None else {"rows": tty[0], "columns": tty[1]},
        "streams": {"stdin": stdin, "stdout": stdout, "stderr": stderr},
    }


# -- what comes in -----------------------------------------------------------------------------------------


def _int(fields: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:  # not isinstance: True is no number
        raise BadFieldError(name)
    return value


def _optional_int(fields: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    return None if fields.get(name) is None else _int(fields, name, least, most)


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if type(value) is not bool:
        raise BadFieldError(name)
    return value


def _id(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if type(value) is not str or not is_id(value):
        raise BadFieldError(name)
    return value


def guest_info(hello: Mapping[str, Any]) -> GuestInfo:
    """What the guest's hello, already checked by the codec, says of it."""
    return GuestInfo(
        agent_version=clean(hello["agent_version"], 64),
        boot_id=clean(hello["boot_id"], 64),
        kernel=clean(hello["kernel"], 128),
    )


def pid(result: Mapping[str, Any]) -> int:
    """Result of ``start_container``. Raises BadFieldError."""
    return _int(result, "pid", 1, _MAX_PID)


def process_id(fields: Mapping[str, Any]) -> int:
    """Result of ``execute``, or the process that an event is about. Raises BadFieldError."""
    return _int(fields, "process_id", 1, (1 << 53) - 1)


def exit_code(fields: Mapping[str, Any]) -> int:
    """Exit code in an event. Raises BadFieldError."""
    return _int(fields, "exit_code", 0, 255)


def container_exited(fields: Mapping[str, Any]) -> ContainerExited:
    """The event ``container_exited``. Raises BadFieldError."""
    return ContainerExited(
        container_id=_id(fields, "container_id"),
        exit_code=exit_code(fields),
        oom_killed=_bool(fields, "oom_killed"),
        probe_failure=_optional_text(fields, "probe_failure"),
    )


def container_health(fields: Mapping[str, Any]) -> ContainerHealth:
    """The event ``container_health``. Raises BadFieldError."""
    return ContainerHealth(container_id=_id(fields, "container_id"), ready=_bool(fields, "ready"))


def container_states(result: Mapping[str, Any]) -> Sequence[GuestContainerState]:
    """Result of ``list_containers``. Raises BadFieldError."""
    entries = result.get("containers")
    if type(entries) is not list or len(entries) > MAX_LISTED:
        raise BadFieldError("containers")
    states = [_container_state(entry) for entry in entries]
    if len({state.container_id for state in states}) != len(states):
        raise BadFieldError("container_id")
    return states


def _container_state(entry: object) -> GuestContainerState:
    if type(entry) is not dict:
        raise BadFieldError("containers")
    state = entry.get("state")
    if state not in ("created", "running", "paused", "stopped"):
        raise BadFieldError("state")
    code = _optional_int(entry, "exit_code", 0, 255)
    if state == "stopped" and code is None:
        raise BadFieldError("exit_code")
    finished_at_ns = _optional_int(entry, "finished_at_ns", 0, _MAX_TIME_NS)
    return GuestContainerState(
        container_id=_id(entry, "container_id"),
        state=state,
        pid=_optional_int(entry, "pid", 1, _MAX_PID),
        exit_code=code,
        oom_killed=_bool(entry, "oom_killed"),
        resources=_resources(entry.get("resources")),
        ready=None if entry.get("ready") is None else _bool(entry, "ready"),
        probe_failure=_optional_text(entry, "probe_failure"),
        finished_at=None if finished_at_ns is None else datetime.fromtimestamp(finished_at_ns / 1e9, UTC),
    )


def _resources(fields: object) -> ContainerResources | None:
    if fields is None:
        return None
    try:
        return ContainerResources.model_validate(fields)
    except ValidationError as exc:
        raise BadFieldError("resources") from exc


def available_bytes(result: Mapping[str, Any]) -> int:
    """Result of ``memory``. Raises BadFieldError."""
    return _int(result, "available_bytes", 0, (1 << 53) - 1)


def processes(result: Mapping[str, Any], limit: int) -> tuple[Sequence[ContainerProcess], int]:
    """Result of ``list_processes``. Raises BadFieldError."""
    entries = result.get("processes")
    if type(entries) is not list or len(entries) > limit:
        raise BadFieldError("processes")
    return [_process(entry) for entry in entries], _int(result, "total", len(entries), _MAX_PID)


def _process(entry: object) -> ContainerProcess:
    if type(entry) is not dict:
        raise BadFieldError("processes")
    state, args = entry.get("state"), entry.get("args")
    if type(state) is not str or len(state) != 1 or not state.isalpha():
        raise BadFieldError("state")
    if type(args) is not list or len(args) > MAX_ARGS or any(type(arg) is not str for arg in args):
        raise BadFieldError("args")
    user = None if entry.get("user") is None else _text(entry, "user", 64)
    return ContainerProcess(
        pid=_int(entry, "pid", 0, _MAX_PID),
        ppid=_int(entry, "ppid", 0, _MAX_PID),
        container_pid=_int(entry, "container_pid", 0, _MAX_PID),
        uid=_int(entry, "uid", 0, (1 << 32) - 1),
        user=user,
        state=state,
        cpu_ms=_int(entry, "cpu_ms", 0, (1 << 53) - 1),
        rss_bytes=_int(entry, "rss_bytes", 0, (1 << 53) - 1),
        started_at=datetime.fromtimestamp(_int(entry, "started_at_ns", 0, _MAX_TIME_NS) / 1e9, UTC),
        name=_text(entry, "name", 64),
        args=_bounded(args),
        args_truncated=_bool(entry, "args_truncated"),
    )


def _bounded(args: Sequence[str]) -> tuple[str, ...]:
    """Arguments fit to be shown, `MAX_ARGS` characters in all: the agent may not keep its own bound."""
    kept: list[str] = []
    left = MAX_ARGS
    for arg in args:
        if left <= 0:
            break
        kept.append(clean(arg, left))
        left -= max(1, len(arg))
    return tuple(kept)


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    return None if fields.get(name) is None else _text(fields, name, MAX_TEXT)


def _text(fields: Mapping[str, Any], name: str, most: int) -> str:
    value = fields.get(name)
    if type(value) is not str:
        raise BadFieldError(name)
    return clean(value, most)


_ERRORS: Mapping[str, type[VcnodeError]] = {
    "not_found": NotFoundError,
    "already_exists": AlreadyExistsError,
    "failed_precondition": FailedPreconditionError,
    "not_implemented": UnsupportedError,
}


def follow_logs_params(stream: int, known: Mapping[str, LogPosition]) -> dict[str, Any]:
    """Params of ``follow_logs``."""
    return {
        "stream": stream,
        "known": [
            {"container_id": container_id, "instance": position.instance, "offset": position.offset}
            for container_id, position in known.items()
        ],
    }


def error(method: str, code: str, message: str) -> VcnodeError:
    """The error that stands for the guest's answer to *method*; `AgentError` for codes it should not use."""
    text = clean(message) or "The guest gave no reason."
    if code == "invalid_argument":
        return InvalidArgumentError(text, violations=[{"field": "", "message": text}])
    if (found := _ERRORS.get(code)) is not None:
        return found(text)
    return AgentError(f"The guest agent could not do {method}: {text}", method=method)
