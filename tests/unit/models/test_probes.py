import pytest
from pydantic import ValidationError

from vcnode.models.probes import HttpAction, Probe, Probes


def test_an_http_request_is_complete_and_may_be_changed() -> None:
    assert HttpAction(port=80).request == (
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\nUser-Agent: vcnode\r\nConnection: close\r\n\r\n"
    )
    action = HttpAction(port=8080, host="::1", path="/a?b=c", headers={"host": "web", "X-A": "1"})
    assert action.request == (
        "GET /a?b=c HTTP/1.1\r\nUser-Agent: vcnode\r\nConnection: close\r\nhost: web\r\nX-A: 1\r\n\r\n"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"exec": {"args": []}},
        {"exec": {"args": ["a"]}, "tcp": {"port": 1}},
        {"tcp": {"port": 0}},
        {"tcp": {"port": 1, "host": "localhost"}},
        {"http": {"port": 1, "path": "x"}},
        {"http": {"port": 1, "path": "/a b"}},
        {"http": {"port": 1, "path": "/a\r\nX: 1"}},
        {"http": {"port": 1, "headers": {"A": "1\r\nB: 2"}}},
        {"http": {"port": 1, "headers": {"A B": "1"}}},
        {"tcp": {"port": 1}, "period_s": 0},
        {"tcp": {"port": 1}, "timeout_s": 4000},
        {"tcp": {"port": 1}, "failure_threshold": 0},
    ],
    ids=str,
)
def test_a_probe_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Probe.model_validate(wrong, strict=False)


def test_only_readiness_may_need_more_than_one_success() -> None:
    probe = {"tcp": {"port": 1}, "success_threshold": 2}
    assert Probes.model_validate({"readiness": probe}, strict=False).gate_readiness
    for name in ("startup", "liveness"):
        with pytest.raises(ValidationError, match="must be 1"):
            Probes.model_validate({name: probe}, strict=False)
