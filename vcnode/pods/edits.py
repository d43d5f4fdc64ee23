"""How a record changes at each step of a life, and what is said about it. Pure.

Each function makes an `Edit`: given the newest record, the one after the step, and the news of it. An edit
runs inside the transaction, so it decides on the truth; a step that the state does not allow raises
`FailedPreconditionError` there and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from vcnode.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
)
from vcnode.models.base import JsonObject
from vcnode.models.events import EventKind
from vcnode.models.pod import MAX_CONTAINERS, ContainerResources, PodState, RestartPolicy
from vcnode.models.records import ContainerRecord, PodRecord, Restarts
from vcnode.models.vm import NetworkAttachment, VmRecord
from vcnode.models.volumes import Volume
from vcnode.pods.backoff import Backoff, after_end
from vcnode.pods.lifecycle import (
    CONTAINER_ALIVE,
    POD_HAS_VM,
    POD_TAKES_CONTAINERS,
    ContainerStep,
    PodStep,
    next_container_state,
    next_pod_state,
    require,
)
from vcnode.pods.locks import RESTART_CONTAINER, RESTART_POD
from vcnode.pods.statuses import container_id

VM_ENDED = "The pod's VM ended."
"""Why a container stopped when its exit code was not seen."""


@dataclass(frozen=True, slots=True)
class News:
    """An event to come out of a change."""

    kind: EventKind
    container_id: str | None = None
    """Set: the event is about this container, and carries its status instead of the pod's."""
    facts: JsonObject | None = None
    """Set: the event carries these instead of a status."""


Edit = Callable[[PodRecord], tuple[PodRecord, tuple[News, ...]]]


def find_container(record: PodRecord, wanted: str) -> ContainerRecord:
    """The container of that id.

    Raises:
        NotFoundError: The pod has none of that id.
    """
    for container in record.containers:
        if container.spec.id == wanted:
            return container
    raise NotFoundError(
        f"Pod {record.pod_id} has no container {wanted}.", pod_id=record.pod_id, container_id=wanted
    )


def starting(vm: VmRecord, network: NetworkAttachment, verb: str) -> Edit:
    """A start begins; *vm* and *network* are what it is going to make."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.START, verb)
        if record.vm is not None or record.leftovers:
            raise FailedPreconditionError(
                f"Pod {record.pod_id} has left something on the host; stop or delete the pod first.",
                leftovers=list(record.leftovers),
            )
        changed = _copy(record, state=state, reason=None, resumes=False, vm=vm, network=network, phases_ms={})
        if verb != RESTART_POD:  # a restart stays due until it is done
            changed = _copy(changed, restarts=Restarts())
        return changed, (News(EventKind.POD_STARTING),)

    return edit


def networked(network: NetworkAttachment) -> Edit:
    """The pod's network was made; *network* says more than its plan did."""
    return lambda record: (_copy(record, network=network), ())


def host_key_seen(key: str | None) -> Edit:
    """The guest has proved itself by *key*, and has to do so from now on."""
    return lambda record: (_copy(record, host_key=key), ())


def launched(vm: VmRecord) -> Edit:
    """The VM's process runs; *vm* says which it is."""
    return lambda record: (_copy(record, vm=vm), ())


def started(pids: Mapping[str, int], phases_ms: Mapping[str, float], now: datetime, verb: str) -> Edit:
    """A start is done: VM and agent answer, and the containers in *pids* run."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.STARTED, verb)
        containers = tuple(
            _started(record.pod_id, c, pids[container_id(c)], now, verb) if container_id(c) in pids else c
            for c in record.containers
        )
        news = (
            *(News(EventKind.CONTAINER_STARTED, cid) for cid in pids),
            News(EventKind.POD_STARTED),
        )
        changed = _copy(
            record,
            state=state,
            started_at=now,
            finished_at=None,
            containers=containers,
            phases_ms=dict(phases_ms),
            restarts=_again(record.restarts) if verb == RESTART_POD else Restarts(),
        )
        return changed, news

    return edit


def paused(verb: str, *, reason: str | None = None, resumes: bool = False) -> Edit:
    """The VM's vCPUs are stopped; *resumes*: until NATS is back."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.PAUSE, verb)
        return _copy(record, state=state, reason=reason, resumes=resumes), (News(EventKind.POD_PAUSED),)

    return edit


def stays_paused() -> Edit:
    """Somebody wants a paused pod to be paused, whoever has paused it."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        return (_copy(record, resumes=False) if record.resumes else record), ()

    return edit


def resumed(verb: str) -> Edit:
    """The VM's vCPUs run again."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.RESUME, verb)
        return _copy(record, state=state, reason=None, resumes=False), (News(EventKind.POD_RESUMED),)

    return edit


