"""What a scheduler and the nodes say to each other about where a pod could run."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from vcnode.models.base import Labels, Moment, Reply, Request
from vcnode.models.pod import PodSpec

LabelKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?$")]
Taint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/=-]{0,254}[A-Za-z0-9])?$")]
"""A reason why pods are to stay away from a node, such as ``gpu`` or ``maintenance=friday``."""
ReservationId = Annotated[str, StringConstraints(pattern=r"^r-[0-9a-f]{24}$")]
MAX_HOLD_S = 600.0


class Constraints(Request):
    """Where a pod may run, and where it had better run."""

    labels: Labels = {}
    """The node must carry all of these."""
    tolerations: tuple[Taint, ...] = Field(default=(), max_length=64)
    """Taints that do not matter to the pod; a node with any other taint does not bid."""
    anti_affinity: Labels = {}
    """The node must hold no pod that carries all of these; empty: any pod is fine."""
    spread_by: LabelKey | None = None
    """Key of a label of the pod: nodes that hold more pods with the same value bid lower."""


class PodBid(Request):
    """``pod.bid``."""

    pod: PodSpec
    """The pod that is to be placed."""
    constraints: Constraints = Constraints()
    """Where it may go."""
    hold_s: float = Field(default=10.0, ge=0, le=MAX_HOLD_S)
    """Seconds for which the node keeps what the pod needs; 0: a question only, nothing is kept."""
    explain: bool = False
    """Whether a node that cannot take the pod says why, instead of saying nothing."""


class Bid(Reply):
    """Reply of ``pod.bid``. Asked among all nodes, one that cannot take the pod says nothing, unless it is to
    explain."""

    node: str
    """The node that bids."""
    epoch: int
    """Its epoch."""
    able: bool
    """Whether it can take the pod."""
    score: float = 0.0
    """How well the pod would be there, 0 to 1; the sum of ``parts``."""
    parts: dict[str, float] = {}
    """What the score is made of: ``memory``, ``cpu``, ``disk``, ``start``, ``spread``."""
    predicted_start_ms: float | None = None
    """When the pod would run, from what starts took here lately, the queue included."""
    reservation: str | None = None
    """Give it to ``pod.run`` or ``pod.create``, once, before ``expires_at``."""
    expires_at: Moment | None = None
    """When the reservation ends by itself."""
    reasons: tuple[str, ...] = ()
    """Why the node cannot take the pod, one sentence each."""
    held_s: float | None = None
    """Set when there would be room but for what was promised to others: it is free after so many seconds at
    the latest."""

    @property
    def quiet(self) -> bool:
        """Whether a node that was asked among all keeps this to itself."""
        return not self.able and not self.reasons and self.held_s is None


class PodRelease(Request):
    """``pod.release``."""

    reservation: ReservationId
    """Of a bid that is not wanted."""


class PodReleased(Reply):
    """Reply of ``pod.release``."""

    existed: bool
    """False when it was used or had expired: releasing is idempotent."""


class NodeLabel(Request):
    """``node.label``."""

    set: Labels = {}
    """Labels to set."""
    remove: tuple[LabelKey, ...] = Field(default=(), max_length=64)
    """Keys of labels to remove, those of the settings included."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if both := sorted(self.set.keys() & set(self.remove)):
            raise ValueError(f"{', '.join(both)} cannot be set and removed at once")
        return self


class NodeCordon(Request):
    """``node.cordon``."""

    reason: Annotated[str, StringConstraints(max_length=256)] = ""
    """For people; shown in ``node.info`` and in refusals."""


class NodeDrain(Request):
    """``node.drain``."""

    timeout_s: float = Field(default=300.0, ge=0, le=86_400)
    """Seconds that all pods together may take; what still runs then is stopped without grace."""
    delete: bool = False
    """Whether the pods are deleted as well."""
    reason: Annotated[str, StringConstraints(max_length=256)] = "drained"
    """For people."""


class NodeStanding(Reply):
    """Reply of ``node.label``, ``node.cordon``, ``node.uncordon``: what schedulers see of the node."""

    node: str
    """Its name."""
    state: str
    """``ready``, ``cordoned`` or ``draining``."""
    reason: str | None = None
    """Why it is cordoned."""
    labels: dict[str, str]
    """Its labels: those of the settings, as changed since."""
    taints: tuple[str, ...] = ()
    """Its taints, from the settings."""


class DrainProgress(Reply):
    """Data of ``node.draining``: one more pod was stopped, or could not be."""

    node: str
    """The node."""
    pod_id: str | None = None
    """The pod; None at the beginning."""
    outcome: str | None = None
    """``graceful``, ``forced``, ``absent`` or ``failed``."""
    done: int
    """Pods that are done with."""
    total: int
    """Pods that were to be stopped."""


class DrainReport(Reply):
    """Reply of ``node.drain`` and data of ``node.drained``."""

    node: str
    """The node, which is cordoned from now on."""
    stopped: tuple[str, ...] = ()
    """Pods that ended in time."""
    forced: tuple[str, ...] = ()
    """Pods that had to be killed."""
    failed: tuple[str, ...] = ()
    """Pods that could not be stopped or deleted; their status says why."""
