"""Reads container images as files: OCI image layouts and what ``docker save`` writes. Pure but for reading.

Everything in them is untrusted: sizes and counts are bounded, each file is opened *inside the directory as if
that were the root* (a link cannot lead out of it), and what has a digest is compared with it.

Source: OCI image-spec 1.0 (image-layout.md, image-index.md, manifest.md, config.md); docker image-spec 1.2.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vcnode.drivers.storage import syscalls
from vcnode.models import signals
from vcnode.models.image import ImageConfig

MAX_JSON_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 256
MAX_WORDS = 4096
MAX_WORD_CHARS = 128 * 1024
MAX_INDEX_DEPTH = 4
INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class BadImageError(Exception):
    """The image is damaged, hostile or of an unknown kind; the text says how and is safe to show."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A tar to unpack over the earlier ones."""

    path: str
    """Inside the directory."""
    digest: str | None
    """``sha256:…`` of the file; None where the format has none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an image is put together."""

    layers: tuple[Layer, ...]
    config: ImageConfig
    manifest_digest: str | None
    """Digest of the manifest; None where the format has none."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob by its digest."""

    digest: str
    size: int

    @property
    def path(self) -> str:
        """Where a layout keeps it."""
        return f"blobs/sha256/{self.digest.removeprefix('sha256:')}"


