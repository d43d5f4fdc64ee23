from __future__ import annotations

import json

import pytest

from vcnode import errors
from vcnode.cli.exits import BY_CODE, Exit, UsageError, as_json, as_text, exit_code


def all_errors() -> list[type[errors.VcnodeError]]:
    found, todo = [], [errors.VcnodeError]
    while todo:
        cls = todo.pop()
        found.append(cls)
        todo += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_every_error_code_has_an_exit_code(cls: type[errors.VcnodeError]) -> None:
    assert cls.code in BY_CODE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgumentError("x"), 2),
        (errors.NotFoundError("x"), 3),
        (errors.FailedPreconditionError("x"), 4),
        (errors.AlreadyExistsError("x"), 4),
        (errors.AbortedError("x"), 4),
        (errors.UnavailableError("x"), 5),
        (errors.DeadlineExceededError("x"), 5),
        (errors.ResourceExhaustedError("x"), 6),
        (errors.UnsupportedError("x"), 7),
        (errors.PermissionDeniedError("x"), 8),
        (errors.HypervisorError("x"), 1),
        (errors.CleanupError("x", ["y"]), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes_are_those_of_the_table(error: errors.VcnodeError, code: int) -> None:
    assert exit_code(error) == code


def test_a_single_violation_is_not_told_twice() -> None:
    error = errors.InvalidArgumentError.field("pod.id", "must not be empty")

    assert list(as_text(error)) == ["error: pod.id: must not be empty"]


def test_violations_are_listed_and_bounded() -> None:
    many = [{"field": f"f{n}", "message": f"bad {n}."} for n in range(25)]

    lines = list(as_text(UsageError("No.", violations=many)))

    assert lines[:2] == ["error: No.", "  f0: bad 0."]
    assert lines[-1] == "  … and 5 more"
    assert len(lines) == 22


@pytest.mark.parametrize("violations", [None, "x", [1], [{"field": "x"}]])
def test_violations_of_another_shape_do_no_harm(violations: object) -> None:
    assert list(as_text(UsageError("No.", violations=violations))) == ["error: No."]


def test_leftovers_and_error_id_are_told() -> None:
    lines = list(as_text(errors.CleanupError("Left.", ["tap0"], error_id="e1")))

    assert "  left over: tap0" in lines
    assert any("e1" in line for line in lines)


def test_a_deadline_says_that_the_outcome_is_unknown() -> None:
    assert "status" in list(as_text(errors.DeadlineExceededError("Late.")))[1]


def test_json_form_has_the_fields_of_an_error_reply() -> None:
    text = as_json(errors.AbortedError("Held.", pod_id="p"))

    assert "\n" not in text
    assert json.loads(text) == {
        "error": {"code": "aborted", "message": "Held.", "details": {"pod_id": "p"}, "retryable": True}
    }


def test_exec_codes_are_outside_the_table() -> None:
    assert {Exit.EXEC_FAILED, Exit.EXEC_TIMED_OUT}.isdisjoint(BY_CODE.values())
