"""Signals by number or name, as Linux on x86 numbers them.

Source: signal(7); arch/x86/include/uapi/asm/signal.h. Real-time signals are counted as glibc does, which
keeps 32 and 33 for itself.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

_NAMES = tuple(
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN "  # noqa: SIM905
    "TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS".split()
)
NUMBERS = {name: number for number, name in enumerate(_NAMES, start=1)}
"""Numbers of the classic signals, by name without ``SIG``."""
_ALIASES = {"IOT": 6, "CLD": 17, "POLL": 29, "UNUSED": 31, "RTMIN": 34, "RTMAX": 64}
MAX_NUMBER = 64
_SPELLED = re.compile(r"(?:SIG)?([A-Z][A-Z0-9]*)(?:([+-])([0-9]{1,2}))?", re.IGNORECASE)


def signal_number(text: str) -> int:
    """The number of the signal that *text* names: ``TERM``, ``SIGTERM``, ``15``, ``RTMIN+3``.

    Raises:
        ValueError: There is no such signal.
    """
    word = text.strip()
    if word.isascii() and word.isdecimal() and len(word) <= 2:
        number: int | None = int(word)
    elif (found := _SPELLED.fullmatch(word)) is None:
        number = None
    else:
        name = found[1].upper()
        number = NUMBERS.get(name, _ALIASES.get(name))
        if number is not None and found[2]:
            offset = int(found[3])
            allowed = (name, found[2]) in (("RTMIN", "+"), ("RTMAX", "-")) and offset <= 30
            number = (number + offset if found[2] == "+" else number - offset) if allowed else None
    if number is None or not 1 <= number <= MAX_NUMBER:
        raise ValueError(f"{text[:40]!r} is no signal; give a name such as TERM or RTMIN+3, or 1 to 64")
    return number


def signal_name(number: int) -> str:
    """The name of a signal, such as ``SIGTERM`` or ``SIGRTMIN+3``; its number where it has none."""
    if 1 <= number <= len(_NAMES):
        return f"SIG{_NAMES[number - 1]}"
    first = _ALIASES["RTMIN"]
    if first <= number <= MAX_NUMBER:
        return "SIGRTMIN" if number == first else f"SIGRTMIN+{number - first}"
    return str(number)


def _from_name(value: object) -> object:
    return signal_number(value) if isinstance(value, str) else value


Signal = Annotated[
    int,
    BeforeValidator(_from_name),
    Field(ge=1, le=MAX_NUMBER),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_NUMBER},
                {"type": "string", "pattern": r"^\s*([0-9]{1,2}|[A-Za-z][A-Za-z0-9]*([+-][0-9]{1,2})?)\s*$"},
            ]
        },
        mode="validation",
    ),
]
"""A signal, by number or name; kept as a number."""
