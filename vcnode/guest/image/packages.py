"""Debian packages by name, through the host's own apt: what there is, what we need, and the files.

apt has verified the index (signatures); the index has each package's SHA-256, which we check.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from vcnode.guest.image.errors import GuestImageError, IndexOutdatedError

_QUERY_TIMEOUT_S = 120.0
_DOWNLOAD_TIMEOUT_S = 3600.0
_UPDATE = "run 'apt-get update' as root, then build again"

_PARTIAL = "partial-"

_KERNEL_META = {
    "x86_64": ("linux-image-amd64", "linux-image-virtual"),
    "aarch64": ("linux-image-arm64", "linux-image-virtual"),
}
"""Names of the package that depends on the newest kernel: Debian's, Ubuntu's."""
_LIBRARIES = re.compile(r"(libc6|zlib1g|libexpat1|libffi\d+)(t64)?")
"""Of all libraries that Python and its extensions name, those that the agent's modules are linked with."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package as apt's index has it."""

    name: str
    version: str
    architecture: str
    sha256: str
    """Digest of the .deb, hex."""
    size_bytes: int
    depends: tuple[tuple[str, ...], ...] = ()
    """Names, without versions; each group is a choice. Pre-dependencies come first."""

    @property
    def file_name(self) -> str:
        """Name of the .deb in the cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Index(Protocol):
    """Where packages come from."""

    def lookup(self, names: Sequence[str]) -> dict[str, Package]:
        """The versions that would be installed; absent names are left out."""
        ...

    def download(self, packages: Sequence[Package], directory: Path, report: Callable[[float], None]) -> None:
        """Put the .deb files into *directory*, under any name; *report* hears the share done, 0 to 1."""
        ...

    def refresh(self) -> bool:
        """Get newer lists of packages; False if this user may not."""
        ...


