"""What hyperstart is told, as JSON. Pure. Its parser refuses keys that it does not know, so none is sent."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vcnode.drivers.agent.hyperstart.wire import Dialect
from vcnode.errors import UnsupportedError
from vcnode.models.network import Endpoint, Route
from vcnode.models.vm import GuestConfig, GuestContainer, GuestProcess

SHARE_TAG = "hyperShared"
"""Mount tag of the 9p share. Source: virtcontainers hyperstart.go."""
MAIN = "init"
"""Id of a container's main process."""
IN_GUEST = "hyperstart"
"""Name of the container that is none: the agent's own namespaces."""
DEFAULT_MTU = 1500
ROOT_USERS = frozenset({"", "0", "root"})


def encode(fields: Mapping[str, Any]) -> bytes:
    """A payload. Not ASCII only: the guest's own decoder of ``\\u`` is the less certain part."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def start_pod(config: GuestConfig, dialect: Dialect) -> bytes:
    """STARTPOD: hostname, network, name servers and share; containers come later, each by itself."""
    return encode(
        {
            "hostname": config.hostname,
            "containers": [],
            "interfaces": interfaces(config.endpoints, dialect),
            "dns": list(config.dns.servers),
            "routes": routes(config.endpoints),
            "shareDir": SHARE_TAG,
        }
    )


def interfaces(endpoints: Sequence[Endpoint], dialect: Dialect) -> list[dict[str, Any]]:
    """The interfaces with their IPv4 addresses; hyperstart knows no others, and no interface without one.

    Raises:
        UnsupportedError: This version cannot say it.
    """
    return [
        interface(index, endpoint, dialect)
        for index, endpoint in enumerate(endpoints)
        if _addresses(endpoint)
    ]


def interface(index: int, endpoint: Endpoint, dialect: Dialect) -> dict[str, Any]:
    """One interface, the *index*-th of the guest; also the payload of SETUPINTERFACE. Raises as above."""
    fields: dict[str, Any] = {"device": f"eth{index}"}
    if endpoint.name != fields["device"]:
        fields["newDeviceName"] = endpoint.name
    addresses = [{"ipAddress": a, "netMask": bits} for a, bits in _addresses(endpoint)]
    plain = len(addresses) == 1 and endpoint.mtu == DEFAULT_MTU
    if plain:  # which every version knows, the early ones of 4243 as well
        return fields | addresses[0]
    if not dialect.more_interface:
        raise UnsupportedError(
            f"hyperstart of API version {dialect.version} knows one IPv4 address of an interface, and no MTU"
            f" but {DEFAULT_MTU}; {endpoint.name} has {len(addresses)} and {endpoint.mtu}."
        )
    return fields | {"ipAddresses": addresses, "mtu": endpoint.mtu}


def _addresses(endpoint: Endpoint) -> list[tuple[str, str]]:
    found = [ipaddress.ip_interface(address) for address in endpoint.addresses]
    return [(str(i.ip), str(i.network.prefixlen)) for i in found if i.version == 4]


def routes(endpoints: Sequence[Endpoint]) -> list[dict[str, str]]:
    """The IPv4 routes, those on a link before those through it."""
    found = [
        (endpoint.name, route)
        for endpoint in endpoints
        for route in endpoint.routes
        if ipaddress.ip_network(route.destination).version == 4
    ]
    return [_route(name, route) for name, route in sorted(found, key=lambda f: f[1].gateway is not None)]


def _route(device: str, route: Route) -> dict[str, str]:
    dest = "default" if route.destination == "0.0.0.0/0" else route.destination
    gateway = {} if route.gateway is None else {"gateway": route.gateway}
    return {"dest": dest, "device": device, **gateway}


def left_out(endpoints: Sequence[Endpoint]) -> list[str]:
    """What of the network the guest does not get."""
    addresses = [a for e in endpoints for a in e.addresses if ipaddress.ip_interface(a).version != 4]
    paths = [
        r.destination
        for e in endpoints
        for r in e.routes
        if ipaddress.ip_network(r.destination).version != 4 or r.metric is not None
    ]
    return [*addresses, *paths]


def process(
    wanted: GuestProcess,
    dialect: Dialect,
    *,
    process_id: str,
    stdio: int,
    stderr: int,
    terminal: bool,
    tty_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A process; *stderr* 0 with a terminal: all output is one stream.

    Raises:
        UnsupportedError: It has resource limits, and this version knows none.
    """
    fields: dict[str, Any] = {"id": process_id} if dialect.named_processes else {}
    if wanted.user not in ROOT_USERS or wanted.group not in (None, *ROOT_USERS):
        fields["user"] = wanted.user or "root"
        if wanted.group is not None:
            fields["group"] = wanted.group
    if wanted.supplementary_groups:
        fields.setdefault("user", "root")
        fields["additionalGroups"] = list(wanted.supplementary_groups)
    fields |= {
        "terminal": terminal,
        "stdio": stdio,
        "stderr": stderr,
        "args": list(wanted.args),
        "envs": [{"env": name, "value": value} for name, value in wanted.envs],
        "workdir": wanted.workdir,
    }
    if dialect.privileges:
        capabilities = list(wanted.capabilities)
        fields["rlimits"] = [
            {"type": f"RLIMIT_{kind.upper()}", "hard": hard & (1 << 64) - 1, "soft": soft & (1 << 64) - 1}
            for kind, soft, hard in wanted.rlimits
        ]
        fields["noNewPrivileges"] = wanted.no_new_privileges
        sets = ("bounding", "effective", "inheritable", "permitted")
        fields["capabilities"] = {**dict.fromkeys(sets, capabilities), "ambient": []}
    elif wanted.rlimits:
        raise UnsupportedError(f"hyperstart of API version {dialect.version} knows no resource limits.")
    return fields


def container(wanted: GuestContainer, main: Mapping[str, Any]) -> bytes:
    """NEWCONTAINER, with its main process. The share holds the root itself, under the container's id."""
    shared = wanted.root.shared_name or wanted.container_id
    return encode(
        {
            "id": wanted.container_id,
            "image": shared,
            "rootfs": "",
            "process": dict(main),
            "restartPolicy": "never",
            "initialize": False,
        }
    )


def execute(container_id: str, wanted: Mapping[str, Any]) -> bytes:
    """EXECCMD."""
    return encode({"container": container_id, "process": dict(wanted)})


def kill_container(container_id: str, number: int, dialect: Dialect, *, everyone: bool) -> bytes:
    """KILLCONTAINER. The signal is a number: of a text the guest makes 0."""
    also = {"allProcesses": everyone} if dialect.kills_all else {}
    return encode({"container": container_id, "signal": number, **also})


def signal_process(container_id: str, process_id: str, number: int) -> bytes:
    """SIGNALPROCESS, to the whole process group."""
    return encode({"container": container_id, "process": process_id, "signal": number})


def window(container_id: str, process_id: str, seq: int, rows: int, columns: int, dialect: Dialect) -> bytes:
    """WINSIZE."""
    whose: dict[str, Any] = {"seq": seq}
    if dialect.version > 4242:
        whose = {"container": container_id, "process": process_id}
    return encode({**whose, "row": rows, "column": columns})


def remove_container(container_id: str) -> bytes:
    """REMOVECONTAINER."""
    return encode({"container": container_id})


def file_command(container_id: str, path: str) -> bytes:
    """READFILE, and the head of WRITEFILE, whose data begins after the first ``}``.

    Raises:
        UnsupportedError: The path has one.
    """
    if "}" in path:
        raise UnsupportedError("hyperstart cannot name files with '}' in their path.")
    return encode({"container": container_id, "file": path})
