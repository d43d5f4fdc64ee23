import pytest

from tests.unit.drivers.network.frames import run
from vcnode.drivers.network.bpf import (
    OK,
    SHOT,
    And,
    Jump,
    JumpIf,
    JumpUnlessAtLeast,
    Label,
    Load,
    LoadLength,
    Return,
    assemble,
)


def test_a_program_is_assembled_as_the_kernel_has_it():
    program = [Load(12, 2), JumpIf(0x0800, None, "drop"), Return(OK), Label("drop"), Return(SHOT)]
    # As `tc filter show` prints it: '4,40 0 0 12,21 0 1 2048,6 0 0 0,6 0 0 2'
    assert assemble(program).hex() == ("280000000c000000150000010008000006000000000000000600000002000000")


def test_masks_lengths_and_jumps():
    code = assemble(
        [
            LoadLength(),
            JumpUnlessAtLeast(2, "drop"),
            Load(0, 1),
            And(0xF0),
            JumpIf(0x40, "pass"),
            Jump("drop"),
            Label("pass"),
            Return(OK),
            Label("drop"),
            Return(SHOT),
        ]
    )
    assert [run(code, frame) for frame in (b"\x45\0", b"\x60\0", b"\x45")] == [OK, SHOT, SHOT]


@pytest.mark.parametrize(
    "program",
    [
        [JumpIf(1, "nowhere"), Return(OK)],
        [Label("back"), Load(0), JumpIf(1, "back"), Return(OK)],
        [JumpIf(1, "far"), *[Load(0)] * 256, Label("far"), Return(OK)],
    ],
    ids=["missing", "backwards", "too far"],
)
def test_labels_that_cannot_be_reached_are_refused(program):
    with pytest.raises(ValueError, match="cannot be reached"):
        assemble(program)
