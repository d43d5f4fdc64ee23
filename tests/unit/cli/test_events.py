from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vcnode.cli.events import line, remark_on, start_of
from vcnode.cli.exits import UsageError
from vcnode.models.events import Event

NOW = datetime(2030, 1, 2, tzinfo=UTC)


def event(kind: str, *, mock: bool = False, **data: Any) -> Event:
    return Event(
        id="n-1",
        source="/vcnode/n",
        type=f"vcnode.{kind}",
        subject="p/c",
        time=NOW,
        sequence="1",
        epoch=1,
        mock=mock,
        data=data,
    )


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
        ("2030-01-01T12:00:00Z", datetime(2030, 1, 1, 12, tzinfo=UTC)),
        ("2030-01-01", datetime(2030, 1, 1, tzinfo=UTC)),
    ],
)
def test_since_takes_ages_and_times(text: str, moment: datetime) -> None:
    assert start_of(text, now=NOW) == moment


@pytest.mark.parametrize("text", ["", "10", "m", "yesterday", "-5m", "1e400d", "9" * 400 + "d"])
def test_since_refuses_anything_else(text: str) -> None:
    with pytest.raises(UsageError, match="--since needs"):
        start_of(text, now=NOW)


@pytest.mark.parametrize(
    ("made", "remark"),
    [
        (event("container.exited", exit_code=3), "exit code 3"),
        (event("container.exited", exit_code=137, oom_killed=True), "exit code 137, out of memory"),
        (event("container.started", exit_code=None), ""),
        (event("pod.started", phases_ms={"total": 81.4, "qemu": 20}), "in 81 ms"),
        (event("pod.started", phases_ms=None), ""),
        (event("pod.failed", reason="QEMU died\nat once"), "QEMU died at once"),
    ],
    ids=["exit", "oom", "start", "phases", "no phases", "reason"],
)
def test_remarks_say_what_matters(made: Event, remark: str) -> None:
    assert remark_on(made) == remark


def test_a_line_tells_node_kind_and_subject_and_hides_escapes() -> None:
    text = line(event("pod.failed", mock=True, reason="\x1b[31m")).plain

    assert "  n  pod.failed  p/c  \\x1b[31m (mock)" in text
