"""Logging goes where it was told to, in the form that was asked for."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from vcnode import logs


def test_json_lines_carry_extras_context_and_tracebacks() -> None:
    stream = io.StringIO()
    logs.configure(form="json", level="info", stream=stream)
    with structlog.contextvars.bound_contextvars(command_id="c-1"):
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("vcnode.test").exception("It %s", "failed", extra={"pod": "p1"})
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["logger"]) == ("It failed", "error", "vcnode.test")
    assert (line["pod"], line["command_id"]) == ("p1", "c-1")
    assert "ValueError: broken" in line["exception"]


def test_text_is_one_readable_line() -> None:
    stream = io.StringIO()
    logs.configure(form="auto", level="info", stream=stream)
    logging.getLogger("vcnode.test").info("up")
    assert json.loads(stream.getvalue())["event"] == "up", "no terminal: JSON"
    stream = io.StringIO()
    logs.configure(form="text", level="info", stream=stream)
    logging.getLogger("vcnode.test").info("up", extra={"pod": "p1"})
    assert "up" in stream.getvalue()
    assert "pod=p1" in stream.getvalue()


@pytest.mark.parametrize(("level", "shown"), [("warning", False), ("info", True)])
def test_less_severe_lines_than_asked_for_are_left_out(level: str, shown: bool) -> None:
    stream = io.StringIO()
    logs.configure(form="json", level=level, stream=stream)  # type: ignore[arg-type]
    logging.getLogger("vcnode.test").info("up")
    assert bool(stream.getvalue()) is shown


def test_own_work_is_about_no_command_and_gives_back_what_was_bound() -> None:
    stream = io.StringIO()
    logs.configure(form="json", level="info", stream=stream)
    log = logging.getLogger("vcnode.test")
    with logs.about(command_id="c-1", pod_id="p1"):
        with logs.own_work(**logs.names("p2", "c2")):
            log.info("own")
        log.info("command")
    log.info("neither")
    marks = ("command_id", "pod_id", "container_id")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [{k: line[k] for k in marks if k in line} for line in lines] == [
        {"pod_id": "p2", "container_id": "c2"},
        {"command_id": "c-1", "pod_id": "p1"},
        {},
    ]
    assert logs.names("p1") == {"pod_id": "p1"}
