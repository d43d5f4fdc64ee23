"""A real registry on loopback (Debian's docker-registry) with TLS and a password, for one test session."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trustme

USER, PASSWORD = "alice", "wonderland"
# htpasswd -nbB -C 4 alice wonderland
_HTPASSWD = "alice:$2y$04$N2fRcJ4zVvKsrF36UF23tOASVxDm7F45ueY5vkaP3KZUrpWprdPs2\n"
_CONFIG = """
version: 0.1
log: {{level: info, formatter: json, accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {top}/data}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}
auth: {{htpasswd: {{realm: test, path: {top}/htpasswd}}}}
http: {{addr: "127.0.0.1:0", tls: {{certificate: {top}/server.pem, key: {top}/server.key}}}}
"""


@dataclass
class Registry:
    """The running registry."""

    address: str
    cert_dir: Path
    requests: list[str] = field(default_factory=list)
    """Method and path of every request that was answered with success."""

    def push(self, layout: Path, name: str, *options: str) -> str:
        """Push the image of a layout; returns its reference."""
        reference = f"{self.address}/{name}"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", *options]
        command += ["--dest-cert-dir", str(self.cert_dir), "--dest-creds", f"{USER}:{PASSWORD}"]
        command += [f"oci:{layout}", f"docker://{reference}"]
        subprocess.run(command, check=True, timeout=60)
        return reference

    def fetched_blobs(self) -> list[str]:
        """Paths of the blobs that were fetched so far."""
        return [line for line in self.requests if line.startswith("GET ") and "/blobs/sha256" in line]


@contextlib.contextmanager
def running(top: Path) -> Iterator[Registry]:
    """Run a registry with its files in *top*."""
    ca = trustme.CA()
    server = ca.issue_cert("127.0.0.1")
    server.cert_chain_pems[0].write_to_path(top / "server.pem")
    server.private_key_pem.write_to_path(top / "server.key")
    certs = top / "certs"
    certs.mkdir()
    ca.cert_pem.write_to_path(certs / "ca.crt")
    (top / "htpasswd").write_text(_HTPASSWD)
    (top / "config.yml").write_text(_CONFIG.format(top=top))
    process = subprocess.Popen(
        ["docker-registry", "serve", top / "config.yml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": "/usr/bin:/bin", "OTEL_TRACES_EXPORTER": "none"},
    )
    ready = threading.Event()
    registry = Registry("", certs)
    said: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if "listening on" in told.get("msg", ""):
                registry.address = told["msg"].split("listening on ")[1].split(",")[0]
                ready.set()
            if told.get("msg") == "response completed" and told.get("http.response.status") == 200:
                registry.requests.append(f"{told['http.request.method']} {told['http.request.uri']}")
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(30)
        assert registry.address, "".join(said)
        yield registry
    finally:
        process.terminate()
        process.wait(10)
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()
