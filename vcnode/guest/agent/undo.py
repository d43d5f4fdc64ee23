"""What has to be taken back, last first, and what could not be."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Undo:
    """A stack of steps. Push each *before* what it undoes: it has to accept that nothing was done."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], None]]] = []

    def push(self, what: str, step: Callable[[], None]) -> None:
        """Remember *step*; *what* completes "cannot …"."""
        self._steps.append((what, step))

    def run(self) -> list[str]:
        """Run all steps, also when one raises OSError.

        Returns:
            What failed, one text each; those steps stay on the stack, so that `run` can be repeated.
        """
        steps, self._steps = self._steps, []
        failed: list[tuple[str, Callable[[], None]]] = []
        problems = []
        while steps:
            what, step = steps.pop()
            try:
                step()
            except OSError as exc:
                failed.append((what, step))
                problems.append(f"cannot {what}: {exc}")
        self._steps = failed[::-1]
        return problems
