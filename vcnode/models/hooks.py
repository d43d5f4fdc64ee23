"""Programs on the host that run at points of a pod's life."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import NoNul, Request

MAX_HOOKS = 16
"""Most at one point."""
DEFAULT_TIMEOUT_S = 10.0
MAX_TIMEOUT_S = 25.0
"""Most of all hooks at one point together: a stop has to end."""


class HostHook:
    """Marks a text that names a program on the host, for which policy has directories."""


HookPath = Annotated[
    str,
    StringConstraints(pattern=r"^/[^\x00]{0,4094}$"),
    Field(description="Absolute path of a program on the node's host, below one of `policy.hook_dirs`."),
    HostHook(),
]


class Hook(Request):
    """A program. It gets the OCI state of the pod as JSON on its standard input."""

    path: HookPath
    args: tuple[Annotated[NoNul, StringConstraints(max_length=4096)], ...] = Field(default=(), max_length=64)
    """Its arguments, without its name."""
    env: tuple[Annotated[str, StringConstraints(pattern=r"^[^=\x00]+=[^\x00]*$", max_length=4096)], ...] = (
        Field(default=(), max_length=64)
    )
    """Its environment besides ``PATH``, ``NAME=VALUE``; which names there may be, `policy.hook_env` says."""
    timeout_s: float = Field(default=DEFAULT_TIMEOUT_S, gt=0, le=MAX_TIMEOUT_S)
    """Seconds after which it is killed, and has failed; those of one point together at most as many."""


class Hooks(Request):
    """Hooks by when they run, each in the order in which they are given."""

    pre_start: tuple[Hook, ...] = Field(default=(), max_length=MAX_HOOKS)
    """When the pod has its network and before its VM runs. One that fails stops the start,
    which is undone."""
    post_start: tuple[Hook, ...] = Field(default=(), max_length=MAX_HOOKS)
    """When the pod runs. One that fails is logged."""
    post_stop: tuple[Hook, ...] = Field(default=(), max_length=MAX_HOOKS)
    """When all that the pod held is freed, however it ended, a failed start included. One that fails is
    logged. After a crash of the node agent they may run a second time."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        for name in ("pre_start", "post_start", "post_stop"):
            hooks: tuple[Hook, ...] = getattr(self, name)
            if sum(hook.timeout_s for hook in hooks) > MAX_TIMEOUT_S:
                raise ValueError(f"the 'timeout_s' of '{name}' together must be at most {MAX_TIMEOUT_S:g}")
        return self

    @property
    def any(self) -> bool:
        """Whether there are some."""
        return bool(self.pre_start or self.post_start or self.post_stop)
