import pytest
from pydantic import ValidationError

from vcnode.models import commands
from vcnode.models.commands import BROADCAST, COMMANDS


def test_every_verb_is_object_dot_action():
    assert all(verb == command.verb and verb.count(".") == 1 for verb, command in COMMANDS.items())


def test_broadcasts_are_commands_that_change_nothing():
    assert all(not COMMANDS[verb].mutates for verb in BROADCAST)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.verb)
def test_requests_refuse_unknown_fields(command):
    with pytest.raises(ValidationError, match="surprise"):
        command.request.model_validate({"surprise": 1})


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.verb)
def test_every_field_is_described(command):
    for model in (command.request, command.reply):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (commands.PodStop, {"pod_id": "p", "grace_s": -1}),
        (commands.PodStop, {"pod_id": "p", "grace_s": float("inf")}),
        (commands.PodStop, {"pod_id": "p", "grace_s": float("nan")}),
        (commands.ContainerKill, {"pod_id": "p", "container_id": "c", "signal": 0}),
        (commands.ContainerKill, {"pod_id": "p", "container_id": "c", "signal": 65}),
        (commands.PodExec, {"pod_id": "p", "cmd": {}, "timeout_s": 0}),
        (commands.ContainerExec, {"pod_id": "p", "cmd": {}}),
        (commands.ImageImport, {"name": "x", "path": "relative"}),
        (commands.PodList, {"states": ["dead"]}),
    ],
)
def test_values_out_of_bounds_are_refused(model, fields):
    with pytest.raises(ValidationError):
        model.model_validate(fields, strict=False)
