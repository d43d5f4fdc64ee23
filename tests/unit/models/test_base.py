import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vcnode.models.base import Blob, HostPath, Id, ImageName, Labels, Reply, Request

ids = TypeAdapter(Id)
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789_-"


def accepts(kind, value) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


@given(st.text(ALPHABET, min_size=1, max_size=70))
def test_ids_are_the_alphabet_with_plain_ends_and_at_most_64(text):
    plain_ends = text[0] not in "_-" and text[-1] not in "_-"
    assert accepts(Id, text) is (plain_ends and len(text) <= 64)


@given(st.text(max_size=70))
def test_any_id_is_a_safe_subject_token_and_file_name(text):
    if accepts(Id, text):
        assert re.fullmatch(r"[a-z0-9_-]{1,64}", text)


@pytest.mark.parametrize(
    "text", ["", "a.b", "A", "a b", "a/b", "a*", ">", "a\n", "-a", "a-", "ä", "a\0", ".", "a" * 65]
)
def test_odd_ids_are_refused(text):
    assert not accepts(Id, text)


@pytest.mark.parametrize("value", [1, None, ["a"]])
def test_ids_are_strings(value):
    assert not accepts(Id, value)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("/a", True),
        ("/", True),
        ("a", False),
        ("", False),
        ("/a\0", False),
        ("/" + "a" * 4095, False),
        ("/\n", True),
    ],
)
def test_host_paths_are_absolute_bounded_and_without_nul(text, good):
    assert accepts(HostPath, text) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("busybox", True),
        ("registry.example:5000/team/app:1.2", True),
        ("app@sha256:" + "0" * 64, True),
        ("", False),
        ("-x", False),
        ("../x", False),
        ("Upper", False),
        ("a b", False),
        ("a" * 256, False),
    ],
)
def test_image_names(text, good):
    assert accepts(ImageName, text) is good


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        ({}, True),
        ({"team/app.kubernetes-io_x": "anything at all"}, True),
        ({"": "x"}, False),
        ({"-a": "x"}, False),
        ({"a": 1}, False),
        ({"a": "x" * 257}, False),
        ({f"k{n}": "" for n in range(64)}, True),
        ({f"k{n}": "" for n in range(65)}, False),
    ],
)
def test_labels(labels, good):
    assert accepts(Labels, labels) is good


@given(st.binary(max_size=200))
def test_blob_carries_any_bytes(raw):
    again = Blob.model_validate_json(Blob.of(raw).model_dump_json())
    assert again.raw == raw


@given(st.text(st.characters(codec="utf-8"), max_size=50))
def test_blob_shows_text_as_text(text):
    blob = Blob.of(text.encode())
    assert (blob.data, blob.encoding) == (text, "utf-8")


@pytest.mark.parametrize(
    "fields",
    [
        {"data": "not base64!", "encoding": "base64"},
        {"data": "YQ", "encoding": "base64"},
        {"data": "YQ==\n", "encoding": "base64"},
        {"data": "ä", "encoding": "base64"},
        {"data": "\ud800"},
        {"data": "x", "encoding": "latin-1"},
        {"data": "x", "more": 1},
    ],
)
def test_blob_that_cannot_be_decoded_is_refused(fields):
    with pytest.raises(ValidationError):
        Blob.model_validate(fields)


def test_blob_of_binary_is_base64():
    assert Blob.of(b"\xff\0") == Blob(data=base64.b64encode(b"\xff\0").decode(), encoding="base64")


def test_requests_refuse_and_replies_ignore_what_they_do_not_know():
    class Ask(Request):
        count: int

    class Answer(Reply):
        count: int

    assert Answer.model_validate({"count": 1, "new": 2}).count == 1
    for bad in ({"count": 1, "new": 2}, {"count": "1"}, {"count": 1.0}, {"count": True}, {}):
        with pytest.raises(ValidationError):
            Ask.model_validate(bad)
