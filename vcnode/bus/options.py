"""From the settings to what nats-py wants."""

from __future__ import annotations

import base64
import random
import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats.errors
import nkeys  # type: ignore[import-untyped]

from vcnode.errors import InvalidArgumentError
from vcnode.settings import NatsSettings

RETRY_S = (0.5, 1.5)
"""Bounds of the seconds between attempts to connect; see `retry_wait_s`."""
PING_INTERVAL_S = 20
"""A server that does not answer two pings in a row counts as gone."""
MAX_OUTSTANDING_PINGS = 2
PENDING_BYTES = 8 * 1024 * 1024
"""Replies and events kept while there is no connection; more are refused."""
FLUSH_TIMEOUT_S = 10.0

_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\s+(\S+)\s")
_SEED = re.compile(r"-----BEGIN USER NKEY SEED-----\s+(\S+)\s")


class SecretError(nats.errors.Error):
    """A file with a secret is missing or is not what it should be. nats-py tries again later."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


def retry_wait_s() -> float:
    """Seconds until the next attempt to connect, at random: a fleet must not come back in step."""
    return random.uniform(*RETRY_S)  # noqa: S311 -- spreading, not secrecy


def servers(settings: NatsSettings) -> list[str]:
    """The server URLs.

    Raises:
        InvalidArgumentError: A URL that NATS does not know.
    """
    urls = [url.strip() for url in settings.url.split(",") if url.strip()]
    for url in urls:
        scheme = urlsplit(url if "://" in url else f"nats://{url}").scheme
        if scheme not in ("nats", "tls"):
            raise InvalidArgumentError.field(
                "nats.url", f"must begin with nats:// or tls://, not {scheme}://"
            )
    if not urls:
        raise InvalidArgumentError.field("nats.url", "must name a server, such as nats://127.0.0.1:4222")
    return urls


def display(settings: NatsSettings) -> str:
    """The URLs without user, password or token, for logs and messages."""
    return ", ".join(url.rpartition("@")[2] if "@" in url else url for url in settings.url.split(","))


def wants_tls(settings: NatsSettings) -> bool:
    """Whether a connection without TLS must be refused."""
    return bool(
        settings.tls_ca_file
        or settings.tls_cert_file
        or settings.tls_hostname
        or any(url.strip().startswith("tls://") for url in settings.url.split(","))
    )


def connect_options(settings: NatsSettings) -> dict[str, Any]:
    """Keyword arguments for ``nats.aio.client.Client.connect``: servers, limits, TLS and who we are.

    Secrets are read from their files anew for each attempt to connect, so they can be replaced at any time.

    Raises:
        InvalidArgumentError: Settings that contradict each other, or TLS files that cannot be used.
        SecretError: There is no usable nkey seed now.
    """
    options: dict[str, Any] = {
        "servers": servers(settings),
        "connect_timeout": settings.connect_timeout_s,
        "reconnect_time_wait": retry_wait_s(),
        "ping_interval": PING_INTERVAL_S,
        "max_outstanding_pings": MAX_OUTSTANDING_PINGS,
        "pending_size": PENDING_BYTES,
        "flush_timeout": FLUSH_TIMEOUT_S,
        "inbox_prefix": settings.inbox_prefix,
    }
    if wants_tls(settings):
        options["tls"] = _tls_context(settings)
        if settings.tls_hostname:
            options["tls_hostname"] = settings.tls_hostname
    return options | _identity(settings)


def _identity(settings: NatsSettings) -> dict[str, Any]:
    given = [
        name
        for name, value in (
            ("creds_file", settings.creds_file),
            ("nkey_seed_file", settings.nkey_seed_file),
            ("user", settings.user),
            ("token_file", settings.token_file),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise InvalidArgumentError.field(
            f"nats.{given[1]}", f"cannot be combined with nats.{given[0]}: give one way to authenticate"
        )
    if settings.creds_file is not None:
        return _creds(settings.creds_file)
    if settings.nkey_seed_file is not None:
        _key(_read(settings.nkey_seed_file).strip(), settings.nkey_seed_file)
        return {"nkeys_seed": str(settings.nkey_seed_file)}
    if settings.token_file is not None:
        return {"token": _reader(settings.token_file)}
    if settings.user is not None:
        if settings.password_file is None:
            raise InvalidArgumentError.field("nats.password_file", "is required with nats.user")
        return {"user": settings.user, "password": _reader(settings.password_file)}
    return {}


def _creds(path: Path) -> dict[str, Any]:
    # nats-py's own reader of credentials files never ends on a file without the markers (2.16.0,
    # Client._read_creds_user_jwt), and that inside the event loop.
    def part(pattern: re.Pattern[str], what: str) -> str:
        found = pattern.search(_read(path) + "\n")
        if found is None:
            raise SecretError(f"{path} holds no {what}")
        return found.group(1)

    def sign(nonce: str) -> bytes:
        return base64.b64encode(_key(part(_SEED, "user nkey seed"), path).sign(nonce.encode()))

    return {"user_jwt_cb": lambda: part(_JWT, "user JWT").encode(), "signature_cb": sign}


def _key(seed: str, path: Path) -> nkeys.KeyPair:
    try:
        return nkeys.from_seed(bytearray(seed.encode()))
    except Exception as exc:  # nkeys raises its own errors, binascii's and plain ones
        raise SecretError(f"{path} holds no usable nkey seed") from exc


def _reader(path: Path) -> Callable[[], str]:
    return lambda: _read(path).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise SecretError(f"{path} cannot be read ({type(exc).__name__})") from exc


def _tls_context(settings: NatsSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(
            cafile=None if settings.tls_ca_file is None else str(settings.tls_ca_file)
        )
        if settings.tls_cert_file is not None:
            key = None if settings.tls_key_file is None else str(settings.tls_key_file)
            context.load_cert_chain(str(settings.tls_cert_file), key)
    except (OSError, ssl.SSLError) as exc:
        raise InvalidArgumentError.field(
            "nats.tls_ca_file" if settings.tls_cert_file is None else "nats.tls_cert_file",
            f"cannot be used ({exc.strerror or exc})",
        ) from exc
    return context
