"""What `NodeClient` offers besides single commands: sessions as async context managers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

from vcnode.client.forwarding import Forward
from vcnode.client.sessions import CopyIn, CopyOut, ProcessStream
from vcnode.errors import InvalidArgumentError
from vcnode.models.base import Request
from vcnode.models.pod import Cmd
from vcnode.models.sessions import (
    ContainerAttach,
    ContainerCopyIn,
    ContainerCopyOut,
    PodForward,
    Session,
    SessionExec,
    SessionResume,
    TerminalSize,
)
from vcnode.models.violations import violations_of

if TYPE_CHECKING:
    from vcnode.client.requests import Requester

RequestT = TypeVar("RequestT", bound=Request)


class Opening(TypedDict, total=False):
    """Options of what opens a session."""

    command_id: str | None
    """See `vcnode.client.node`."""
    deadline_s: float | None
    """See `vcnode.client.node`; for the opening alone."""

    when_lost: Literal["kill", "keep"]
    """Whether it ends when nothing is heard of this client any more (the default), or is kept."""
    lost_after_s: float
    """Seconds of silence until then; 20 by default."""
    keep_s: float
    """Seconds for which it is kept without a client; 600 by default."""


class StreamMethods:
    """Sessions; each method returns what is to be entered with ``async with``, which asks the node."""

    _requester: Requester

    async def _open_session(self, verb: str, request: Request, options: Opening) -> Session:
        raise NotImplementedError

    def exec_stream(
        self,
        pod_id: str,
        container_id: str | None,
        cmd: Cmd | Sequence[str],
        *,
        tty: TerminalSize | None = None,
        **options: Unpack[Opening],
    ) -> ProcessStream:
        """A command in a running container (None: in the guest itself), with its streams.

        Args:
            pod_id: Pod.
            container_id: Container.
            cmd: Program and arguments, or a `Cmd`.
            tty: Run it on a terminal of that size; all its output is ``stdout`` then.
            options: See `Opening`.
        """
        made = cmd if isinstance(cmd, Cmd) else _make(Cmd, args=tuple(cmd))
        lost = _lost(options)
        request = _make(SessionExec, pod_id=pod_id, container_id=container_id, cmd=made, tty=tty, **lost)
        return self._process("session.exec", request, options)

    def attach(self, pod_id: str, container_id: str, **options: Unpack[Opening]) -> ProcessStream:
        """The streams of a container's main process: its output from now on, and its input if it has one.

        Leaving the block detaches. Who does not read meanwhile holds the container up.
        """
        request = _make(ContainerAttach, pod_id=pod_id, container_id=container_id)
        return self._process("container.attach", request, options)

    def copy_in(
        self,
        pod_id: str,
        container_id: str,
        path: str,
        *,
        max_bytes: int | None = None,
        **options: Unpack[Opening],
    ) -> CopyIn:
        """A tar stream into a container, which need not run.

        Args:
            pod_id: Pod.
            container_id: Container.
            path: Directory to unpack into; where there is none of that name, the first name in the archive
                becomes it.
            max_bytes: Most bytes of content.
            options: See `Opening`.
        """
        fields = {"pod_id": pod_id, "container_id": container_id, "path": path, "max_bytes": max_bytes}
        request = _make(ContainerCopyIn, **fields)
        return CopyIn(self._requester, lambda: self._open_session("container.copy_in", request, options))

    def copy_out(
        self,
        pod_id: str,
        container_id: str,
        path: str,
        *,
        max_bytes: int | None = None,
        **options: Unpack[Opening],
    ) -> CopyOut:
        """A tar stream of a file or directory of a container, which need not run."""
        fields = {"pod_id": pod_id, "container_id": container_id, "path": path, "max_bytes": max_bytes}
        request = _make(ContainerCopyOut, **fields)
        return CopyOut(self._requester, lambda: self._open_session("container.copy_out", request, options))

    def forward(self, pod_id: str, **options: Unpack[Opening]) -> Forward:
        """Connections to ports inside a pod."""
        request = _make(PodForward, pod_id=pod_id)
        return Forward(self._requester, lambda: self._open_session("pod.forward", request, options))

    def resume_stream(self, session_id: str) -> ProcessStream:
        """Go on with a session that a client has detached from, or lost; from what that had not read."""
        return self._process("session.resume", _make(SessionResume, session_id=session_id), {})

    def _process(self, verb: str, request: Request, options: Opening) -> ProcessStream:
        return ProcessStream(self._requester, lambda: self._open_session(verb, request, options))


def _lost(options: Opening) -> dict[str, Any]:
    """Those that are fields of the request."""
    return {name: value for name, value in options.items() if name not in ("command_id", "deadline_s")}


def _make(model: type[RequestT], **fields: Any) -> RequestT:
    """Build a request, leaving out what the caller did not give. Raises InvalidArgumentError."""
    try:
        return model(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as exc:
        violations = violations_of(exc, model)
        raise InvalidArgumentError(
            f"{violations[0]['field']}: {violations[0]['message']}", violations=violations
        ) from exc
