"""Container images made by hand, as a directory in the OCI layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vcnode.drivers.storage.oci import architecture

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> Entry:
    """One member of a layer."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.mtime = 1_500_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def layer(*entries: Entry) -> bytes:
    """A layer, plain."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Layout:
    """An OCI layout on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        """Add a blob; its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data), **more}

    def image(
        self, layers: Iterable[bytes], config: Mapping[str, Any] | None = None, suffix: str = "+gzip"
    ) -> dict[str, Any]:
        """Add an image; the descriptor of its manifest."""
        layers = list(layers)
        base = "application/vnd.oci.image"
        document = {
            "architecture": architecture(),
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers],
            },
        }
        packed = [gzip.compress(data, mtime=0) if suffix == "+gzip" else data for data in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{base}.manifest.v1+json",
            "config": self.blob(json.dumps(document).encode(), f"{base}.config.v1+json"),
            "layers": [self.blob(data, f"{base}.layer.v1.tar{suffix}") for data in packed],
        }
        return self.blob(json.dumps(manifest).encode(), f"{base}.manifest.v1+json")

    def index(self, *manifests: Mapping[str, Any]) -> Path:
        """Write the index; the layout is complete."""
        (self.path / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": [dict(m) for m in manifests]})
        )
        return self.path


def layout(
    path: Path, *layers: bytes, config: Mapping[str, Any] | None = None, suffix: str = "+gzip"
) -> Path:
    """A layout of one image."""
    made = Layout(path)
    return made.index(made.image(layers, config, suffix))
