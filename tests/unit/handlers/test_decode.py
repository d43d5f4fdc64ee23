"""Decoding: one clear sentence for every way in which a body can be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.errors import InvalidArgumentError
from vcnode.handlers.decode import MAX_VIOLATIONS, decode
from vcnode.models.base import Request
from vcnode.models.commands import COMMANDS, ContainerExec, Empty, PodCreate, PodList, PodName, PodStop
from vcnode.models.violations import path_of


def violation(model: type[Request], body: bytes) -> tuple[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        decode(model, body)
    first = caught.value.details["violations"][0]
    return first["field"], first["message"]


def test_an_empty_body_counts_as_an_empty_object() -> None:
    assert decode(Empty, b"") == Empty()
    assert decode(PodList, b"") == PodList()


@pytest.mark.parametrize(
    ("model", "body", "field", "words"),
    [
        (PodName, b'{"pod_id": "A.b"}', "pod_id", "1 to 64 of a-z"),
        (PodName, b"{}", "pod_id", "is required"),
        (PodName, b'{"pod_id": 5}', "pod_id", "must be a string, not 5"),
        (PodName, b'{"pod_id": null}', "pod_id", "must be a string, not null"),
        (PodName, b'{"pod_id": "a", "podid": 1}', "podid", "did you mean 'pod_id'?"),
        (Empty, b'{"a": 1}', "a", "takes no fields"),
        (PodCreate, b'{"pod": {"zzz": 1}}', "pod.zzz", "known are agent_config, agent_type, annotations"),
        (
            PodCreate,
            b'{"pod": {"resources": {"mem_size_mib": 1}}}',
            "pod.resources.mem_size_mib",
            "128, not 1",
        ),
        (PodCreate, b'{"pod": {"resources": {"vcpu_count": "2"}}}', "pod.resources.vcpu_count", "integer"),
        (PodCreate, b'{"pod": {"resources": {"vcpu_count": true}}}', "pod.resources.vcpu_count", "integer"),
        (PodCreate, b'{"pod": {"hypervisor_type": "xen"}}', "pod.hypervisor_type", "'qemu' or 'mock'"),
        (
            PodCreate,
            b'{"pod": {"containers": [{"image": "b"}, {"image": "b", "cmd": {"arg": []}}]}}',
            "pod.containers[1].cmd.arg",
            "did you mean 'args'?",
        ),
        (
            PodCreate,
            b'{"pod": {"containers": [{"image": "b", "rootfs": "/x"}]}}',
            "pod.containers[0]",
            "exactly one of 'rootfs' and 'image'",
        ),
        (PodCreate, b'{"pod": {"labels": {"a b": "c"}}}', "pod.labels['a b']", "must match"),
        (PodCreate, b'{"pod": {"labels": []}}', "pod.labels", "not an array"),
        (PodStop, b'{"pod_id": "a", "grace_s": 1e999}', "grace_s", "3600"),
        (ContainerExec, b'{"pod_id": "a", "container_id": "b"}', "cmd", "is required"),
        (
            ContainerExec,
            b'{"pod_id":"a","container_id":"b","cmd":{},"stdin":{"data":"!","encoding":"base64"}}',
            "stdin",
            "data is not valid base64",
        ),
        (PodName, b"[]", "", "must be a JSON object, not an array"),
        (PodName, b"null", "", "must be a JSON object, not null"),
        (PodName, b'"x"', "", "must be a JSON object, not a string"),
        (PodName, b"{", "", "not valid JSON at line 1, column 2"),
        (PodName, b'{"pod_id": "\xff"}', "", "not UTF-8 (byte 12)"),
        (PodName, '{"pod_id": "a"}'.encode("utf-16"), "", "not UTF-8"),
        (PodName, b'\xef\xbb\xbf{"pod_id": "a"}', "", "not valid JSON"),
        (PodName, b'{"pod_id": "\\ud800"}', "", "not valid JSON"),
        (PodName, b'{"pod_id": NaN}', "", "NaN, which is not JSON"),
        (PodStop, b'{"pod_id": "a", "grace_s": -Infinity}', "", "-Infinity, which is not JSON"),
        (PodName, b'{"pod_id": "a", "pod_id": "b"}', "pod_id", "given twice"),
        (PodName, b"[" * 200_000, "", "nested too deeply"),
        (PodName, b'{"pod_id":' * 100_000, "", "nested too deeply"),
        (PodStop, b'{"pod_id": "a", "grace_s": ' + b"9" * 5000 + b"}", "", "not valid JSON"),
    ],
)
def test_a_bad_body_is_explained(model: type[Request], body: bytes, field: str, words: str) -> None:
    where, message = violation(model, body)
    assert where == field
    assert words in message


def test_a_long_value_is_not_echoed_whole() -> None:
    _, message = violation(PodName, json.dumps({"pod_id": "A" * 10_000}).encode())
    assert len(message) < 200


def test_many_violations_are_counted_and_bounded() -> None:
    body = json.dumps({f"f{i}": 1 for i in range(100)} | {"pod_id": "a"}).encode()
    with pytest.raises(InvalidArgumentError) as caught:
        decode(PodName, body)
    assert len(caught.value.details["violations"]) == MAX_VIOLATIONS
    assert "(and 99 more)" in caught.value.message


def test_paths_are_written_as_the_caller_wrote_them() -> None:
    assert path_of(("pod", "containers", 0, "cmd", "args", 2)) == "pod.containers[0].cmd.args[2]"
    assert path_of(("labels", "a.b", "[key]")) == "labels['a.b']"
    assert path_of(()) == ""


def assert_request_or_error(model: type[Request], body: bytes) -> None:
    try:
        request = decode(model, body)
    except InvalidArgumentError as exc:
        error = exc
    else:
        assert isinstance(request, model)
        return
    assert error.message.endswith(".")
    assert error.details["violations"]
    json.dumps(error.details)


@given(body=st.binary(max_size=200), verb=st.sampled_from(sorted(COMMANDS)))
def test_bytes_of_any_kind_give_a_request_or_one_error(body: bytes, verb: str) -> None:
    assert_request_or_error(COMMANDS[verb].request, body)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["pod", "id", "pod_id", "cmd", "args", "containers", "labels", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=_json, verb=st.sampled_from(sorted(COMMANDS)))
def test_json_of_any_shape_gives_a_request_or_one_error(value: object, verb: str) -> None:
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    assert_request_or_error(COMMANDS[verb].request, body)