class Apt:
    """The host's apt, with whatever sources the host is set up with.

    Args:
        cache_dir: Where to keep the index in the form that apt reads quickly (37 MB). Containers are commonly
            set up not to keep it in its usual place, and other users than root cannot: apt would make it anew
            for each question, which takes it a second.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir

    def lookup(self, names: Sequence[str]) -> dict[str, Package]:
        """Ask apt-cache; nothing goes over the network.

        Raises:
            GuestImageError: There is no apt, or it fails.
        """
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise GuestImageError(f"{self._cache_dir} cannot be made ({exc.strerror}).") from exc
        index = self._cache_dir.absolute() / "pkgcache.bin"
        options = ["-o", f"Dir::Cache::pkgcache={index}", "-o", "Dir::Cache::srcpkgcache="]
        done = _run(["apt-cache", *options, "show", "--no-all-versions", *names], _QUERY_TIMEOUT_S)
        if done.returncode not in (0, 100):  # 100: none of the names is known
            raise GuestImageError(f"apt-cache failed: {_last_line(done.stderr)}.")
        return parse_stanzas(done.stdout)

    def download(self, packages: Sequence[Package], directory: Path, report: Callable[[float], None]) -> None:
        """Let apt-get fetch exactly these versions. Any user may.

        Raises:
            GuestImageError: It failed; usually the lists are older than the archive.
        """
        read_end, write_end = os.pipe()
        # Bounded by a program of its own, for the loop below waits for apt's next word without a limit.
        command = ["timeout", "-k", "10", str(_DOWNLOAD_TIMEOUT_S), "apt-get", "-qq", "download"]
        command += ["-o", f"APT::Status-Fd={write_end}", "-o", "Acquire::Retries=3"]
        command += [f"{package.name}={package.version}" for package in packages]
        with tempfile.TemporaryFile() as errors, os.fdopen(read_end) as status:
            try:
                process = _start(command, directory, errors, write_end)
            finally:
                os.close(write_end)
            with process:
                try:
                    for line in status:
                        if (share := parse_status(line)) is not None:
                            report(share)
                except BaseException:  # an interrupt from the terminal does not reach what `timeout` runs
                    process.terminate()
                    raise
            if process.returncode != 0:
                errors.seek(0)
                reason = _last_line(errors.read().decode(errors="replace"))
                raise IndexOutdatedError(f"apt-get could not download the packages ({reason}): {_UPDATE}.")

    def refresh(self) -> bool:
        """Run ``apt-get update``, if this is root.

        Raises:
            GuestImageError: It failed.
        """
        if os.geteuid() != 0:
            return False
        done = _run(["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "update"], _DOWNLOAD_TIMEOUT_S)
        if done.returncode != 0:
            raise GuestImageError(f"'apt-get update' failed: {_last_line(done.stderr)}.")
        return True


def parse_status(line: str) -> float | None:
    """The share done, 0 to 1, in a line of ``APT::Status-Fd``; None for other lines.

    Source: apt, README.progress-reporting (``dlstatus:item:percent:text``).
    """
    parts = line.split(":", 3)
    if len(parts) < 3 or parts[0] != "dlstatus":
        return None
    try:
        return min(max(float(parts[2]) / 100, 0.0), 1.0)
    except ValueError:
        return None


def parse_stanzas(text: str) -> dict[str, Package]:
    """Packages in the output of ``apt-cache show``; those that no archive offers (no digest) are left out."""
    packages: dict[str, Package] = {}
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            name, separator, value = line.partition(":")
            if separator and not line[0].isspace():
                fields[name.lower()] = value.strip()
        if not {"package", "version", "architecture", "sha256", "size"} <= fields.keys():
            continue
        depends = parse_depends(fields.get("pre-depends", "")) + parse_depends(fields.get("depends", ""))
        package = Package(
            fields["package"],
            fields["version"],
            fields["architecture"],
            fields["sha256"],
            int(fields["size"]),
            depends,
        )
        packages.setdefault(package.name, package)
    return packages


def parse_depends(field: str) -> tuple[tuple[str, ...], ...]:
    """Names in a dependency field: ``a (>= 1), b:any | c`` is ``(("a",), ("b", "c"))``."""
    groups = (group.split("|") for group in field.split(",") if group.strip())
    return tuple(
        tuple(re.split(r"[\s:(\[<]", name.strip(), maxsplit=1)[0] for name in group) for group in groups
    )


@dataclass(frozen=True, slots=True)
class Selection:
    """The packages that an image is made of, by what they are for."""

    kernel: tuple[Package, ...]
    """Kernel image and, on Ubuntu, its modules."""
    python: tuple[Package, ...]
    """Interpreter, standard library, shared libraries."""
    busybox: Package

    def all(self) -> tuple[Package, ...]:
        """Every package, in the order of names."""
        return tuple(sorted((*self.kernel, *self.python, self.busybox), key=lambda package: package.name))


def select(index: Index) -> Selection:
    """Find the packages of the host's release.

    Raises:
        GuestImageError: The index lacks one; says to update it.
    """
    names = _KERNEL_META.get(machine := platform.machine())
    if names is None:
        raise GuestImageError(f"There are no guests for the architecture {machine}.")
    roots = index.lookup((*names, "python3-minimal", "busybox-static"))
    meta = next((roots[name] for name in names if name in roots), None)
    if meta is None:
        raise IndexOutdatedError(f"apt knows no kernel package ({' or '.join(names)}): {_UPDATE}.")
    python = _one(_require(roots, "python3-minimal"), r"python3\.\d+-minimal")
    kernel = _one(meta, r"linux-image-\d.*")
    core = index.lookup((kernel, python, f"lib{python}", f"lib{python.removesuffix('-minimal')}-stdlib"))
    kernel_packages = [_require(core, kernel)]
    python_packages = [_require(core, name) for name in core if name != kernel]
    if len(python_packages) != 3:
        raise IndexOutdatedError(f"apt does not know all parts of {python}: {_UPDATE}.")
    more_kernel = _matching(kernel_packages, re.compile(r"linux-modules-\d.*"))
    libraries = _matching(python_packages, _LIBRARIES)
    rest = index.lookup((*more_kernel, *libraries))
    return Selection(
        kernel=(*kernel_packages, *(_require(rest, name) for name in more_kernel)),
        python=(*python_packages, *(_require(rest, name) for name in libraries)),
        busybox=_require(roots, "busybox-static"),
    )


def _one(package: Package, pattern: str) -> str:
    names = _matching([package], re.compile(pattern))
    if not names:
        raise GuestImageError(
            f"The package {package.name} {package.version} depends on nothing like {pattern}."
        )
    return names[0]


def _matching(packages: Iterable[Package], pattern: re.Pattern[str]) -> list[str]:
    found = {
        name for package in packages for group in package.depends for name in group if pattern.fullmatch(name)
    }
    return sorted(found)


def _require(found: dict[str, Package], name: str) -> Package:
    if name not in found:
        raise IndexOutdatedError(f"apt does not know the package {name}: {_UPDATE}.")
    return found[name]


def fetch(
    index: Index,
    packages: Sequence[Package],
    cache_dir: Path,
    *,
    offline: bool,
    report: Callable[[int, int], None],
) -> dict[str, Path]:
    """Make sure that the cache holds *packages*; returns the file of each, by name.

    Files are checked against the index's digests, so a damaged one is fetched again. *report* hears bytes
    done and bytes in all.

    Raises:
        GuestImageError: A download failed, or *offline* and a package is not in the cache.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if _digest_of(cache_dir / package.file_name) != package.sha256]
    total = sum(package.size_bytes for package in packages)
    absent = sum(package.size_bytes for package in missing)
    report(total - absent, total)
    if missing:
        if offline:
            raise GuestImageError(
                f"Not in the package cache {cache_dir}: {', '.join(p.name for p in missing)}."
            )
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=cache_dir) as partial:
            index.download(
                missing, Path(partial), lambda share: report(total - absent + int(absent * share), total)
            )
            arrived = {_digest_of(path): path for path in Path(partial).glob("*.deb")}
            for package in missing:
                if package.sha256 not in arrived:
                    raise IndexOutdatedError(
                        f"What apt downloaded as {package.name} differs from apt's index: {_UPDATE}."
                    )
                arrived[package.sha256].replace(cache_dir / package.file_name)
        report(total, total)
    return {package.name: cache_dir / package.file_name for package in packages}


def prune(cache_dir: Path, keep: Iterable[Package]) -> None:
    """Delete cached packages other than *keep*, and what killed downloads left. Needs the lock."""
    names = {package.file_name for package in keep}
    for path in cache_dir.glob("*.deb"):
        if path.name not in names:
            path.unlink(missing_ok=True)
    for directory in cache_dir.glob(f"{_PARTIAL}*"):
        shutil.rmtree(directory, ignore_errors=True)


def _digest_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _start(
    command: Sequence[str], directory: Path, errors: IO[bytes], status_fd: int
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[status_fd],
        )
    except OSError as exc:
        raise GuestImageError(f"{command[0]} cannot be started: the builder needs Debian or Ubuntu.") from exc


def _run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except OSError as exc:
        raise GuestImageError(f"{command[0]} cannot be started: the builder needs Debian or Ubuntu.") from exc
    except subprocess.TimeoutExpired as exc:
        raise GuestImageError(f"{command[0]} took more than {timeout_s:.0f} s.") from exc


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].removeprefix("E: ").rstrip(".")
