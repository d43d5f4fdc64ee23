"""Writes the contract to files, and tells where the files there differ from it."""

from __future__ import annotations

import json
from pathlib import Path

from vcnode.contracts import asyncapi, configuration, reference
from vcnode.contracts.schemas import payloads, schema
from vcnode.models.base import JsonObject

ASYNCAPI = "asyncapi.json"
SCHEMAS = "schemas"
CONFIGURATION = "../docs/configuration.md"
REFERENCE = "../docs/api.md"


def render() -> dict[str, str]:
    """Every file of the contract that is made from the models: path below ``contracts/``, and content."""
    files = {f"{SCHEMAS}/{payload.name}.json": _text(schema(payload.name)) for payload in payloads()}
    files[ASYNCAPI] = _text(asyncapi.document())
    files[CONFIGURATION] = configuration.render()
    files[REFERENCE] = reference.render()
    return files


def _text(content: JsonObject) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def differences(directory: Path) -> list[str]:
    """What is not as `render` would have it, one sentence each."""
    wanted = render()
    found = [
        f"{name} is missing" if not (directory / name).is_file() else f"{name} is out of date"
        for name, text in wanted.items()
        if not (directory / name).is_file() or (directory / name).read_text() != text
    ]
    strays = {f"{SCHEMAS}/{path.name}" for path in (directory / SCHEMAS).glob("*.json")} - wanted.keys()
    return found + [f"{name} describes nothing that travels" for name in sorted(strays)]


def write(directory: Path) -> list[str]:
    """Make *directory* as `render` would have it; returns what differed before."""
    changed = differences(directory)
    wanted = render()
    (directory / SCHEMAS).mkdir(parents=True, exist_ok=True)
    for path in (directory / SCHEMAS).glob("*.json"):
        if f"{SCHEMAS}/{path.name}" not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return changed
