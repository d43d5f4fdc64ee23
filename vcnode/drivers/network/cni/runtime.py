"""What a CNI runtime does: a network's plugins are called in order, each with what the specification wants.

Source: https://www.cni.dev/docs/spec/, sections 2 to 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from vcnode.drivers.network.cni import config, plugins, results
from vcnode.drivers.network.cni.config import Json, Network, Plugin
from vcnode.drivers.network.cni.results import Result
from vcnode.errors import NetworkError
from vcnode.models.vm import Data


class Attachment(Data):
    """One interface of one VM in one network: what ADD gets, and CHECK and DEL again."""

    container_id: str
    """``CNI_CONTAINERID``: the VM's id."""
    if_name: str
    """``CNI_IFNAME``."""
    netns_path: str
    """``CNI_NETNS``."""
    args: tuple[tuple[str, str], ...] = ()
    """``CNI_ARGS``."""
    network: Json
    """The configuration as it was (`Network.dump`): DEL needs it when the file has changed or gone."""
    version: str
    """The version that was agreed on."""
    runtime: Json = Field(default_factory=dict)
    """By capability, what is known at run time."""
    result: Json | None = None
    """What ADD has returned; None: it has not, or not yet."""

    @property
    def conf(self) -> Network:
        """The network."""
        try:
            return config.from_json(self.network)
        except ValueError as exc:
            raise NetworkError(f"The kept configuration of {self.if_name} is damaged: {exc}.") from exc


