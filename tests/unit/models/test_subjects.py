"""Subjects: built and parsed in one place, and never by what a caller smuggles in."""

from __future__ import annotations

import pytest

from tests.unit.client.test_sequences import event
from vcnode.models.events import EventKind
from vcnode.models.subjects import EventAddress, Subjects

S = Subjects()


def test_commands() -> None:
    assert S.rpc("n1", "pod.create") == "vcnode.rpc.n1.pod.create"
    assert S.cmd("n1", "pod.create") == "vcnode.cmd.n1.pod.create"
    assert S.everyone("node.ping") == "vcnode.all.node.ping"
    assert S.io("n1", "s1", "stdin") == "vcnode.io.n1.s1.stdin"
    assert (S.event_stream, S.node_bucket, S.pod_bucket) == ("vcnode-events", "vcnode-nodes", "vcnode-pods")


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_kind_of_event_can_be_parsed_back_and_found_by_its_filters(kind: EventKind) -> None:
    subject = {
        "pod": "p1",
        "container": "p1/c1",
        "node": "n1",
        "image": "image/a.b/c:1",
        "command": "command/x",
        "audit": "command/x",
    }[kind.split(".")[0]]
    published = S.event("n1", event(1).model_copy(update={"type": f"vcnode.{kind}", "subject": subject}))
    address = S.parse_event(published)
    pod_id = "p1" if kind.startswith(("pod.", "container.")) else None
    container_id = "c1" if kind.startswith("container.") else None
    assert address == EventAddress("n1", kind, pod_id, container_id)
    group = f"{kind.split('.')[0]}.*"
    for filters in ({}, {"node": "n1"}, {"kinds": (kind,)}, {"kinds": (group,)}, {"pod_id": pod_id}):
        assert any(matches(f, published) for f in S.event_filters(**filters)), filters  # type: ignore[arg-type]
    assert not any(matches(f, published) for f in S.event_filters(node="n2"))


def matches(pattern: str, subject: str) -> bool:
    """Subject matching as NATS does it."""
    patterns, tokens = pattern.split("."), subject.split(".")
    for i, part in enumerate(patterns):
        if part == ">":
            return len(tokens) > i
        if i >= len(tokens) or part not in ("*", tokens[i]):
            return False
    return len(patterns) == len(tokens)


def test_filters_do_not_overlap() -> None:
    assert S.event_filters(kinds=("pod.*", "pod.started", "node.started", "node.started")) == (
        "vcnode.evt.*.pod.*.>",
        "vcnode.evt.*.node.started",
    )


@pytest.mark.parametrize("token", ["", "a.b", "*", ">", "a b", "A", "a\n", "a\r\nPUB x 0\r\n", "é"])
def test_what_is_not_one_token_is_refused(token: str) -> None:
    for build in (
        lambda: S.rpc(token, "pod.create"),
        lambda: S.node_events(token),
        lambda: S.io("n1", token, "stdin"),
        lambda: S.event_filters(node=token),
        lambda: S.event_filters(pod_id=token),
        lambda: S.event("n1", event(1).model_copy(update={"subject": token})),
    ):
        with pytest.raises(ValueError, match="cannot be one token"):
            build()


@pytest.mark.parametrize("prefix", ["", "a.b", "a b", "$SYS", "a\n", "*"])
def test_a_prefix_is_one_plain_token(prefix: str) -> None:
    with pytest.raises(ValueError, match="not one token"):
        Subjects(prefix)


@pytest.mark.parametrize(
    "subject",
    [
        "other.evt.n1.pod.started.p1",
        "vcnode.rpc.n1.pod.started.p1",
        "vcnode.evt.n1",
        "vcnode.evt.n1.pod.started",
        "vcnode.evt.n1.pod.started.p1.c1",
        "vcnode.evt.n1.node.started.x",
    ],
)
def test_a_foreign_subject_is_refused(subject: str) -> None:
    with pytest.raises(ValueError, match=r"subject of an event|after the kind"):
        S.parse_event(subject)


def test_a_filter_that_can_match_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="about a pod"):
        S.event_filters(pod_id="p1", kinds=("node.started",))
    with pytest.raises(ValueError, match=r"no events of kind 'pod\.exploded'"):
        S.event_filters(kinds=("pod.exploded",))
    with pytest.raises(ValueError, match="no events of kind"):
        S.event_filters(kinds=("nothing.*",))
