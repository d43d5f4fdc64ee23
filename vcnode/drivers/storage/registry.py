"""Fetches images from registries, through skopeo.

Two steps: the manifest first, small, which says what there is to fetch and whether it is here already; then
all of it *by digest*, so that nothing can change in between, into an OCI layout. skopeo compares every blob
with its digest.

Credentials go through a file that only root can read, never through arguments.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vcnode.drivers.base import PullSource
from vcnode.drivers.storage import oci, tools
from vcnode.drivers.storage.signatures import rejection
from vcnode.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
    VcnodeError,
)
from vcnode.models.image import PullProgress
from vcnode.settings import ImageSettings

log = logging.getLogger(__name__)

SKOPEO = "skopeo"
DOCKER_HUB = "docker.io"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_DENIED = re.compile(r"unauthorized|authentication required|access .*denied|forbidden|invalid username", re.I)
_MISSING = re.compile(r"manifest unknown|name unknown|not found|404", re.I)
_AWAY = re.compile(
    r"connection refused|no such host|i/o timeout|timeout|network is unreachable|no route to host|"
    r"connection reset|unexpected EOF|x509|tls:|server gave HTTP response|50[0-9]|toomanyrequests",
    re.I,
)

Progress = Callable[[PullProgress], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Resolved:
    """An image as a registry has it now, for this host's architecture."""

    digest: str
    """Of its manifest."""
    total_bytes: int
    """Of layers and config, as they are fetched."""


def registry_of(reference: str) -> str:
    """The registry that *reference* names, or Docker Hub."""
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else DOCKER_HUB


def by_digest(reference: str, digest: str) -> str:
    """The same repository's image of that manifest digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}@{digest}"


def auth_json(source: PullSource) -> str:
    """The credentials as skopeo reads them; without any, anonymous. Source: containers-auth.json(5)."""
    if source.username is None:
        return json.dumps({"auths": {}})
    secret = base64.b64encode(f"{source.username}:{source.password or ''}".encode()).decode()
    return json.dumps({"auths": {registry_of(source.reference): {"auth": secret}}})


def explain(text: str, reference: str) -> VcnodeError:
    """What skopeo's last words mean to the caller."""
    if (why := rejection(text)) is not None:  # first: its words may hold any of the others
        rule, message = "images.policy_file", f"{reference!r} {why}"
        raised = f"reference: {message} (rule {rule})."
        denial = {"rule": rule, "field": "reference", "message": message}
        return PermissionDeniedError(raised, rule=rule, field="reference", denials=[denial])
    if _DENIED.search(text):
        return InvalidArgumentError(
            f"The registry of {reference!r} refuses these credentials, or wants some.", reference=reference
        )
    if _MISSING.search(text):
        return NotFoundError(f"The registry has no image {reference!r}.", reference=reference)
    if _AWAY.search(text):
        return UnavailableError(
            f"The registry of {reference!r} cannot be reached, or its certificate is not trusted.",
            reference=reference,
        )
    return StorageError(f"Fetching {reference!r} failed; the node's log says why.", reference=reference)


class Registry:
    """Registries, as one node reaches them.

    Args:
        settings: Certificates, credentials, signature policy.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings

    async def resolve(self, source: PullSource, job: Path) -> Resolved:
        """Ask for the manifest.

        Args:
            source: What and as whom.
            job: Directory for temporary files; its owner removes it.

        Raises:
            InvalidArgumentError, NotFoundError, UnavailableError, StorageError: See `explain`.
            oci.BadImageError: It is an image that cannot be used.
        """
        self._prepare(source, job)
        reference = source.reference
        for _ in range(oci.MAX_INDEX_DEPTH):
            raw = await self._inspect(source, reference, job)
            manifest = oci.parse(raw)
            digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
            if "manifests" not in manifest:
                layers, config = oci.contents(manifest)
                return Resolved(digest, config.size + sum(layer.size for layer in layers))
            reference = by_digest(reference, oci.descriptor(oci.choose(manifest)).digest)
        raise oci.BadImageError(f"has indexes nested more than {oci.MAX_INDEX_DEPTH} deep")

    async def fetch(
        self, source: PullSource, resolved: Resolved, job: Path, progress: Progress, *, file_bytes: int
    ) -> Path:
        """Fetch everything into an OCI layout below *job*; returns its path. Raises as `resolve`."""
        layout = job / "layout"

        async def report() -> None:
            done = min(_size_below(layout), resolved.total_bytes)
            await progress(
                PullProgress(phase="downloading", done_bytes=done, total_bytes=resolved.total_bytes)
            )

        await report()
        ended = await self._skopeo(
            source.reference,
            job,
            # The policy has judged the signatures by then; a layout cannot hold them, and skopeo would fail.
            ["copy", "--remove-signatures", "--quiet", *self._options("--src-", job)],
            [f"docker://{by_digest(source.reference, resolved.digest)}", f"oci:{layout}"],
            file_bytes=file_bytes,
            tick_s=self._settings.progress_interval_s,
            on_tick=report,
        )
        self._require(ended, source.reference)
        await report()
        return layout

    def _prepare(self, source: PullSource, job: Path) -> None:
        own = source.username is None and self._settings.auth_file is not None
        if not own:
            fd = os.open(job / "auth.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(auth_json(source))
        if self._settings.policy_file is None:
            policy = {"default": [{"type": "insecureAcceptAnything"}]}
            (job / "policy.json").write_text(json.dumps(policy))

    def _options(self, prefix: str, job: Path) -> list[str]:
        auth = job / "auth.json"
        options = [f"{prefix}authfile", str(auth if auth.exists() else self._settings.auth_file)]
        if self._settings.cert_dir is not None:
            options += [f"{prefix}cert-dir", str(self._settings.cert_dir)]
        return options

    async def _inspect(self, source: PullSource, reference: str, job: Path) -> bytes:
        ended = await self._skopeo(
            source.reference,
            job,
            ["inspect", "--raw", *self._options("--", job)],
            [f"docker://{reference}"],
            file_bytes=oci.MAX_JSON_BYTES,
            output_bytes=oci.MAX_JSON_BYTES + 1,
        )
        self._require(ended, source.reference)
        return ended.raw_output

    async def _skopeo(
        self,
        reference: str,
        job: Path,
        command: list[str],
        operands: list[str],
        *,
        file_bytes: int,
        output_bytes: int = 4096,
        tick_s: float | None = None,
        on_tick: Callable[[], Awaitable[None]] | None = None,
    ) -> tools.ToolExit:
        policy = self._settings.policy_file or job / "policy.json"
        try:
            return await tools.run(
                [SKOPEO, "--policy", str(policy), "--tmpdir", str(job), *command, "--", *operands],
                file_bytes=file_bytes,
                output_bytes=output_bytes,
                env={name: os.environ[name] for name in _PROXIES if name in os.environ},
                tick_s=tick_s,
                on_tick=on_tick,
            )
        except FileNotFoundError as exc:
            raise StorageError(
                f"{SKOPEO} is not installed on this node: install it to pull {reference!r}."
            ) from exc

    @staticmethod
    def _require(ended: tools.ToolExit, reference: str) -> None:
        if ended.returncode:
            error = explain(ended.errors, reference)
            log.warning("%s of %s failed (exit %d): %s", SKOPEO, reference, ended.returncode, ended.errors)
            raise error


def _size_below(layout: Path) -> int:
    """Bytes of the files in *layout*, which another process is filling: what vanishes counts nothing."""
    size = 0
    for directory, _, names in os.walk(layout):
        for name in names:
            try:
                size += os.lstat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue
    return size
