import signal

import pytest
from pydantic import ValidationError

from vcnode.models.commands import ContainerKill
from vcnode.models.pod import ContainerSpec
from vcnode.models.signals import NUMBERS, signal_name, signal_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15), ("SIGTERM", 15), ("sigterm", 15), ("15", 15), (" HUP ", 1), ("KILL", 9), ("64", 64),
        ("RTMIN", 34), ("SIGRTMIN+3", 37), ("RTMIN+30", 64), ("RTMAX-1", 63), ("RTMAX", 64), ("IOT", 6),
    ],
)  # fmt: skip
def test_names_and_numbers_are_understood(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65",
        "-1",
        "TERMS",
        "SIG",
        "RTMIN+31",
        "RTMIN-1",
        "TERM+1",
        "1e1",
        "\u0661\u0665",
        "9" * 5000,
        "SIG9",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no signal"):
        signal_number(text)


def test_the_numbers_are_those_of_this_platform() -> None:
    for name, number in NUMBERS.items():
        assert signal.Signals(number) in (getattr(signal, f"SIG{name}", number), number)
    assert signal.SIGRTMIN == 34
    for number in range(1, 65):
        if number not in (32, 33):
            assert signal_number(signal_name(number)) == number


def test_requests_take_both_and_keep_numbers() -> None:
    kill = ContainerKill.model_validate_json('{"pod_id": "p", "container_id": "c", "signal": "SIGUSR1"}')
    assert kill.signal == 10
    assert ContainerSpec(image="x", stop_signal="QUIT").stop_signal == 3  # type: ignore[arg-type]
    assert ContainerSpec(image="x", stop_signal=3).stop_signal == 3
    for wrong in (True, 1.5, "NOPE", 65, 0, None):
        with pytest.raises(ValidationError):
            ContainerKill(pod_id="p", container_id="c", signal=wrong)  # type: ignore[arg-type]
