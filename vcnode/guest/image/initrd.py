"""Put the guest's file tree together."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vcnode.guest.image.cpio import CharDevice, Directory, File, Hardlink, Symlink, Tree
from vcnode.guest.image.errors import GuestImageError
from vcnode.guest.image.modules import ON_DEMAND, WANTED, Module, closure
from vcnode.guest.image.python import AGENT_ROOT

_LIST_TIMEOUT_S = 30.0

_INIT = """\
#!{binary} -ISB
import sys
sys.path[:] = ["{stdlib}", "{stdlib}/lib-dynload", "{agent_root}"]
from vcnode.guest.agent.init import main
main()
"""
"""The kernel starts scripts, with one argument at most. Only directories that exist stay on the path."""


def skeleton() -> Tree:
    """Directories, links and the few files that every guest has."""
    tree = Tree()
    for name in ("bin", "lib", "lib64", "sbin"):
        tree.add(f"/usr/{name}", Directory())
        tree.add(f"/{name}", Symlink(f"usr/{name}"))
    for name in ("dev", "etc", "mnt", "proc", "run", "sys", "var"):
        tree.add(f"/{name}", Directory())
    tree.add("/root", Directory(0o700))
    tree.add("/tmp", Directory(0o1777))  # noqa: S108 - the guest's
    tree.add("/dev/console", CharDevice(5, 1))  # opened by the kernel for init before anything is mounted
    tree.add("/etc/passwd", File(b"root:x:0:0:root:/root:/bin/sh\n"))
    tree.add("/etc/group", File(b"root:x:0:\n"))
    return tree


def add_init(tree: Tree, *, binary: str, stdlib: str) -> None:
    """Add /init, which starts the agent's supervisor as the first process."""
    script = _INIT.format(binary=binary, stdlib=stdlib, agent_root=AGENT_ROOT)
    tree.add("/init", File(script.encode(), 0o755))


def add_description(tree: Tree, *, agent_version: str, kernel: str) -> None:
    """Add /etc/vcnode/image.json, which the agent's hello quotes."""
    text = json.dumps({"agent_version": agent_version, "kernel": kernel}, sort_keys=True)
    tree.add("/etc/vcnode/image.json", File(text.encode() + b"\n"))


def add_modules(tree: Tree, modules: Sequence[Module]) -> None:
    """Add the modules and the lists that say in which order to load them: at boot, and when one is wanted."""
    tree.add("/usr/lib/modules", Directory())
    for module in modules:
        tree.add(f"/usr/lib/modules/{module.name}.ko", File(module.content))
    at_boot = {module.name for module in modules}
    for name in ON_DEMAND:
        later = closure(modules, [name]) - closure(modules, WANTED)
        at_boot -= later
        tree.add(f"/etc/vcnode/modules-{name}", _listing(modules, later))
    tree.add("/etc/vcnode/modules", _listing(modules, at_boot))


def _listing(modules: Sequence[Module], names: Collection[str]) -> File:
    return File("".join(f"{module.name}.ko\n" for module in modules if module.name in names).encode())


def add_busybox(tree: Tree, binary: bytes, applets: Sequence[str]) -> None:
    """Add busybox and a name in /bin for each applet."""
    tree.add("/usr/bin/busybox", File(binary, 0o755))
    taken: Mapping[str, object] = tree.entries()
    for applet in applets:
        if applet != "busybox" and f"/usr/bin/{applet}" not in taken:
            tree.add(f"/usr/bin/{applet}", Hardlink("/usr/bin/busybox"))


def busybox_applets(binary: bytes) -> list[str]:
    """Ask a busybox, which must run on this host, for its applets.

    Raises:
        GuestImageError: It does not run, or names something that is no file name.
    """
    with tempfile.TemporaryDirectory(prefix="vcnode-busybox-") as directory:
        path = Path(directory) / "busybox"
        path.write_bytes(binary)
        path.chmod(0o700)
        try:
            done = subprocess.run(
                [str(path), "--list"],
                capture_output=True,
                encoding="utf-8",
                timeout=_LIST_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as exc:
            raise GuestImageError("The packaged busybox does not run on this host.") from exc
    names = sorted(set(done.stdout.split()))
    if not names or any("/" in name for name in names):
        raise GuestImageError("The packaged busybox does not list its applets.")
    return names
