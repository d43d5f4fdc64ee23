"""What CNI plugins answer: results, errors and versions, of any version, as one model. Pure.

A plugin is a program of somebody else: everything is bounded, and nothing is taken that does not fit.

Source: https://www.cni.dev/docs/spec/, section 5.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from vcnode.drivers.network.cni.config import VERSIONS, Json, json_object
from vcnode.models.network import DnsConfig

MAX_WORDS = 500
"""Characters of a plugin's own words that are passed on."""
_DOMAIN = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?")
_OPTION = re.compile(r"[a-z0-9:._-]{1,64}")


def _interface(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be an address with prefix length")
    return str(ipaddress.ip_interface(value))


def _network(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a network with prefix length")
    return str(ipaddress.ip_network(value, strict=False))


def _address(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError("must be an address")
    return str(ipaddress.ip_address(value))


Text = Annotated[str, StringConstraints(max_length=4096)]
InterfaceText = Annotated[str, BeforeValidator(_interface)]
NetworkText = Annotated[str, BeforeValidator(_network)]
AddressText = Annotated[str | None, BeforeValidator(_address)]


class Answer(BaseModel):
    """Base of what plugins say; what is not known is ignored, and null is as good as absent."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, strict=True)


class Interface(Answer):
    """An interface that a plugin has made."""

    name: Annotated[str, StringConstraints(max_length=255)] = ""
    mac: Annotated[str, StringConstraints(max_length=128)] = ""
    mtu: int | None = Field(default=None, ge=0, le=1 << 31)
    sandbox: Text | None = None
    """The namespace that it is in; None or empty: the host's."""


class Address(Answer):
    """An address that was given."""

    address: InterfaceText
    """With prefix length."""
    gateway: AddressText = None
    interface: int | None = Field(default=None, ge=-1, le=1024)
    """Index among the interfaces."""


class ResultRoute(Answer):
    """A route that was made."""

    dst: NetworkText
    gw: AddressText = None
    mtu: int | None = Field(default=None, ge=0, le=1 << 31)
    priority: int | None = Field(default=None, ge=0, lt=1 << 32)


class Dns(Answer):
    """Name resolution of the network."""

    nameservers: tuple[Text, ...] | None = Field(default=None, max_length=64, strict=False)
    domain: Text | None = None
    search: tuple[Text, ...] | None = Field(default=None, max_length=64, strict=False)
    options: tuple[Text, ...] | None = Field(default=None, max_length=64, strict=False)

    def config(self) -> DnsConfig:
        """As pods have it; what is no address, domain or option is left out."""
        domains = [self.domain, *(self.search or ())]
        return DnsConfig(
            servers=tuple(dict.fromkeys(a for s in self.nameservers or () if (a := _valid_address(s))))[:8],
            search=tuple(dict.fromkeys(d for d in domains if d and _DOMAIN.fullmatch(d)))[:32],
            options=tuple(dict.fromkeys(o for o in self.options or () if _OPTION.fullmatch(o)))[:16],
        )


class Result(Answer):
    """The result of an ADD."""

    version: str = Field(alias="cniVersion")
    interfaces: tuple[Interface, ...] | None = Field(default=None, max_length=64, strict=False)
    ips: tuple[Address, ...] | None = Field(default=None, max_length=256, strict=False)
    routes: tuple[ResultRoute, ...] | None = Field(default=None, max_length=1024, strict=False)
    dns: Dns | None = None

    def addresses_of(self, name: str) -> tuple[Address, ...]:
        """Addresses of the sandbox's interface of that name."""
        interfaces = self.interfaces or ()
        return tuple(
            ip
            for ip in self.ips or ()
            if ip.interface is not None
            and 0 <= ip.interface < len(interfaces)
            and interfaces[ip.interface].name == name
            and interfaces[ip.interface].sandbox
        )


class Failure(Answer):
    """A plugin's own words about its failure."""

    code: int = Field(ge=0, lt=1 << 32)
    msg: str = ""
    details: str | None = None

    @property
    def words(self) -> str:
        """One line for people."""
        return printable("; ".join(part for part in (self.msg, self.details) if part)) or "no message"


class Spoken(Answer):
    """The answer to VERSION."""

    supported: tuple[Annotated[str, StringConstraints(max_length=32)], ...] = Field(
        alias="supportedVersions", max_length=64, strict=False
    )


def parse_result(data: bytes) -> tuple[Json, Result]:
    """A result as it came, for the next plugin, and as a model.

    Raises:
        ValueError: It is none; says why.
    """
    raw = json_object(data)
    try:
        result = Result.model_validate(raw)
    except ValidationError as exc:
        raise ValueError(_first(exc)) from exc
    if result.version not in VERSIONS:
        raise ValueError(f"its cniVersion is {printable(result.version)!r}")
    for ip in result.ips or ():
        if ip.interface is not None and ip.interface >= len(result.interfaces or ()):
            raise ValueError(f"address {ip.address} is of an interface that is not listed")
    return raw, result


def parse_failure(data: bytes) -> Failure | None:
    """What a plugin says about its failure; None when it says nothing that makes sense."""
    try:
        return Failure.model_validate(json_object(data))
    except ValueError:
        return None


def parse_spoken(data: bytes) -> Sequence[str]:
    """Versions that a plugin speaks. Raises ValueError when that is no answer to VERSION."""
    try:
        return Spoken.model_validate(json_object(data)).supported
    except ValidationError as exc:
        raise ValueError(_first(exc)) from exc


def printable(text: str) -> str:
    """Foreign words in one bounded line, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MAX_WORDS]).split())
    return line if len(line) <= MAX_WORDS else f"{line[:MAX_WORDS]}…"


def _valid_address(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return printable(f"{place}: {first['msg']}")
