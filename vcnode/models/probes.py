"""Probes: how the guest agent finds out whether a container has started, is ready, and still works."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import NoNul, Request

MAX_PROBE_S = 3600.0


class ExecAction(Request):
    """A command in the container, as the main process's user and with its environment; it must end with 0."""

    args: tuple[Annotated[NoNul, StringConstraints(max_length=4096)], ...] = Field(
        min_length=1, max_length=256
    )
    """Program and arguments."""


class TcpAction(Request):
    """A TCP connection, which must come about."""

    port: int = Field(ge=1, le=65_535)
    """Where something listens."""
    host: str = "127.0.0.1"
    """IP address inside the pod; containers share its network."""

    @model_validator(mode="after")
    def _is_address(self) -> Self:
        try:
            ipaddress.ip_address(self.host)
        except ValueError as exc:
            raise ValueError("'host' must be an IP address of the pod") from exc
        return self


class HttpAction(TcpAction):
    """An HTTP GET request, which must be answered with a status from 200 to 399."""

    path: Annotated[str, StringConstraints(pattern=r"^/[\x21-\x7e]*$", max_length=4096)] = "/"
    """Path, with a query if wanted."""
    headers: dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}$")],
        Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$", max_length=256)],
    ] = Field(default={}, max_length=16)
    """Headers besides ``Host``, ``User-Agent`` and ``Connection``; these can be given, too."""

    @property
    def request(self) -> str:
        """What is sent."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = {"Host": f"{host}:{self.port}", "User-Agent": "vcnode", "Connection": "close"}
        given = {name.lower() for name in self.headers}
        kept = {name: value for name, value in lines.items() if name.lower() not in given}
        headers = "".join(f"{name}: {value}\r\n" for name, value in {**kept, **self.headers}.items())
        return f"GET {self.path} HTTP/1.1\r\n{headers}\r\n"


class Probe(Request):
    """What to try, how often, and how often in a row it must succeed or fail to count. Exactly one of
    ``exec``, ``tcp`` and ``http`` is given."""

    exec: ExecAction | None = None
    """A command in the container."""
    tcp: TcpAction | None = None
    """A TCP connection."""
    http: HttpAction | None = None
    """An HTTP request."""
    initial_delay_s: float = Field(default=0.0, ge=0, le=MAX_PROBE_S)
    """Seconds before the first try."""
    period_s: float = Field(default=10.0, ge=0.1, le=MAX_PROBE_S)
    """Seconds from one try to the next."""
    timeout_s: float = Field(default=1.0, ge=0.1, le=MAX_PROBE_S)
    """Seconds after which a try is given up and has failed."""
    success_threshold: int = Field(default=1, ge=1, le=1000)
    """Successes in a row that count; more than 1 for readiness only."""
    failure_threshold: int = Field(default=3, ge=1, le=1000)
    """Failures in a row that count."""

    @model_validator(mode="after")
    def _one_action(self) -> Self:
        if sum(action is not None for action in (self.exec, self.tcp, self.http)) != 1:
            raise ValueError("give exactly one of 'exec', 'tcp' and 'http'")
        return self


class Probes(Request):
    """The probes of a container, named as in Kubernetes."""

    startup: Probe | None = None
    """Until it succeeds, the others are not tried and the container is not ready; when it fails, the
    container is ended."""
    readiness: Probe | None = None
    """Says whether the container is ready; without it, it is as soon as it has started."""
    liveness: Probe | None = None
    """When it fails, the container is ended, and its restart policy says what follows."""

    @model_validator(mode="after")
    def _thresholds(self) -> Self:
        for name in ("startup", "liveness"):
            probe: Probe | None = getattr(self, name)
            if probe is not None and probe.success_threshold != 1:
                raise ValueError(f"'{name}.success_threshold' must be 1")
        return self

    @property
    def gate_readiness(self) -> bool:
        """Whether a container that has just started is not ready yet."""
        return self.startup is not None or self.readiness is not None
