"""Bad values were refused in the words of the library that found them: "a integer", "tuple should have",
patterns for people, and ``containers.0`` beside ``containers[0]``."""

from __future__ import annotations

import json

import pytest

from vcnode.cli.exits import UsageError
from vcnode.cli.specs import model
from vcnode.client.node import _make
from vcnode.errors import InvalidArgumentError
from vcnode.handlers.decode import decode
from vcnode.models.commands import PodCreate, PodName
from vcnode.models.pod import PodSpec

C = {"image": "b"}


@pytest.mark.parametrize(
    ("pod", "message"),
    [
        ({"resources": {"vcpu_count": 1.5}}, "pod.resources.vcpu_count: must be an integer, not 1.5."),
        ({"containers": [{**C, "cmd": {"args": "ls"}}]}, 'cmd.args: must be an array, not "ls".'),
        ({"containers": [C] * 100}, "pod.containers: must have at most 64 items, not 100."),
        ({"containers": [{"rootfs": "srv", "cmd": {"args": ["a"]}}]}, 'must be an absolute path, not "srv".'),
        ({"containers": [{**C, "cmd": {"args": ["\0"]}}]}, "args[0]: must not contain NUL, not"),
    ],
)
def test_a_refusal_says_what_would_be_right(pod: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode(PodCreate, json.dumps({"pod": pod}).encode())
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        ({"id": "A b"}, "id", "must be 1 to 64 of a-z"),
        ({"nope": 1}, "nope", "is not a known field; known are agent_config, agent_type"),
        (
            {"containers": [{"image": "b", "cmd": {"arg": 1}}]},
            "containers[0].cmd.arg",
            "did you mean 'args'?",
        ),
    ],
)
def test_the_command_line_says_it_in_the_same_words(
    spec: dict[str, object], field: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        model(PodSpec, spec, "The pod is not described right.")
    [violation] = caught.value.details["violations"]
    assert violation["field"] == field
    assert message in violation["message"]


def test_the_client_says_it_in_the_same_words() -> None:
    """Its docstring promises the violations as if the node had refused the request."""
    with pytest.raises(InvalidArgumentError) as caught:
        _make(PodName, pod_id="A b")
    [violation] = caught.value.details["violations"]
    assert violation["field"] == "pod_id"
    assert "must be 1 to 64 of a-z" in violation["message"]
