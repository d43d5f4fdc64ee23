"""What is published of an event."""

from __future__ import annotations

import json
from datetime import timedelta

from tests.unit.client.test_sequences import event
from vcnode.bus.events import event_body


def test_absent_attributes_are_left_out_and_nulls_in_the_data_stay() -> None:
    body = json.loads(event_body(event(1).model_copy(update={"data": {"a": None}}), limit_bytes=10_000))
    assert "commandid" not in body
    assert body["data"] == {"a": None}
    assert body["time"].startswith("2031-05-06T07:08:10")


def test_an_event_beyond_the_limit_keeps_everything_but_its_data() -> None:
    large = event(1).model_copy(update={"data": {"x": "y" * 5000}})
    body = event_body(large, limit_bytes=1000)
    assert len(body) <= 1000
    fields = json.loads(body)
    assert fields["id"] == "n1-1"
    assert fields["data"]["oversized_bytes"] > 5000


def test_message_ids_tell_state_directories_apart() -> None:
    first = event(1)
    assert first.message_id == event(1).message_id
    again = event(1, time=first.time + timedelta(milliseconds=1))
    assert first.message_id != again.message_id
