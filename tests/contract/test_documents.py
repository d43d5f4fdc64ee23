"""``contracts/`` is what the models say, and complete."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import contracts as contract
from tests.support.cli import vcnode
from vcnode.contracts import documents
from vcnode.contracts.payloads import PAYLOADS
from vcnode.contracts.schemas import schema
from vcnode.errors import VcnodeError, from_code
from vcnode.models.base import Request
from vcnode.models.events import EventKind
from vcnode.models.facts import event_data

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / "contracts"
EXAMPLES = sorted((CONTRACTS / "examples").glob("*/*/*.json"))


def _name(path: Path) -> str:
    return path.parent.name


def test_the_documents_are_what_the_models_say() -> None:
    assert documents.differences(CONTRACTS) == []


async def test_what_differs_is_named_and_made_right(tmp_path: Path) -> None:
    shutil.copytree(CONTRACTS, tmp_path / "c")
    (tmp_path / "docs").mkdir()
    for page in ("configuration.md", "api.md"):
        shutil.copy(ROOT / "docs" / page, tmp_path / "docs")
    (tmp_path / "c/schemas/error.json").write_text("{}")
    (tmp_path / "c/schemas/pod.run.reply.json").unlink()
    (tmp_path / "c/schemas/stray.json").write_text("{}")

    checked = await vcnode("contracts", "generate", "--check", "--out", str(tmp_path / "c"))
    assert checked.code == 1
    assert checked.err.splitlines()[:3] == [
        "schemas/error.json is out of date",
        "schemas/pod.run.reply.json is missing",
        "schemas/stray.json describes nothing that travels",
    ]
    assert (await vcnode("contracts", "generate", "--out", str(tmp_path / "c"))).code == 0
    assert (await vcnode("contracts", "generate", "--check", "--out", str(tmp_path / "c"))).code == 0


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_a_schema_is_valid_and_describes_every_field(name: str) -> None:
    contract.validator(name)
    undescribed: list[str] = []

    def visit(node: Any, where: str) -> None:
        if isinstance(node, dict):
            for field, content in (node.get("properties") or {}).items():
                bare = {"description", "$ref", "const"}.isdisjoint(content)
                if bare and not any("$ref" in part for part in content.get("anyOf", ())):
                    undescribed.append(f"{where}.{field}")
            for key, value in node.items():
                visit(value, f"{where}.{key}")
        elif isinstance(node, list):
            for item in node:
                visit(item, where)

    visit(schema(name), name)
    assert undescribed == []


def test_every_kind_of_event_has_data() -> None:
    assert {kind: event_data(kind) for kind in EventKind}.keys() == set(EventKind)


def test_every_error_code_comes_back_as_itself() -> None:
    def leaves(cls: type[VcnodeError]) -> set[type[VcnodeError]]:
        return {cls}.union(*(leaves(sub) for sub in cls.__subclasses__()))

    for code in {cls.code for cls in leaves(VcnodeError)}:
        assert from_code(code, "x", {}).code == code


def test_every_payload_has_examples_good_and_bad() -> None:
    for folder in ("good", "bad"):
        assert {_name(path) for path in EXAMPLES if path.parts[-3] == folder} == set(PAYLOADS)


def test_examples_of_events_have_no_null_attributes() -> None:
    for path in EXAMPLES:
        if _name(path).startswith("event."):
            assert None not in json.loads(path.read_text()).values(), path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: "/".join(path.parts[-3:]))
def test_an_example_is_what_its_folder_says(path: Path) -> None:
    name, good = _name(path), path.parts[-3] == "good"
    text = path.read_text()
    problem = contract.problem(name, json.loads(text))
    assert (problem is None) == good, problem
    model = PAYLOADS[name].model
    if good:
        model.model_validate_json(text)
    elif issubclass(model, Request):
        with pytest.raises(ValueError, match=re.escape(model.__name__)):
            model.model_validate_json(text)
