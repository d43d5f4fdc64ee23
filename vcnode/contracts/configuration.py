"""The reference of all settings, made from their model."""

from __future__ import annotations

import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vcnode.settings import Group, Settings

_HEAD = """# Configuration

Every setting of a node agent. This page is made from `vcnode/settings.py` by `vcnode contracts generate`; a
check fails when they differ.

Precedence, lowest first: defaults, the TOML file (`vcnode node run --config FILE`), environment variables,
flags. A group's setting is `[nats] url = "…"` in the file and `VCNODE_NATS_URL` in the environment; lists of
groups (`[[pool]]`) stand in the file only. Unknown settings are refused.
"""


def render() -> str:
    """The whole page."""
    lines = [_HEAD, "## The node", ""]
    groups: list[tuple[str, str, type[Group]]] = []
    plain: list[tuple[str, FieldInfo]] = []
    for name, field in Settings.model_fields.items():
        group = _group(field.annotation)
        if group is None:
            plain.append((name, field))
        else:
            repeated = get_origin(field.annotation) is tuple
            groups.append((name, f"[[{name}]]" if repeated else f"[{name}]", group))
    lines += _table("", plain)
    for name, heading, group in groups:
        lines += ["", f"## `{heading}`", "", _text(group.__doc__), ""]
        prefix = "" if heading.startswith("[[") else f"{name}_"
        lines += _table(prefix, list(group.model_fields.items()), environment=bool(prefix))
    return "\n".join(lines) + "\n"


def _table(prefix: str, fields: list[tuple[str, FieldInfo]], *, environment: bool = True) -> list[str]:
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in fields:
        inner = _group(field.annotation)
        meaning = _text(field.description)
        if inner is not None:
            meaning += f" Each with: {', '.join(f'`{n}`' for n in inner.model_fields)}."
        variable = f"<br>`VCNODE_{(prefix + name).upper()}`" if environment and inner is None else ""
        rows.append(f"| `{name}`{variable} | {_default(name, field)} | {meaning} |")
    return rows


def _group(annotation: Any) -> type[Group] | None:
    """The group that a setting holds, once or several times."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return typing.cast(type[Group], annotation)
    if get_origin(annotation) in (tuple, types.UnionType) and get_args(annotation):
        return _group(get_args(annotation)[0])
    return None


def _default(name: str, field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "of the host"
    if field.default is PydanticUndefined:
        return "required"
    return _shown(field.default)


def _shown(value: object) -> str:
    if value is None or value == "" or value == () or value == {}:
        return "none"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    if isinstance(value, BaseModel | types.MappingProxyType):
        return "see below"
    return f"`{value}`" if isinstance(value, (str, Path, int, float)) else f"`{value!s}`"


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").replace("``", "`").replace("|", "\\|").split())
