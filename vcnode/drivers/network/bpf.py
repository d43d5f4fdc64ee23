"""Classic BPF as a filter of tc: a small assembler, and the message that pyroute2 has no words for. Pure.

Classic and not extended BPF, because it needs no program to be loaded first and no verifier to be pleased,
and its few instructions can be read. Source: Documentation/networking/filter.rst, net/sched/cls_bpf.c.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.rtnl.tcmsg import plugins, sched_bpf

OK, SHOT = 0, 2
"""TC_ACT_OK and TC_ACT_SHOT: what a program returns for a frame that passes, or is dropped."""

NO_MATCH, MATCH = 0, 0xFFFFFFFF
"""What a program returns whose filter has an action of its own, and no class. Source: net/sched/cls_bpf.c."""

_LOAD = {4: 0x20, 2: 0x28, 1: 0x30}  # BPF_LD | BPF_ABS with BPF_W, BPF_H, BPF_B
_LOAD_LENGTH, _AND, _JEQ, _JGE, _JA, _RET = 0x80, 0x54, 0x15, 0x35, 0x05, 0x06


@dataclass(frozen=True, slots=True)
class Load:
    """Load so many bytes at an offset from the start of the frame.

    A frame that is too short ends the program with 0, which is `OK`: see to it with `LoadLength` before.
    """

    offset: int
    size: int = 4


@dataclass(frozen=True, slots=True)
class LoadLength:
    """Load the length of the frame."""


@dataclass(frozen=True, slots=True)
class And:
    """Mask what was loaded."""

    mask: int


@dataclass(frozen=True, slots=True)
class JumpIf:
    """Go on at a label when what was loaded equals *value*, else at another (None: the next instruction)."""

    value: int
    then: str | None = None
    otherwise: str | None = None


@dataclass(frozen=True, slots=True)
class JumpUnlessAtLeast:
    """Go on at a label when what was loaded is less than *value*."""

    value: int
    otherwise: str


@dataclass(frozen=True, slots=True)
class Jump:
    """Go on at a label."""

    to: str


@dataclass(frozen=True, slots=True)
class Return:
    """End with `OK` or `SHOT`."""

    verdict: int


@dataclass(frozen=True, slots=True)
class Label:
    """A place to jump to, further down."""

    name: str


Code = Load | LoadLength | And | JumpIf | JumpUnlessAtLeast | Jump | Return
Instruction = Code | Label


def assemble(program: Sequence[Instruction]) -> bytes:
    """The program as an array of ``struct sock_filter``.

    Raises:
        ValueError: A label is missing, behind, or too far away.
    """
    places: dict[str, int] = {}
    code: list[Code] = []
    for instruction in program:
        if isinstance(instruction, Label):
            places[instruction.name] = len(code)
        else:
            code.append(instruction)
    return b"".join(_encode(instruction, at, places) for at, instruction in enumerate(code))


def _encode(instruction: Code, at: int, places: Mapping[str, int]) -> bytes:
    def distance(label: str | None, most: int) -> int:
        if label is None:
            return 0
        if label not in places or not 0 <= (far := places[label] - at - 1) <= most:
            raise ValueError(f"label {label} cannot be reached")
        return far

    match instruction:
        case Load(offset, size):
            return struct.pack("=HBBI", _LOAD[size], 0, 0, offset)
        case LoadLength():
            return struct.pack("=HBBI", _LOAD_LENGTH, 0, 0, 0)
        case JumpUnlessAtLeast(value, otherwise):
            return struct.pack("=HBBI", _JGE, 0, distance(otherwise, 255), value)
        case And(mask):
            return struct.pack("=HBBI", _AND, 0, 0, mask)
        case JumpIf(value, then, otherwise):
            return struct.pack("=HBBI", _JEQ, distance(then, 255), distance(otherwise, 255), value)
        case Jump(to):
            return struct.pack("=HBBI", _JA, 0, 0, distance(to, 0xFFFF))
        case Return(verdict):
            return struct.pack("=HBBI", _RET, 0, 0, verdict)


class _Plugin:
    """Kind ``bpf`` of pyroute2, with classic programs: 0.9 sends their length and their code as 32 bits."""

    parent = sched_bpf.parent
    fix_request = staticmethod(sched_bpf.fix_request)

    @staticmethod
    def get_parameters(arguments: dict[str, Any]) -> dict[str, Any]:
        parameters: dict[str, Any] = sched_bpf.get_parameters(arguments)
        if (code := arguments.get("classic")) is not None:
            parameters["attrs"] += [["TCA_BPF_OPS_LEN", len(code) // 8], ["TCA_BPF_OPS", code]]
        return parameters

    class options(sched_bpf.options):  # type: ignore[misc] # noqa: N801 (pyroute2's name)
        nla_map = tuple(
            (name, {"TCA_BPF_OPS_LEN": "uint16", "TCA_BPF_OPS": "cdata"}.get(name, kind))
            for name, kind in sched_bpf.options.nla_map
        )


plugins["bpf"] = _Plugin