def architecture() -> str:
    """This host's architecture as images call it."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


def open_file(root_fd: int, path: str) -> int:
    """Open a regular file of the image.

    Raises:
        FileNotFoundError: There is none.
        BadImageError: It is something else.
    """
    try:
        fd = syscalls.openat2(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_IN_ROOT)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from exc
        if exc.errno in (errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG, errno.ENXIO):
            raise BadImageError(f"has a file {path!r} that cannot be opened") from exc
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadImageError(f"has something at {path!r} that is not a file")
    return fd


def read(root_fd: int, path: str) -> bytes:
    """All of a small file. Raises as `open_file`, and BadImageError when it is not small."""
    with open(open_file(root_fd, path), "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise BadImageError(f"has a {path!r} of more than {MAX_JSON_BYTES} bytes")
    return data


def plan(root_fd: int) -> Plan | None:
    """How to put the image in the directory *root_fd* together; None when it holds none. Blocking.

    Raises:
        BadImageError: It holds one that cannot be used.
    """
    if _is_layout(root_fd):
        return _plan_layout(root_fd)
    try:
        listed = json.loads(read(root_fd, "manifest.json"))
    except (FileNotFoundError, ValueError, RecursionError, BadImageError):
        return None
    if not (isinstance(listed, list) and all(isinstance(e, dict) and "Layers" in e for e in listed)):
        return None  # a root filesystem may have a file of that name
    return _plan_docker(root_fd, listed)


def _is_layout(root_fd: int) -> bool:
    try:
        marker = json.loads(read(root_fd, "oci-layout"))
    except (FileNotFoundError, ValueError, RecursionError, BadImageError):
        return False
    return isinstance(marker, dict) and "imageLayoutVersion" in marker


def _plan_layout(root_fd: int) -> Plan:
    index = parse(_required(root_fd, "index.json"))
    for _ in range(MAX_INDEX_DEPTH):
        entry = choose(index)
        chosen = descriptor(entry)
        document = parse(_blob(root_fd, chosen))
        if "manifests" not in document:
            return _plan_manifest(root_fd, document, chosen.digest)
        index = document
    raise BadImageError(f"has indexes nested more than {MAX_INDEX_DEPTH} deep")


def _plan_manifest(root_fd: int, manifest: Mapping[str, Any], digest: str) -> Plan:
    layers, config = contents(manifest)
    return Plan(
        layers=tuple(Layer(layer.path, layer.digest) for layer in layers),
        config=image_config(parse(_blob(root_fd, config))),
        manifest_digest=digest,
    )


def _plan_docker(root_fd: int, listed: list[dict[str, Any]]) -> Plan:
    if len(listed) != 1:
        raise BadImageError(f"holds {len(listed)} images; save one at a time")
    paths, config = listed[0].get("Layers"), listed[0].get("Config")
    if not isinstance(paths, list) or not isinstance(config, str) or not 0 < len(paths) <= MAX_LAYERS:
        raise BadImageError("has a broken manifest.json")
    if not all(isinstance(path, str) and path and "\0" not in path for path in paths) or "\0" in config:
        raise BadImageError("has a broken manifest.json")
    return Plan(
        layers=tuple(Layer(path, None) for path in paths),
        config=image_config(parse(_required(root_fd, config))),
        manifest_digest=None,
    )


def choose(index: Mapping[str, Any]) -> dict[str, Any]:
    """The one entry of an index that runs on this host.

    Raises:
        BadImageError: There is none, or several.
    """
    entries = index.get("manifests")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadImageError("has a broken index")
    here = [entry for entry in entries if _runs_here(entry.get("platform"))]
    if len(here) != 1:
        raise BadImageError(f"holds {len(here)} images for linux/{architecture()}; exactly one is needed")
    found: dict[str, Any] = here[0]
    return found


def _runs_here(wanted: object) -> bool:
    if not isinstance(wanted, dict):
        return True
    return wanted.get("os", "linux") == "linux" and wanted.get("architecture") == architecture()


def contents(manifest: Mapping[str, Any]) -> tuple[list[Descriptor], Descriptor]:
    """Layers, lowest first, and config of an image manifest. Raises BadImageError when it is none."""
    layers, config = manifest.get("layers"), manifest.get("config")
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
        raise BadImageError(f"has a manifest without 1 to {MAX_LAYERS} layers")
    return [descriptor(layer) for layer in layers], descriptor(config)


def descriptor(value: object) -> Descriptor:
    """A descriptor out of JSON. Raises BadImageError when it is none that can be used."""
    if isinstance(value, dict):
        digest, size = value.get("digest"), value.get("size")
        if isinstance(digest, str) and _DIGEST.fullmatch(digest) and type(size) is int and size >= 0:
            return Descriptor(digest, size)
    raise BadImageError("has a descriptor without a sha256 digest and a size")


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadImageError when it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BadImageError("has a file that should be JSON and is not") from exc
    if not isinstance(value, dict):
        raise BadImageError("has a file that should be a JSON object and is not")
    return value


def image_config(document: Mapping[str, Any]) -> ImageConfig:
    """What a container obeys of an image's config. Raises BadImageError when it cannot be understood."""
    config = document.get("config") or {}
    if not isinstance(config, dict):
        raise BadImageError("has a broken config")
    workdir = _word(config.get("WorkingDir"), "WorkingDir")
    signal_name = _word(config.get("StopSignal"), "StopSignal")
    env = {}
    for entry in _words(config.get("Env"), "Env"):
        name, _, value = entry.partition("=")
        if not name:
            raise BadImageError("has a config with a nameless variable in Env")
        env[name] = value
    return ImageConfig(
        entrypoint=_words(config.get("Entrypoint"), "Entrypoint"),
        cmd=_words(config.get("Cmd"), "Cmd"),
        env=tuple(env.items()),
        workdir="/" + workdir.lstrip("/") if workdir else None,
        user=_word(config.get("User"), "User") or None,
        stop_signal=signal_number(signal_name) if signal_name else None,
    )


def signal_number(name: str) -> int:
    """The signal that ``SIGTERM``, ``TERM``, ``15`` or ``SIGRTMIN+3`` names. Raises BadImageError."""
    try:
        return signals.signal_number(name)
    except ValueError as exc:
        raise BadImageError(f"has a StopSignal {name[:40]!r}, which is no signal") from exc


def _words(value: object, field: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_WORDS:
        raise BadImageError(f"has a config whose {field} is no list, or too long")
    return tuple(_word(word, field) for word in value)


def _word(value: object, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_WORD_CHARS or "\0" in value:
        raise BadImageError(f"has a config whose {field} holds something else than text")
    return value


def _required(root_fd: int, path: str) -> bytes:
    try:
        return read(root_fd, path)
    except FileNotFoundError as exc:
        raise BadImageError(f"lacks its file {path!r}") from exc


def _blob(root_fd: int, wanted: Descriptor) -> bytes:
    data = _required(root_fd, wanted.path)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != wanted.digest:
        raise BadImageError(f"has a blob {wanted.digest} with other content")
    return data