class Runtime:
    """Calls plugins.

    Args:
        bin_dirs: Where they are; the first that has one wins.
        timeout_s: Seconds that one plugin may take for one call.
    """

    def __init__(self, bin_dirs: Sequence[Path], *, timeout_s: float) -> None:
        self._bin_dirs = tuple(bin_dirs)
        self._timeout_s = timeout_s
        self._spoken: dict[tuple[str, int, int], Sequence[str]] = {}
        """Answers to VERSION by program, its inode and its time of change."""

    async def agree(self, network: Network) -> str:
        """The version to speak with a network's plugins, all of which are asked. Raises NetworkError."""
        spoken = {plugin.type: await self._versions(plugin, network) for plugin in network.plugins}
        return config.agree(network, spoken)

    async def add(self, attachment: Attachment) -> tuple[Json, Result]:
        """ADD, in order.

        Returns:
            The last plugin's result, as it came and as a model.

        Raises:
            NetworkError: A plugin failed; `delete` must be called.
        """
        network = attachment.conf
        previous: Json | None = None
        result: Result | None = None
        for plugin in network.plugins:
            conf = config.configure(
                network, plugin, attachment.version, runtime=attachment.runtime, previous=previous
            )
            output = await self._call("ADD", network, plugin, conf, _env(attachment))
            try:
                previous, result = results.parse_result(output)
            except ValueError as exc:
                raise _error(
                    "ADD", network, plugin, f"answered with what is no result: {exc}", output=output
                ) from exc
        if previous is None or result is None:  # cannot be: there is at least one plugin
            raise NetworkError(f"CNI network {network.name} has no plugin.")
        return previous, result

    async def delete(self, attachment: Attachment, *, netns_exists: bool) -> None:
        """DEL, in reverse; can be repeated, and needs no ADD that succeeded.

        Args:
            attachment: As ADD got it.
            netns_exists: Whether its namespace is still there; plugins are told of none otherwise.

        Raises:
            NetworkError: A plugin failed; those before it were not called.
        """
        network = attachment.conf
        env = _env(attachment)
        if not netns_exists:
            env["CNI_NETNS"] = ""
        previous = attachment.result if config.newer(attachment.version, "0.4.0") else None
        for plugin in reversed(network.plugins):
            conf = config.configure(
                network, plugin, attachment.version, runtime=attachment.runtime, previous=previous
            )
            await self._call("DEL", network, plugin, conf, env)

    async def check(self, attachment: Attachment) -> None:
        """CHECK, in order, where version and configuration have it.

        Raises:
            NetworkError: A plugin says that the network is not as it was, or there was no ADD that succeeded.
        """
        network = attachment.conf
        if network.disable_check or not config.newer(attachment.version, "0.4.0"):
            return
        if attachment.result is None:
            raise NetworkError(f"CNI network {network.name} was not added to {attachment.container_id}.")
        for plugin in network.plugins:
            conf = config.configure(
                network, plugin, attachment.version, runtime=attachment.runtime, previous=attachment.result
            )
            await self._call("CHECK", network, plugin, conf, _env(attachment))

    async def status(self, network: Network, version: str) -> None:
        """STATUS, where the version has it. Raises NetworkError when a plugin cannot take an ADD now."""
        if config.newer(version, "1.1.0"):
            for plugin in network.plugins:
                await self._call("STATUS", network, plugin, config.configure(network, plugin, version), {})

    async def collect(self, network: Network, version: str, valid: Iterable[Attachment]) -> None:
        """GC, where version and configuration have it: what belongs to no *valid* attachment may go.

        All plugins are called, whatever one of them says.

        Raises:
            NetworkError: One of them failed.
        """
        if network.disable_gc or not config.newer(version, "1.1.0"):
            return
        named = [{"containerID": a.container_id, "ifname": a.if_name} for a in valid]
        failed: NetworkError | None = None
        for plugin in network.plugins:
            # The second name is that of an early draft, which some plugins read.
            extra = {"cni.dev/valid-attachments": named, "cni.dev/attachments": named}
            conf = config.configure(network, plugin, version, extra=extra)
            try:
                await self._call("GC", network, plugin, conf, {})
            except NetworkError as exc:
                failed = failed or exc
        if failed is not None:
            raise failed

    # -- one call ------------------------------------------------------------------------------------------

    async def _versions(self, plugin: Plugin, network: Network) -> Sequence[str]:
        program = self._find(network, plugin, "VERSION")
        found = program.stat()
        key = (str(program), found.st_ino, found.st_mtime_ns)
        if key not in self._spoken:
            # Old plugins check what VERSION does not need. Source: libcni, pkg/invoke/exec.go.
            env = {"CNI_CONTAINERID": "dummy", "CNI_NETNS": "dummy", "CNI_IFNAME": "dummy"}
            asked = {"cniVersion": network.versions[0]}
            output = await self._call("VERSION", network, plugin, asked, env)
            try:
                self._spoken[key] = results.parse_spoken(output)
            except ValueError as exc:
                raise _error(
                    "VERSION", network, plugin, f"gave no list of versions: {exc}", output=output
                ) from exc
        return self._spoken[key]

    async def _call(
        self, command: str, network: Network, plugin: Plugin, conf: Json, env: Mapping[str, str]
    ) -> bytes:
        """Call a plugin; returns what it wrote."""
        program = self._find(network, plugin, command)
        everything = {**env, "CNI_COMMAND": command, "CNI_PATH": ":".join(map(str, self._bin_dirs))}
        try:
            ended = await plugins.run(
                program, everything, json.dumps(conf).encode(), timeout_s=self._timeout_s
            )
        except NetworkError as exc:
            exc.details.update(network=network.name, plugin=plugin.type, command=command)
            raise
        if ended.returncode == 0:
            return ended.output
        failure = results.parse_failure(ended.output)
        if failure is not None:
            raise _error(command, network, plugin, f"failed: {failure.words}", code=failure.code)
        how = f"exit code {ended.returncode}" if ended.returncode > 0 else f"signal {-ended.returncode}"
        raise _error(
            command,
            network,
            plugin,
            f"failed with {how} and no error message",
            output=ended.errors or ended.output,
        )

    def _find(self, network: Network, plugin: Plugin, command: str) -> Path:
        for directory in self._bin_dirs:
            program = directory / plugin.type
            if program.is_file() and os.access(program, os.X_OK):
                return program
        where = ", ".join(map(str, self._bin_dirs)) or "no directory"
        raise _error(
            command, network, plugin, f"is not installed in {where}; install it, or set cni.bin_dirs"
        )


def _env(attachment: Attachment) -> dict[str, str]:
    return {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns_path,
        "CNI_IFNAME": attachment.if_name,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in attachment.args),
    }


def _error(
    command: str, network: Network, plugin: Plugin, what: str, *, output: bytes = b"", **details: Any
) -> NetworkError:
    """An error of a plugin, with what it said besides."""
    words = results.printable(output.decode("utf-8", "replace"))
    said = f" ({words})" if words else ""
    return NetworkError(
        f"CNI plugin {plugin.type} of network {network.name} {what}{said}."
        if command == "VERSION"
        else f"{command} of CNI network {network.name}: plugin {plugin.type} {what}{said}.",
        network=network.name,
        plugin=plugin.type,
        command=command,
        **details,
    )
