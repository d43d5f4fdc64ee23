"""Signatures of images as GPG makes them, in a directory where skopeo looks for them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Signer:
    """Keys and signatures of one test."""

    home: Path
    """GnuPG's directory."""
    top: Path
    """Signatures, keys and skopeo's configuration."""

    def key(self, name: str) -> Path:
        """Make a key; the file with its public half."""
        self._gpg("--passphrase", "", "--quick-gen-key", name, "ed25519", "sign", "never")
        file = self.top / name
        file.write_bytes(self._gpg("--export", name))
        return file

    def sign(self, by: str, reference: str, digest: str, *, kept_for: str | None = None) -> None:
        """Sign that *reference* has *digest* (``sha256:…``); kept as a signature of *kept_for*, or of that.

        Source: containers/image, docs/containers-signature.5.md.
        """
        registry, _, name = reference.rpartition(":")[0].partition("/")
        place = self.top / registry / f"{name}@{(kept_for or digest).replace(':', '=')}"
        place.mkdir(parents=True, exist_ok=True)
        image = {"docker-manifest-digest": digest}
        critical = {
            "type": "atomic container signature",
            "image": image,
            "identity": {"docker-reference": reference},
        }
        claim = json.dumps({"critical": critical, "optional": {}}).encode()
        number = len(list(place.iterdir())) + 1
        (place / f"signature-{number}").write_bytes(self._gpg("--local-user", by, "--sign", given=claim))

    def skopeo(self, registry: str) -> Path:
        """A directory for PATH whose skopeo looks for signatures of *registry* here, not in /etc."""
        known, programs = self.top / "registries.d", self.top / "bin"
        known.mkdir()
        programs.mkdir()
        lookaside = f"docker:\n  {registry}:\n    lookaside: file://{self.top / registry}\n"
        (known / "test.yaml").write_text(lookaside)
        program = programs / "skopeo"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("skopeo")} --registries.d {known} "$@"\n')
        program.chmod(0o755)
        return programs

    def _gpg(self, *arguments: str, given: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", *arguments]
        return subprocess.run(argv, input=given, capture_output=True, check=True, timeout=60).stdout


@contextlib.contextmanager
def signer(top: Path) -> Iterator[Signer]:
    """Sign with files in *top*; GnuPG's agent, which it begins by itself, ends with this."""
    home = Path(tempfile.mkdtemp(prefix="vc-gpg-", dir="/tmp"))  # short enough for the agent's socket
    try:
        yield Signer(home, top)
    finally:
        subprocess.run(
            ["gpgconf", "--kill", "all"], env={**os.environ, "GNUPGHOME": str(home)}, check=True, timeout=60
        )
        shutil.rmtree(home)
