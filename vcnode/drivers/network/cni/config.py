"""CNI network configurations: read from a directory, checked, and turned into what each plugin gets. Pure but
for `load`.

Source: https://www.cni.dev/docs/spec/, sections 1 and 3, versions 0.3.1 to 1.1.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcnode.errors import NetworkError

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions of the specification that are spoken here, oldest first."""
SUFFIXES = (".conflist", ".conf", ".json")
MAX_FILES = 256
MAX_FILE_BYTES = 1024 * 1024
MAX_PLUGINS = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin of a network."""

    type: str
    """File name of its program."""
    conf: Json
    """Its configuration as it is written."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What it wants to be told of at run time, such as ``portMappings``."""
        declared = self.conf.get("capabilities")
        return (
            frozenset(k for k, v in declared.items() if v is True)
            if isinstance(declared, dict)
            else frozenset()
        )


@dataclass(frozen=True, slots=True)
class Network:
    """A network configuration list; a single configuration is a list of one."""

    name: str
    versions: tuple[str, ...]
    """Versions that the configuration allows and that are spoken here, newest first; at least one."""
    plugins: tuple[Plugin, ...]
    disable_check: bool = False
    """CHECK must not be called."""
    disable_gc: bool = False
    """GC must not be called."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Those of all its plugins."""
        return frozenset[str]().union(*(plugin.capabilities for plugin in self.plugins))

    def dump(self) -> Json:
        """As a list, to be kept; `parse` gives the same network again."""
        return {
            "name": self.name,
            "cniVersion": self.versions[0],
            "cniVersions": list(self.versions),
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "plugins": [plugin.conf for plugin in self.plugins],
        }


@dataclass(frozen=True, slots=True)
class Directory:
    """What a directory of configurations holds."""

    networks: tuple[Network, ...]
    """In the order of their files; the first is the default."""
    problems: tuple[str, ...]
    """What is wrong with the others, one sentence each."""

    def find(self, name: str | None) -> Network:
        """The network of that name, or the default. Raises NetworkError when there is none; names those."""
        for network in self.networks:
            if name is None or network.name == name:
                return network
        there = ", ".join(network.name for network in self.networks) or "none"
        wrong = f" {self.problems[0]}" if self.problems else ""
        wanted = "a default" if name is None else f"{name}"
        raise NetworkError(f"There is no CNI network {wanted}; configured: {there}.{wrong}", networks=there)


def load(directory: Path) -> Directory:
    """Read all configurations of a directory, in the order of their names. Blocking.

    What cannot be used is a problem and hides nothing else. A directory that is missing is empty.
    """
    networks: dict[str, Network] = {}
    problems: list[str] = []
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    except OSError as exc:
        return Directory((), (f"{directory} cannot be read: {exc.strerror}.",))
    if len(files) > MAX_FILES:
        problems.append(f"{directory} has more than {MAX_FILES} configurations; the rest is not read.")
    for path in files[:MAX_FILES]:
        try:
            network = parse(_read(path))
        except (OSError, ValueError) as exc:
            problems.append(f"{path}: {exc.strerror if isinstance(exc, OSError) else exc}.")
            continue
        if networks.setdefault(network.name, network) is not network:
            problems.append(f"{path}: there is a network {network.name} in a file before it.")
    return Directory(tuple(networks.values()), tuple(problems))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def parse(data: bytes) -> Network:
    """A configuration, list or single. Raises ValueError, saying what is wrong."""
    return from_json(json_object(data))


def from_json(conf: Json) -> Network:
    """As `parse`, of what is JSON already."""
    name = conf.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("'name' must be letters, digits, '_', '.' and '-'")
    plugins = conf.get("plugins", [conf])
    if not isinstance(plugins, list) or not 1 <= len(plugins) <= MAX_PLUGINS:
        raise ValueError(f"'plugins' must be a list of 1 to {MAX_PLUGINS}")
    return Network(
        name=name,
        versions=_versions(conf),
        plugins=tuple(_plugin(plugin) for plugin in plugins),
        disable_check=_flag(conf, "disableCheck"),
        disable_gc=_flag(conf, "disableGC"),
    )


def _plugin(conf: Any) -> Plugin:
    kind = conf.get("type") if isinstance(conf, dict) else None
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise ValueError(
            "each plugin must have a 'type', which is the name of a program without its directory"
        )
    return Plugin(kind, conf)


def _versions(conf: Json) -> tuple[str, ...]:
    listed = conf.get("cniVersions", [])
    allowed = [conf.get("cniVersion"), *(listed if isinstance(listed, list) else ())]
    usable = tuple(version for version in reversed(VERSIONS) if version in allowed)
    if not usable:
        raise ValueError(f"'cniVersion' must be one of {', '.join(VERSIONS)}")
    return usable


def _flag(conf: Json, name: str) -> bool:
    """A boolean, which old configurations write as a string."""
    return conf.get(name) in (True, "true")


def json_object(data: bytes) -> Json:
    """An object in JSON. Raises ValueError, saying what is wrong."""
    try:
        value = json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _refuse(constant: str) -> None:
    """NaN and the like, which Python would take and others would not."""
    raise ValueError(constant)


def configure(
    network: Network,
    plugin: Plugin,
    version: str,
    *,
    runtime: Mapping[str, Any] = {},
    previous: Json | None = None,
    extra: Mapping[str, Any] = {},
) -> Json:
    """What a plugin of a network gets on its standard input.

    Args:
        network: The network.
        plugin: One of its plugins.
        version: The version that was agreed on.
        runtime: By capability, what is known at run time; the plugin gets those that it declares.
        previous: The result of the plugin before it, or of the whole ADD.
        extra: Further fields.
    """
    conf = plugin.conf | {"name": network.name, "cniVersion": version} | dict(extra)
    conf.pop("cniVersions", None)
    if wanted := {key: value for key, value in runtime.items() if key in plugin.capabilities}:
        conf["runtimeConfig"] = wanted
    if previous is not None:
        conf["prevResult"] = previous
    return conf


def agree(network: Network, spoken: Mapping[str, Sequence[str]]) -> str:
    """The newest version that the configuration allows and all plugins speak.

    Args:
        network: The network.
        spoken: By plugin type, the versions that it says it speaks.

    Raises:
        NetworkError: There is none; says who speaks what.
    """
    for version in network.versions:
        if all(version in spoken[plugin.type] for plugin in network.plugins):
            return version
    said = "; ".join(f"{name} speaks {', '.join(versions) or 'none'}" for name, versions in spoken.items())
    raise NetworkError(
        f"CNI network {network.name} wants version {' or '.join(network.versions)}; {said}. "
        "Change its cniVersion, or install other plugins.",
        network=network.name,
    )


def newer(version: str, than: str) -> bool:
    """Whether *version* is *than* or later; both of `VERSIONS`."""
    return VERSIONS.index(version) >= VERSIONS.index(than)
