"""What all models share: strictness, identifiers, and bytes in JSON."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

ID_PATTERN = r"^[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?$"
"""No dots and no upper case: an id is a NATS subject token, a KV key and a file name."""


class Request(BaseModel):
    """Base of what callers send: unknown fields and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    """Base of what the node sends: readers ignore fields that they do not know."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    @property
    def quiet(self) -> bool:
        """Whether a node that was asked among all keeps this to itself."""
        return False

    @functools.cached_property
    def encoded(self) -> bytes:
        """The reply as JSON; made once, since a reply does not change."""
        return self.model_dump_json().encode()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with *update*; pydantic would copy the JSON of the original along."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("encoded", None)
        return copied


Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
PodId = Annotated[Id, Field(description="Pod id: lower case letters, digits, '-' and '_', at most 64.")]
ContainerId = Annotated[
    Id, Field(description="Container id, unique within its pod; same alphabet as pod ids.")
]
NodeName = Annotated[Id, Field(description="Node name; same alphabet as pod ids.")]


class OnHost:
    """Marks a text that names something on the host, wherever in a request it stands: policy judges it."""


ImageName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-z0-9._/:@-]{0,254}$"),
    Field(description="Image name, such as 'busybox' or 'registry.example/team/app:1.2'."),
]
HostPath = Annotated[
    str,
    StringConstraints(pattern=r"^/[^\x00]{0,4094}$"),
    Field(description="Absolute path on the node's host, under one of the node's allowed roots."),
    OnHost(),
]
Labels = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?$")],
        Annotated[str, StringConstraints(max_length=256)],
    ],
    Field(max_length=64),
]
NoNul = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
Moment = AwareDatetime
"""A point in time with its zone; RFC 3339 in JSON."""


class Blob(BaseModel):
    """Bytes in JSON, readable wherever they are text: UTF-8 as it is, anything else as base64."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str = ""
    """The bytes, in the encoding named beside."""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    """How ``data`` holds the bytes."""

    @classmethod
    def of(cls, raw: bytes) -> Blob:
        """Wrap *raw*, as text if it is valid UTF-8."""
        try:
            return cls(data=raw.decode("utf-8"))
        except UnicodeDecodeError:
            return cls(data=base64.b64encode(raw).decode("ascii"), encoding="base64")

    @property
    def raw(self) -> bytes:
        """The bytes themselves."""
        if self.encoding == "utf-8":
            return self.data.encode("utf-8")
        return base64.b64decode(self.data, validate=True)

    @model_validator(mode="after")
    def _decodes(self) -> Blob:
        try:
            _ = self.raw
        except (binascii.Error, UnicodeEncodeError) as exc:
            raise ValueError(f"data is not valid {self.encoding}") from exc
        return self


JsonObject = dict[str, Any]