def stopping(verb: str, reason: str | None = None) -> Edit:
    """A stop begins; *reason*: why, unless a command asks for it."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.STOP, verb)
        return _copy(record, state=state, reason=reason, resumes=False), (News(EventKind.POD_STOPPING),)

    return edit


def stopped(reason: str | None, now: datetime, verb: str) -> Edit:
    """The VM is gone as asked and everything is freed."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.STOPPED, verb)
        containers, news = _containers_ended(record, now)
        changed = _freed(
            record,
            state=state,
            reason=reason,
            finished_at=now,
            containers=containers,
            restarts=Restarts(),
        )
        return changed, (*news, News(EventKind.POD_STOPPED))

    return edit


def undone(reason: str, now: datetime, verb: str) -> Edit:
    """A start was taken back on demand, perhaps just after it was done."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        if record.state is PodState.RUNNING:
            record, _ = stopping(verb)(record)
        return stopped(reason, now, verb)(record)

    return edit


def failed(reason: str, now: datetime, backoff: Backoff | None = None) -> Edit:
    """The pod cannot go on. What it holds on the host is still to be freed.

    With *backoff* its restart policy is asked, else nothing becomes due.
    """

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        state = next_pod_state(record.pod_id, record.state, PodStep.FAIL, "fail")
        containers, news = _containers_ended(record, now)
        changed = _copy(
            record, state=state, reason=reason, resumes=False, finished_at=now, containers=containers
        )
        news = (*news, News(EventKind.POD_FAILED))
        if backoff is not None:
            changed = _copy(changed, restarts=_pod_restarts(changed, now, backoff))
            if changed.restarts.at is not None:
                news = (*news, News(EventKind.POD_RESTARTING))
        return changed, news

    return edit


def failed_and_freed(
    reason: str, leftovers: tuple[str, ...], now: datetime, backoff: Backoff | None = None
) -> Edit:
    """The pod cannot go on; what it held was freed, except for *leftovers*."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        changed, news = failed(reason, now, backoff)(record)
        return freed(leftovers)(changed)[0], news

    return edit


def freed(leftovers: tuple[str, ...]) -> Edit:
    """What a failed pod held on the host was freed, except for *leftovers*."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        if leftovers:
            return _copy(record, leftovers=leftovers), (News(EventKind.POD_FAILED),)
        return _freed(record), ()

    return edit


def pod_restart_failed(reason: str, now: datetime, backoff: Backoff) -> Edit:
    """A restart of a failed pod did not succeed: when is the next?"""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        if record.state is not PodState.FAILED or record.restarts.at is None:
            return record, ()
        restarts = _pod_restarts(_copy(record, started_at=None), now, backoff)
        news = () if restarts.at is None else (News(EventKind.POD_RESTARTING),)
        return _copy(record, reason=reason, restarts=restarts), news

    return edit


def pod_restart_cancelled() -> Edit:
    """Somebody wants a failed pod to stay what it is."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        if record.restarts.at is None:
            return record, ()
        return _copy(record, restarts=Restarts()), (News(EventKind.POD_RESTART_CANCELLED),)

    return edit


def session_news(kind: EventKind, reason: str | None = None) -> Edit:
    """Nothing changed in the pod, but the session with its guest did."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        facts: JsonObject = {"pod_id": record.pod_id, "state": record.state.value}
        if reason is not None:
            facts["reason"] = reason
        return record, (News(kind, facts=facts),)

    return edit


def container_added(container: ContainerRecord, verb: str) -> Edit:
    """A container joins the pod; the same one again changes nothing."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        cid = container_id(container)
        for other in record.containers:
            if other.spec == container.spec:
                return record, ()
            if other.spec.id == cid:
                raise AlreadyExistsError(
                    f"Pod {record.pod_id} has another container {cid}; delete it first or choose another id.",
                    pod_id=record.pod_id,
                    container_id=cid,
                )
        require(f"Pod {record.pod_id}", record.state, POD_TAKES_CONTAINERS, verb)
        if len(record.containers) >= MAX_CONTAINERS:
            raise ResourceExhaustedError(
                f"Pod {record.pod_id} has {MAX_CONTAINERS} containers, which is the most a pod may have.",
                limit=MAX_CONTAINERS,
            )
        return _copy(record, containers=(*record.containers, container)), (
            News(EventKind.CONTAINER_CREATED, cid),
        )

    return edit


