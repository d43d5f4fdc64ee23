import pickle

import pytest

from vcnode import errors
from vcnode.errors import from_code

TABLE = [
    (errors.InvalidArgumentError, "invalid_argument", 400, False),
    (errors.PermissionDeniedError, "permission_denied", 403, False),
    (errors.NotFoundError, "not_found", 404, False),
    (errors.AlreadyExistsError, "already_exists", 409, False),
    (errors.FailedPreconditionError, "failed_precondition", 412, False),
    (errors.AbortedError, "aborted", 409, True),
    (errors.ResourceExhaustedError, "resource_exhausted", 429, True),
    (errors.UnsupportedError, "not_implemented", 501, False),
    (errors.UnavailableError, "unavailable", 503, True),
    (errors.DeadlineExceededError, "deadline_exceeded", 504, False),
    (errors.HypervisorError, "internal", 500, False),
    (errors.AgentError, "internal", 500, False),
    (errors.NetworkError, "internal", 500, False),
    (errors.StorageError, "internal", 500, False),
    (errors.CleanupError, "internal", 500, False),
]


@pytest.mark.parametrize(
    ("cls", "code", "number", "retryable"), TABLE, ids=lambda v: getattr(v, "__name__", "")
)
def test_codes_are_those_of_the_contract(cls, code, number, retryable):
    assert (cls.code, cls.number, cls.retryable) == (code, number, retryable)


def test_the_table_is_complete():
    listed = {cls for cls, *_ in TABLE}
    inner = {errors.RequestError, errors.NodeError, errors.DriverError}
    # Layers above may refine these for their own use; on the wire there are only these.
    ours = {cls for cls in errors._leaves(errors.VcnodeError) if cls.__module__ == errors.__name__}
    assert ours - inner == listed


@pytest.mark.parametrize("cls", [row[0] for row in TABLE if row[1] != "internal"])
def test_code_leads_back_to_the_class(cls):
    error = from_code(cls.code, "Text.", {"a": 1})
    assert type(error) is cls
    assert (error.message, error.details) == ("Text.", {"a": 1})


@pytest.mark.parametrize("code", ["internal", "", "something_new"])
def test_code_that_is_unknown_here_is_an_error_of_the_node(code):
    error = from_code(code, "Text.", {"leftovers": ["x"]})
    assert type(error) is errors.NodeError
    assert error.details == {"leftovers": ["x"]}


def test_state_error_says_which_states_would_do():
    error = errors.FailedPreconditionError.state("Pod p1", "running", ["stopped", "ready"], "start")
    assert error.message == "Pod p1 is running; start needs it to be ready or stopped."
    assert error.details == {"state": "running", "allowed": ["ready", "stopped"]}


def test_state_error_without_a_way_out_still_reads_well():
    assert "another state" in errors.FailedPreconditionError.state("Pod p1", "failed", [], "pause").message


def test_field_error_lists_the_violation():
    error = errors.InvalidArgumentError.field("pod.id", "must be lower case")
    assert error.message == "pod.id: must be lower case"
    assert error.details == {"violations": [{"field": "pod.id", "message": "must be lower case"}]}


def test_cleanup_error_carries_the_leftovers():
    assert errors.CleanupError("Left.", iter(["tap0"]), pod_id="p").details == {
        "leftovers": ["tap0"],
        "pod_id": "p",
    }


def test_text_of_an_error_is_its_message():
    assert str(errors.NotFoundError("No pod p1.")) == "No pod p1."
    assert pickle.loads(pickle.dumps(errors.NotFoundError("No pod p1."))).message == "No pod p1."
