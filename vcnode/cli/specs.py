"""Pods, containers and commands as the command line gives them: flags and files to request models. Pure."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from vcnode.cli.exits import UsageError
from vcnode.cli.settings import given, invalid
from vcnode.models import signals
from vcnode.models.base import Request
from vcnode.models.pod import Cmd, ContainerResources, ContainerSpec, PodSpec

DEFAULT_CONTAINER_ID = "main"
"""Id of the container that flags of ``pod create`` and ``pod run`` describe."""

CPU_PERIOD_US = 100_000
"""The node's default, in which --cpus counts."""

R = TypeVar("R", bound=Request)


@dataclass(frozen=True, slots=True, kw_only=True)
class CmdFlags:
    """The flags that describe a command to run."""

    args: Sequence[str] = ()
    env: Sequence[str] = ()
    workdir: str | None = None
    user: str | None = None

    def data(self) -> dict[str, Any]:
        """The command as request data."""
        envs = [{"var": name, "value": value} for name, value in pairs(self.env, "--env").items()]
        return given(
            {
                "args": list(self.args) or None,
                "envs": envs or None,
                "workdir": self.workdir,
                "user": self.user,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFlags:
    """The flags that describe a container."""

    container_id: str | None = None
    image: str | None = None
    rootfs: str | None = None
    readonly: bool = False
    disk_size_mib: int | None = None
    cpus: float | None = None
    mem_limit_mib: int | None = None
    pids_limit: int | None = None
    restart: str | None = None
    startup_probe: str | None = None
    readiness_probe: str | None = None
    liveness_probe: str | None = None
    stdin: bool = False
    tty: bool = False
    mounts: Sequence[str] = ()
    tmpfs: Sequence[str] = ()
    label: Sequence[str] = ()
    annotation: Sequence[str] = ()
    cmd: CmdFlags = CmdFlags()

    @property
    def any(self) -> bool:
        """Whether a flag of a container was given."""
        return self != ContainerFlags()

    def data(self) -> dict[str, Any]:
        """The container as request data.

        Raises:
            UsageError: Neither or both of --image and --rootfs were given.
        """
        if (self.image is None) == (self.rootfs is None):
            raise UsageError("A container needs exactly one of --image and --rootfs.")
        resources = {
            "cpu_quota_us": None if self.cpus is None else round(self.cpus * CPU_PERIOD_US),
            "mem_limit_mib": self.mem_limit_mib,
            "pids_limit": self.pids_limit,
        }
        return given(
            {
                "id": self.container_id,
                "image": self.image,
                "rootfs": self.rootfs,
                "readonly_rootfs": self.readonly or None,
                "stdin": self.stdin or None,
                "tty": self.tty or None,
                "writable": None if self.disk_size_mib is None else "disk",
                "disk_size_mib": self.disk_size_mib,
                "labels": pairs(self.label, "--label") or None,
                "annotations": pairs(self.annotation, "--annotation") or None,
                "mounts": [*map(mount, self.mounts), *map(tmpfs, self.tmpfs)] or None,
                "resources": resources,
                **restart_data(self.restart),
                "probes": {
                    "startup": probe(self.startup_probe, "--startup-probe"),
                    "readiness": probe(self.readiness_probe, "--readiness-probe"),
                    "liveness": probe(self.liveness_probe, "--liveness-probe"),
                },
                "cmd": self.cmd.data(),
            }
        )


_PORT = re.compile(r"(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFlags:
    """The flags that describe a pod."""

    pod_id: str | None = None
    hostname: str | None = None
    vcpus: int | None = None
    memory_mib: int | None = None
    hypervisor: str | None = None
    agent: str | None = None
    network: str | None = None
    restart: str | None = None
    on_disconnect: str | None = None
    template: str | None = None
    join: Sequence[str] = ()
    netns: str | None = None
    interworking: str | None = None
    publish: Sequence[str] = ()
    volumes: Sequence[str] = ()
    sockets: Sequence[str] = ()
    rate_mbit: float | None = None
    dns: Sequence[str] = ()
    label: Sequence[str] = ()
    annotation: Sequence[str] = ()

    def data(self) -> dict[str, Any]:
        """The pod as request data, without containers."""
        return given(
            {
                **restart_data(self.restart),
                "on_disconnect": on_disconnect(self.on_disconnect),
                "id": self.pod_id,
                "template": self.template,
                "hostname": self.hostname,
                "resources": {"vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib},
                "hypervisor_type": self.hypervisor,
                "agent_type": self.agent,
                "network_model": self.network,
                "network": {
                    "networks": list(self.join) or None,
                    "netns_path": self.netns,
                    "interworking": self.interworking,
                    "ports": [port(text) for text in self.publish] or None,
                    "rate_mbit": {"ingress": self.rate_mbit, "egress": self.rate_mbit},
                    "dns": {"servers": list(self.dns) or None},
                },
                "volumes": [volume for text in self.volumes if (volume := host_volume(text))] or None,
                "sockets": [socket(text) for text in self.sockets] or None,
                "labels": pairs(self.label, "--label"),
                "annotations": pairs(self.annotation, "--annotation"),
            }
        )


def port(text: str) -> dict[str, Any]:
    """A published port, ``HOST:CONTAINER`` or ``HOST:CONTAINER/udp``, as request data.

    Raises:
        UsageError: It is something else.
    """
    match = _PORT.fullmatch(text)
    if match is None:
        raise UsageError(f"--publish {text}: write HOST:CONTAINER, such as 8080:80 or 5353:53/udp.")
    return {"host": int(match[1]), "container": int(match[2]), "protocol": match[3] or "tcp"}


def mount(text: str) -> dict[str, Any]:
    """A mount, ``SOURCE:DESTINATION[:OPTIONS]``, as request data; a SOURCE on the host is `host_volume`.

    Raises:
        UsageError: It is something else.
    """
    source, colon, rest = text.partition(":")
    destination, _, options = rest.partition(":")
    if not source or not colon or not destination.startswith("/"):
        raise UsageError(f"--volume {text}: write SOURCE:/DESTINATION, or SOURCE:/DESTINATION:ro,noexec.")
    tag = _tag(source) if source.startswith("/") else source
    return given({"source": tag, "destination": destination, "options": _options(options)})


def tmpfs(text: str) -> dict[str, Any]:
    """A tmpfs, ``DESTINATION[:OPTIONS]``, as request data."""
    destination, _, options = text.partition(":")
    return given({"type": "tmpfs", "destination": destination, "options": _options(options)})


def host_volume(text: str) -> dict[str, Any] | None:
    """The volume of the pod that a mount of a directory of the host needs; None for one of a volume."""
    source, _, rest = text.partition(":")
    if not source.startswith("/"):
        return None
    read_only = "ro" in (_options(rest.partition(":")[2]) or ())
    return given({"mount_tag": _tag(source), "host_path": source, "read_only": read_only or None})


def socket(text: str) -> dict[str, Any]:
    """A socket, ``PATH:NAME[:connect]``, as request data. Raises UsageError when it is something else."""
    path, _, rest = text.partition(":")
    name, _, mode = rest.partition(":")
    if not path.startswith("/") or not name:
        raise UsageError(f"--socket {text}: write PATH:NAME or PATH:NAME:connect.")
    return given({"host_path": path, "name": name, "mode": mode or None})


def _options(text: str) -> list[str] | None:
    return text.split(",") if text else None


def _tag(path: str) -> str:
    """The tag of a directory of the host: its last name, as far as that may be, and what tells it apart."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.rstrip("/").rpartition("/")[2])[:32]
    return f"v-{name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def pod_spec(file: Mapping[str, Any] | None, flags: PodFlags, container: ContainerFlags) -> PodSpec:
    """The pod of *file*, if there is one, with *flags* on top; flags may describe one container of it.

    Raises:
        UsageError: A value is wrong, or both the file and the flags describe containers.
    """
    data = _merged(file or {}, flags.data())
    if container.any:
        if data.get("containers"):
            raise UsageError("Give containers in the file or by flags, not both.")
        data["containers"] = [{"id": DEFAULT_CONTAINER_ID, **container.data()}]
    return model(PodSpec, data, "The pod is not described right.")


def limits(
    *, cpus: str | None, cpu_shares: str | None, mem_limit_mib: str | None, pids_limit: str | None
) -> ContainerResources:
    """The limits to change: those that were given; ``none`` lifts one.

    Raises:
        UsageError: None was given, or a value is wrong.
    """
    data: dict[str, Any] = {}
    if cpus is not None:
        lifted = cpus == "none"
        data["cpu_quota_us"] = None if lifted else round(_number(cpus, "--cpus") * CPU_PERIOD_US)
        data["cpu_period_us"] = CPU_PERIOD_US
    whole = {"cpu_shares": cpu_shares, "mem_limit_mib": mem_limit_mib, "pids_limit": pids_limit}
    for name, text in whole.items():
        if text is not None:
            data[name] = None if text == "none" else _number(text, name, whole=True)
    if not data:
        raise UsageError("Give a limit to change: --cpus, --cpu-shares, --memory-limit or --pids-limit.")
    return model(ContainerResources, data, "The limits are not right.")


def container_spec(file: Mapping[str, Any] | None, flags: ContainerFlags) -> ContainerSpec:
    """The container of *file*, or else of *flags*; with a file, the id is the only flag that may be given.

    Raises:
        UsageError: A value is wrong, or file and flags were mixed.
    """
    if file is None:
        return model(ContainerSpec, flags.data(), "The container is not described right.")
    if flags != ContainerFlags(container_id=flags.container_id):
        raise UsageError("Describe the container in the file or by flags, not both (--id goes with either).")
    return model(
        ContainerSpec,
        _merged(file, given({"id": flags.container_id})),
        "The container is not described right.",
    )


def cmd(flags: CmdFlags) -> Cmd:
    """The command of *flags*. Raises UsageError when a value is wrong."""
    return model(Cmd, flags.data(), "The command is not described right.")


def model(kind: type[R], data: Mapping[str, Any], message: str) -> R:
    """*data* as a model, checked as the node will check it.

    Raises:
        UsageError: It does not fit; the error says *message* and lists every wrong field.
    """
    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as exc:
        raise invalid(message, exc, kind) from exc
    except (TypeError, ValueError) as exc:
        raise UsageError(f"{message} {exc}") from exc


def parse(text: bytes, name: str) -> dict[str, Any]:
    """The JSON or TOML object in *text*, read from *name*; what starts with '{' is JSON.

    Raises:
        UsageError: It is neither, or not an object.
    """
    try:
        decoded = text.decode("utf-8")
        if decoded.lstrip().startswith(("{", "[")) and not name.endswith(".toml"):
            data = json.loads(decoded)
        else:
            data = tomllib.loads(decoded)
    except UnicodeDecodeError as exc:
        raise UsageError(f"{name} is not UTF-8 text.") from exc
    except RecursionError as exc:
        raise UsageError(f"{name} is nested too deeply.") from exc
    except ValueError as exc:  # both parsers' errors are ValueErrors
        raise UsageError(f"{name} is neither JSON nor TOML: {exc}") from exc
    if not isinstance(data, dict):
        raise UsageError(f"{name} holds a list; one object with the fields of a spec is needed.")
    return data


def pairs(values: Sequence[str], flag: str) -> dict[str, str]:
    """``KEY=VALUE`` words as a mapping; a later one of the same key wins.

    Raises:
        UsageError: A word has no '=' or nothing before it.
    """
    found: dict[str, str] = {}
    for word in values:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"{flag} needs KEY=VALUE; {word!r} is not.")
        found[key] = value
    return found


def restart_data(policy: str | None) -> dict[str, Any]:
    """The fields for a policy such as ``always`` or ``on-failure:3``; none without one.

    Raises:
        UsageError: What follows the colon is no number.
    """
    if policy is None:
        return {}
    name, colon, most = policy.partition(":")
    if colon and not (most.isascii() and most.isdecimal() and len(most) < 10):
        raise UsageError(f"The number of restarts in {policy!r} is none; give one such as on-failure:3.")
    return {"restart_policy": name, "max_restarts": int(most) if colon else None}


def on_disconnect(text: str | None) -> dict[str, Any] | None:
    """The rule that *text* names: ``keep``, ``pause:SECONDS`` or ``stop:SECONDS``.

    Raises:
        UsageError: It is something else.
    """
    if text is None:
        return None
    action, colon, seconds = text.partition(":")
    if not colon:
        return {"action": action}
    return {"action": action, "after_s": _number(seconds, f"--on-disconnect {text}")}


_PROBE_SETTINGS = {
    "delay": "initial_delay_s",
    "period": "period_s",
    "timeout": "timeout_s",
    "successes": "success_threshold",
    "failures": "failure_threshold",
}
_SETTING = re.compile(r"([a-z]+)=([^,]*),")


def probe(text: str | None, flag: str) -> dict[str, Any] | None:
    """The probe that *text* names: settings, then ``exec:COMMAND``, ``tcp:PORT`` or ``http:PORT/PATH``.

    Raises:
        UsageError: It is something else.
    """
    if text is None:
        return None
    data: dict[str, Any] = {}
    rest = text
    while (match := _SETTING.match(rest)) is not None:
        name = _PROBE_SETTINGS.get(match[1])
        if name is None:
            raise UsageError(f"{flag} has no setting {match[1]!r}; there are {', '.join(_PROBE_SETTINGS)}.")
        data[name] = _number(match[2], f"{flag} {match[0].rstrip(',')}", whole=name.endswith("threshold"))
        rest = rest[match.end() :]
    kind, _, what = rest.partition(":")
    if kind == "exec" and what.strip():
        try:
            data["exec"] = {"args": shlex.split(what)}
        except ValueError as exc:
            raise UsageError(f"{flag} {text}: {exc}.") from exc
    elif kind == "tcp":
        data["tcp"] = {"port": _number(what, f"{flag} {text}", whole=True)}
    elif kind == "http":
        port, slash, path = what.partition("/")
        data["http"] = {"port": _number(port, f"{flag} {text}", whole=True), "path": slash + path or None}
    else:
        raise UsageError(f"{flag} {text}: write exec:COMMAND, tcp:PORT or http:PORT/PATH.")
    return data


def _number(text: str, where: str, *, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError as exc:
        raise UsageError(f"{where}: {text!r} is no {'whole ' if whole else ''}number.") from exc


def signal_number(text: str) -> int:
    """The number of the signal that *text* names: ``HUP``, ``SIGHUP`` or ``1``.

    Raises:
        UsageError: There is no such signal.
    """
    try:
        return signals.signal_number(text)
    except ValueError as exc:
        raise UsageError(
            f"There is no signal {text!r}; give a name such as TERM, or a number from 1 to 64."
        ) from exc


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        under = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        merged[name] = _merged(under, value) if both else value  # type: ignore[arg-type]
    return merged
