"""CNI plugins that a test writes: small scripts that note how they were called, and then behave or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
RESULT = {"cniVersion": "1.0.0", "interfaces": [], "ips": []}

_SCRIPT = """#!/bin/sh
conf=$(cat)
me=$(basename "$0")
env -u PWD -u SHLVL -u _ -u OLDPWD >"{log}.$$.env"
printf '%s' "$conf" >"{log}.$$.conf"
echo "$me $$" >>"{log}"
case "$CNI_COMMAND" in
VERSION) {version} ;;
ADD) {add} ;;
DEL) {delete} ;;
CHECK) {check} ;;
STATUS) {status} ;;
GC) {gc} ;;
esac
"""


@dataclass(frozen=True)
class Seen:
    """A call as a plugin saw it."""

    plugin: str
    command: str
    env: dict[str, str]
    conf: dict[str, Any]


class Plugins:
    """A directory of plugins and what they have seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / "log"

    def write(self, name: str, *, versions: tuple[str, ...] = VERSIONS, **commands: str) -> None:
        """Make a plugin; *commands* say in shell what it does: add, delete, check, status, gc, version."""
        answer = json.dumps({"cniVersion": "1.0.0", "supportedVersions": versions})
        bodies = {"delete": "exit 0", "check": "exit 0", "status": "exit 0", "gc": "exit 0"}
        bodies |= {"version": f"echo '{answer}'", "add": f"echo '{json.dumps(RESULT)}'"} | commands
        path = self.directory / name
        path.write_text(_SCRIPT.format(log=self._log, **bodies))
        path.chmod(0o755)

    def calls(self, *, versions: bool = False) -> list[Seen]:
        """All calls so far, in order; those of VERSION only when they are asked for."""
        seen = []
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            plugin, pid = line.split()
            text = self._log.with_name(f"log.{pid}.env").read_text()
            env = dict(entry.partition("=")[::2] for entry in text.splitlines())
            conf = json.loads(self._log.with_name(f"log.{pid}.conf").read_text())
            seen.append(Seen(plugin, env["CNI_COMMAND"], env, conf))
        return [call for call in seen if versions or call.command != "VERSION"]

    def names(self) -> list[str]:
        """All calls so far but VERSION, as ``COMMAND plugin``."""
        return [f"{call.command} {call.plugin}" for call in self.calls()]


def failure(code: int, message: str, details: str = "") -> str:
    """Shell of a plugin that fails in good order."""
    said = json.dumps({"cniVersion": "1.0.0", "code": code, "msg": message, "details": details})
    return f"echo '{said}'; exit 1"
