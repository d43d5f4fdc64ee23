"""The AsyncAPI document, by the AsyncAPI project's own parser, and against the subjects of the code."""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vcnode.contracts import asyncapi
from vcnode.models.commands import BROADCAST, COMMANDS
from vcnode.models.subjects import Subjects

# The parser takes seconds of CPU: on a busy machine that is more than most tests may have.
pytestmark = pytest.mark.timeout(200)

ROOT = Path(__file__).parents[2]


def parse(document: Path) -> subprocess.CompletedProcess[str]:
    node = shutil.which("node")
    assert node, "Node.js is missing: run dev/setup --tests"
    check = ROOT / "dev/npm/check-asyncapi.mjs"
    return subprocess.run([node, check, document], capture_output=True, text=True, timeout=150, check=False)


def test_the_parser_finds_nothing_wrong() -> None:
    result = parse(ROOT / "contracts/asyncapi.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("valid: ")


def test_the_parser_would_find_something(tmp_path: Path) -> None:
    """In one command of the document: the whole of it takes the parser several seconds."""
    for name in ("whole", "lacking"):
        shutil.copytree(ROOT / "contracts/schemas", tmp_path / name / "schemas")
    (tmp_path / "lacking/schemas/pod.run.request.json").unlink()
    document = json.loads((ROOT / "contracts/asyncapi.json").read_text())
    pick(document["operations"], "rpc.pod.run")
    pick(document["channels"], "rpc.pod.run", "pod.run.reply")
    pick(document["components"]["messages"], "pod.run.request", "pod.run.reply", "error")
    files = [
        tmp_path / "whole/asyncapi.json",
        tmp_path / "lacking/asyncapi.json",
        tmp_path / "whole/wrong.json",
    ]
    for file in files[:2]:
        file.write_text(json.dumps(document))
    document["operations"]["rpc.pod.run"]["channel"]["$ref"] = "#/channels/none"
    files[2].write_text(json.dumps(document))
    with ThreadPoolExecutor() as pool:
        assert [result.returncode for result in pool.map(parse, files)] == [0, 1, 1]


def pick(of: dict[str, object], *names: str) -> None:
    """Leave nothing but these."""
    for name in [name for name in of if name not in names]:
        del of[name]


def test_every_subject_is_the_one_that_the_code_uses() -> None:
    subjects = Subjects("P")
    addresses = {
        name: (channel["address"] or "").replace("{prefix}", "P").replace("{node}", "n")
        for name, channel in asyncapi.document()["channels"].items()
    }
    for verb, command in COMMANDS.items():
        assert addresses[f"rpc.{verb}"] == subjects.rpc("n", verb)
        assert addresses.get(f"cmd.{verb}") == (subjects.cmd("n", verb) if command.mutates else None)
        assert addresses.get(f"all.{verb}") == (subjects.everyone(verb) if verb in BROADCAST else None)
    events = {name: address for name, address in addresses.items() if name.startswith("event.")}
    for name, address in events.items():
        filled = address.replace("{pod}", "p").replace("{container}", "c")
        assert f"event.{subjects.parse_event(filled).kind}" == name
    assert addresses["kv.nodes"].startswith(f"$KV.{subjects.node_bucket}.")
    assert addresses["kv.pods"].startswith(f"$KV.{subjects.pod_bucket}.")
