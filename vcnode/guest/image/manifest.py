"""What a built guest image says about itself, and reading it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcnode.guest.image.errors import GuestImageError

FORMAT = 1
KERNEL, INITRD, MANIFEST = "vmlinux", "initrd", "manifest.json"
_MAKE = "make it with 'vcnode guest build'"
_MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A guest image on disk: complete, and with the digests that its manifest says."""

    directory: Path
    digest: str
    """Over all inputs and outputs, hex: equal digests are equal images, wherever they were built."""
    inputs_digest: str
    """Over the inputs alone; another one means that the image is out of date."""
    agent_version: str
    agent_digest: str
    """Over the sources of the guest agent in the image."""
    builder_version: str
    kernel_release: str
    """As ``uname -r`` says in the guest."""
    python_version: str
    packages: Mapping[str, str]
    """Version of each Debian package that went in, by name."""
    build_time: str
    """RFC 3339."""

    @property
    def kernel(self) -> Path:
        """The uncompressed ELF kernel."""
        return self.directory / KERNEL

    @property
    def initrd(self) -> Path:
        """The initramfs archive."""
        return self.directory / INITRD


def canonical(value: Any) -> bytes:
    """The one JSON text of *value*, to make digests of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON text, hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_facts(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def seal(facts: Mapping[str, Any], build_time: str) -> bytes:
    """The manifest's text: *facts*, the digest over them, and the time, which no digest covers."""
    document = {**facts, "digest": digest_of(facts), "build_time": build_time}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def load(directory: Path) -> GuestImage:
    """Read the guest image in *directory* and check that its files are those of the manifest.

    Reads and hashes both files (some 80 MB: 0.1 to 0.4 s).

    Raises:
        GuestImageError: There is none, it was made by another version, or a file is missing or damaged; the
            text says to run ``vcnode guest build``.
    """
    facts = _read(directory)
    try:
        for name in (KERNEL, INITRD):
            _check_file(directory / name, facts["files"][name])
        return GuestImage(
            directory=directory,
            digest=str(facts["digest"]),
            inputs_digest=str(facts["inputs_digest"]),
            agent_version=str(facts["agent_version"]),
            agent_digest=str(facts["agent_digest"]),
            builder_version=str(facts["builder_version"]),
            kernel_release=str(facts["kernel_release"]),
            python_version=str(facts["python_version"]),
            packages={str(package["name"]): str(package["version"]) for package in facts["packages"]},
            build_time=str(facts["build_time"]),
        )
    except (KeyError, TypeError) as exc:
        raise GuestImageError(
            f"The manifest of the guest image in {directory} lacks something: {_MAKE}."
        ) from exc


def _read(directory: Path) -> dict[str, Any]:
    try:
        with (directory / MANIFEST).open("rb") as file:
            facts = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise GuestImageError(f"There is no guest image in {directory}: {_MAKE}.") from exc
    except OSError as exc:
        raise GuestImageError(f"The guest image in {directory} cannot be read ({exc.strerror}).") from exc
    except ValueError as exc:
        raise GuestImageError(f"The manifest of the guest image in {directory} is damaged: {_MAKE}.") from exc
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise GuestImageError(f"The guest image in {directory} was made by another version: {_MAKE} --force.")
    covered = {key: value for key, value in facts.items() if key not in ("digest", "build_time")}
    if digest_of(covered) != facts.get("digest"):
        raise GuestImageError(f"The manifest of the guest image in {directory} was changed: {_MAKE}.")
    return facts


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        with path.open("rb") as file:
            size, digest = path.stat().st_size, ""
            if size == facts["size_bytes"]:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise GuestImageError(f"The guest image lacks {path}: {_MAKE}.") from exc
    except OSError as exc:
        raise GuestImageError(f"The guest image's {path} cannot be read ({exc.strerror}).") from exc
    if digest != facts["sha256"]:
        raise GuestImageError(f"The guest image's {path} is damaged: {_MAKE}.")