def container_started(cid: str, pid: int, now: datetime, verb: str) -> Edit:
    """A container's main process runs."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        before = find_container(record, cid)
        container = _started(record.pod_id, before, pid, now, verb)
        if verb == RESTART_CONTAINER:
            container = container.model_copy(update={"restarts": _again(before.restarts)})
        return _with(record, container), (News(EventKind.CONTAINER_STARTED, cid),)

    return edit


def container_exited(
    cid: str,
    exit_code: int | None,
    *,
    oom_killed: bool,
    reason: str | None,
    now: datetime,
    backoff: Backoff,
) -> Edit:
    """A container's main process ended; changes nothing if it was not known to run.

    Its restart policy says whether and when it starts again, unless the pod is being stopped.
    """

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        known = next((c for c in record.containers if c.spec.id == cid), None)
        if known is None or known.state not in CONTAINER_ALIVE:
            return record, ()
        container = _ended(record.pod_id, known, exit_code, oom_killed=oom_killed, reason=reason, now=now)
        news: tuple[News, ...] = (News(EventKind.CONTAINER_EXITED, cid),)
        if record.state in POD_HAS_VM:
            ran_s = 0.0 if known.started_at is None else (now - known.started_at).total_seconds()
            restarts = _container_restarts(container, exit_code != 0, ran_s, now, backoff)
            container = container.model_copy(update={"restarts": restarts})
            if restarts.at is not None:
                news = (*news, News(EventKind.CONTAINER_RESTARTING, cid))
        return _with(record, container), news

    return edit


def container_health(cid: str, ready: bool) -> Edit:
    """A container's probes say whether it is ready; nothing changes if that was known, or it does not run."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        known = next((c for c in record.containers if c.spec.id == cid), None)
        if known is None or known.state not in CONTAINER_ALIVE or known.ready is ready:
            return record, ()
        kind = EventKind.CONTAINER_READY if ready else EventKind.CONTAINER_UNREADY
        return _with(record, known.model_copy(update={"ready": ready})), (News(kind, cid),)

    return edit


def container_restart_failed(cid: str, reason: str, now: datetime, backoff: Backoff) -> Edit:
    """A restart of a container did not succeed: when is the next?"""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        known = next((c for c in record.containers if c.spec.id == cid), None)
        if known is None or known.restarts.at is None:
            return record, ()
        restarts = _container_restarts(known, True, 0.0, now, backoff)
        news = () if restarts.at is None else (News(EventKind.CONTAINER_RESTARTING, cid),)
        return _with(record, known.model_copy(update={"reason": reason, "restarts": restarts})), news

    return edit


def container_restarts_cancelled(cid: str) -> Edit:
    """Somebody stops a container: whatever its policy says, it does not start again by itself."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        known = find_container(record, cid)
        if known.spec.restart_policy is RestartPolicy.NEVER or known.restarts.cancelled:
            return record, ()
        news = () if known.restarts.at is None else (News(EventKind.CONTAINER_RESTART_CANCELLED, cid),)
        restarts = known.restarts.model_copy(update={"at": None, "cancelled": True})
        return _with(record, known.model_copy(update={"restarts": restarts})), news

    return edit


def container_paused(cid: str, verb: str) -> Edit:
    """A container's processes are frozen."""
    return _container_step(cid, ContainerStep.PAUSE, EventKind.CONTAINER_PAUSED, verb)


def container_resumed(cid: str, verb: str) -> Edit:
    """A container's processes go on."""
    return _container_step(cid, ContainerStep.RESUME, EventKind.CONTAINER_RESUMED, verb)


def _container_step(cid: str, step: ContainerStep, kind: EventKind, verb: str) -> Edit:
    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        container = find_container(record, cid)
        state = next_container_state(f"{record.pod_id}/{cid}", container.state, step, verb)
        return _with(record, container.model_copy(update={"state": state})), (News(kind, cid),)

    return edit


def container_updated(cid: str, limits: ContainerResources) -> Edit:
    """A container has other limits."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        container = find_container(record, cid)
        changed = container.model_copy(update={"resources": limits})
        return _with(record, changed), (News(EventKind.CONTAINER_UPDATED, cid),)

    return edit


def resized(mem_size_mib: int, *, told: bool = True) -> Edit:
    """A pod has other memory, or is about to get it; *told*: it has it, and that is news."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        news = (News(EventKind.POD_RESIZED),) if told else ()
        if record.mem_size_mib == mem_size_mib:
            return record, news
        return _copy(record, resized_mib=mem_size_mib), news

    return edit


