"""How long a start will take, from what starts took lately. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["spare", "clone", "boot"]
SMOOTHING = 0.2
"""Weight of the newest start in the mean."""
FIRST_GUESS_MS: Mapping[Kind, float] = {"spare": 150.0, "clone": 400.0, "boot": 4000.0}
"""Until one was seen: what starts took on two cores without KVM."""


def kind_of(phases_ms: Mapping[str, float]) -> Kind:
    """How a pod came up, by the phases of its start."""
    if "boot" in phases_ms:
        return "boot"
    return "spare" if "pool" in phases_ms else "clone"


@dataclass(slots=True)
class Forecast:
    """Means of the durations of starts, by kind."""

    _means_ms: dict[Kind, float] = field(default_factory=lambda: dict(FIRST_GUESS_MS))

    def learn(self, phases_ms: Mapping[str, float]) -> None:
        """A pod came up in these phases; its time in the queue does not count."""
        kind = kind_of(phases_ms)
        took = phases_ms.get("total", 0.0) - phases_ms.get("queue", 0.0)
        self._means_ms[kind] += SMOOTHING * (took - self._means_ms[kind])

    def expect_ms(self, kind: Kind) -> float:
        """What the next start of this kind will take."""
        return self._means_ms[kind]
