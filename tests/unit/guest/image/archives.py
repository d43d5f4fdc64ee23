"""A package index in memory, and real .deb files to put into it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vcnode.guest.image.errors import IndexOutdatedError
from vcnode.guest.image.packages import Package


def package(name: str, *depends: str, content: bytes | None = None, version: str = "1") -> Package:
    """A package whose .deb is *content*, by default its name."""
    content = name.encode() if content is None else content
    digest = hashlib.sha256(content).hexdigest()
    return Package(name, version, "amd64", digest, len(content), tuple((name,) for name in depends))


class Archive:
    """An `Index` with knobs: contents by package, a count of calls, and what goes wrong."""

    def __init__(self, packages: Sequence[Package], contents: Mapping[str, bytes] | None = None) -> None:
        self.packages = {package.name: package for package in packages}
        self.contents = dict(contents or {})
        self.downloaded: list[str] = []
        self.refreshed = 0
        self.after_refresh: Callable[[], None] | None = None
        """Called by a refresh, which then counts as done; None: this user may not."""
        self.fail_download = False

    def lookup(self, names: Sequence[str]) -> dict[str, Package]:
        """As apt-cache."""
        return {name: self.packages[name] for name in names if name in self.packages}

    def download(self, packages: Sequence[Package], directory: Path, report: Callable[[float], None]) -> None:
        """As apt-get download, under names of its own."""
        if self.fail_download:
            raise IndexOutdatedError("404")
        for number, wanted in enumerate(packages):
            report(number / len(packages))
            self.downloaded.append(wanted.name)
            (directory / f"{number}.deb").write_bytes(self.contents.get(wanted.name, wanted.name.encode()))

    def refresh(self) -> bool:
        """As apt-get update."""
        self.refreshed += 1
        if self.after_refresh is None:
            return False
        self.after_refresh()
        return True


def debian() -> list[Package]:
    """The part of a Debian release that an image needs, as it hangs together there."""
    return [
        package("linux-image-amd64", "linux-image-6.1.0-1-amd64"),
        package("linux-image-6.1.0-1-amd64", "kmod", "linux-base", "initramfs-tools"),
        package("python3-minimal", "python3.11-minimal", "dpkg"),
        package("python3.11-minimal", "libc6", "libpython3.11-minimal", "libexpat1", "zlib1g"),
        package("libpython3.11-minimal", "libc6", "libssl3"),
        package("libpython3.11-stdlib", "libpython3.11-minimal", "libffi8", "libsqlite3-0", "libc6"),
        package("libc6", "libgcc-s1"),
        package("libexpat1", "libc6"),
        package("libffi8", "libc6"),
        package("zlib1g", "libc6"),
        package("busybox-static"),
        package("libsqlite3-0"),
    ]


def make_deb(directory: Path, files: Mapping[str, bytes | str], *, compression: str = "xz") -> Path:
    """A .deb in *directory* with *files* (path to content, or to a link's target given as text)."""
    root = directory / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    for path, content in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.symlink_to(content)
        else:
            target.write_bytes(content)
    deb = directory / "x.deb"
    subprocess.run(
        ["dpkg-deb", f"-Z{compression}", "--build", str(root), str(deb)], check=True, capture_output=True
    )
    return deb