def volume_attached(volume: Volume, verb: str) -> Edit:
    """A pod has one more volume."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        require(f"Pod {record.pod_id}", record.state, POD_TAKES_CONTAINERS, verb)
        return _copy(record, volumes=(*record.volumes, volume)), (News(EventKind.POD_VOLUME_ATTACHED),)

    return edit


def volume_detached(mount_tag: str, verb: str) -> Edit:
    """A volume leaves the pod, unless a container mounts it."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        require(f"Pod {record.pod_id}", record.state, POD_TAKES_CONTAINERS, verb)
        users = [container_id(c) for c in record.containers if any(m.tag == mount_tag for m in c.spec.mounts)]
        if users:
            raise FailedPreconditionError(
                f"Volume {mount_tag} of pod {record.pod_id} is mounted by {', '.join(users)}; delete what"
                " mounts it first.",
                pod_id=record.pod_id,
                container_ids=users,
            )
        rest = tuple(volume for volume in record.volumes if volume.mount_tag != mount_tag)
        return _copy(record, volumes=rest), (News(EventKind.POD_VOLUME_DETACHED),)

    return edit


def container_removed(cid: str) -> Edit:
    """A container leaves the pod."""

    def edit(record: PodRecord) -> tuple[PodRecord, tuple[News, ...]]:
        gone = find_container(record, cid)
        facts: JsonObject = {"pod_id": record.pod_id, "container_id": cid}
        rest = tuple(c for c in record.containers if c is not gone)
        return _copy(record, containers=rest), (News(EventKind.CONTAINER_DELETED, cid, facts),)

    return edit


def _again(before: Restarts) -> Restarts:
    """The restart that was due is done."""
    return Restarts(count=before.count + 1, streak=before.streak)


def _pod_restarts(record: PodRecord, now: datetime, backoff: Backoff) -> Restarts:
    ran_s = 0.0 if record.started_at is None else (now - record.started_at).total_seconds()
    return after_end(
        record.restarts,
        policy=record.spec.restart_policy,
        max_restarts=record.spec.max_restarts,
        failed=True,
        ran_s=ran_s,
        now=now,
        backoff=backoff,
    )


def _container_restarts(
    container: ContainerRecord, failed: bool, ran_s: float, now: datetime, backoff: Backoff
) -> Restarts:
    return after_end(
        container.restarts,
        policy=container.spec.restart_policy,
        max_restarts=container.spec.max_restarts,
        failed=failed,
        ran_s=ran_s,
        now=now,
        backoff=backoff,
    )


def _copy(record: PodRecord, **changes: object) -> PodRecord:
    return record.model_copy(update=changes)


def _freed(record: PodRecord, **changes: object) -> PodRecord:
    return _copy(record, vm=None, network=None, leftovers=(), **changes)


def _with(record: PodRecord, changed: ContainerRecord) -> PodRecord:
    return _copy(
        record, containers=tuple(changed if c.spec.id == changed.spec.id else c for c in record.containers)
    )


def _started(pod_id: str, container: ContainerRecord, pid: int, now: datetime, verb: str) -> ContainerRecord:
    name = f"{pod_id}/{container.spec.id}"
    return container.model_copy(
        update={
            "state": next_container_state(name, container.state, ContainerStep.START, verb),
            "pid": pid,
            "exit_code": None,
            "oom_killed": False,
            "reason": None,
            "restarts": Restarts(),
            "ready": not container.spec.probes.gate_readiness,
            "started_at": now,
            "finished_at": None,
        }
    )


def _ended(
    pod_id: str,
    container: ContainerRecord,
    exit_code: int | None,
    *,
    oom_killed: bool,
    reason: str | None,
    now: datetime,
) -> ContainerRecord:
    name = f"{pod_id}/{container.spec.id}"
    return container.model_copy(
        update={
            "state": next_container_state(name, container.state, ContainerStep.EXIT, "exit"),
            "pid": None,
            "ready": False,
            "exit_code": exit_code,
            "oom_killed": oom_killed,
            "reason": reason,
            "finished_at": now,
        }
    )


def _containers_ended(
    record: PodRecord, now: datetime
) -> tuple[tuple[ContainerRecord, ...], tuple[News, ...]]:
    """The containers once the VM is gone, and the news of those that ran until then."""
    containers: list[ContainerRecord] = []
    news: list[News] = []
    for container in record.containers:
        if container.state in CONTAINER_ALIVE:
            container = _ended(record.pod_id, container, None, oom_killed=False, reason=VM_ENDED, now=now)
            news.append(News(EventKind.CONTAINER_EXITED, container.spec.id))
        if container.restarts != Restarts():  # from here on it is the pod that starts again
            container = container.model_copy(update={"restarts": Restarts()})
        containers.append(container)
    return tuple(containers), tuple(news)
