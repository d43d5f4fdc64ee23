"""The talk with one guest over its two ports: commands and their answers, pieces of streams, and the end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager

from vcnode.aio import deadline_as
from vcnode.drivers.agent.hyperstart import wire
from vcnode.drivers.agent.hyperstart.errors import RefusedError
from vcnode.drivers.agent.hyperstart.link import Link
from vcnode.drivers.agent.hyperstart.wire import Answer, Code, Control, Dialect, ProtocolError, Streams
from vcnode.errors import AgentError, UnsupportedError

PROBE_AGAIN_S = 0.25
"""Seconds after which a probe is repeated: a guest whose output is stuck drops the answer."""
CLOSE_LIMIT_S = 5.0


class Dialogue:
    """One connection to a guest. Whoever hears may raise ProtocolError or AgentError, which ends it.

    Args:
        vm_id: Its VM.
        seqs: Numbers of the streams that it has from before.
        fork: Whether the guest is clearcontainers'.
        on_event: Hears what the guest tells unasked.
        on_piece: Hears the streams.
        on_lost: Called once, with the reason, unless it is closed before.
    """

    def __init__(
        self,
        vm_id: str,
        seqs: Collection[int],
        *,
        fork: bool,
        on_event: Callable[[wire.ProcessEnded | wire.PodFinished], None],
        on_piece: Callable[[wire.Piece], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.vm_id = vm_id
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the guest has answered on both ports, or the connection is lost before."""
        self._fork = fork
        self._on_event = on_event
        self._hear_piece = on_piece
        self._hear_loss = on_lost
        self._control = Control()
        self._probe = new_seq()
        self._streams = Streams(self._probe, seqs)
        self.ctl = Link(self._on_control, self._on_lost)
        self.tty = Link(self._on_streams, self._on_lost)
        self._dialect: Dialect | None = None
        self._lost: str | None = None
        self._closed = False
        self._on_answer: dict[int, Callable[[Answer], None]] = {}
        self._probes: dict[int, asyncio.Event] = {}

    # -- the beginning and the end -----------------------------------------------------------------

    def greet(self) -> None:
        """Ask for the version, and for the first frame of the streams."""
        self.send(Code.VERSION, b"", self._on_version)
        self.probe_again()

    def probe_again(self) -> None:
        """Ask for the first frame of the streams, if it has not come yet."""
        if not self._streams.synced:
            self.tty.write(wire.frame(self._probe))

    @property
    def dialect(self) -> Dialect:
        """The version that the guest speaks. Raises AgentError before it has said so."""
        if self._dialect is None:
            raise AgentError(f"hyperstart in {self.vm_id} has not answered yet.")
        return self._dialect

    @property
    def is_over(self) -> bool:
        """Whether it is lost or closed."""
        return self._closed or self._lost is not None

    def check(self) -> None:
        """Raise AgentError when it is over."""
        if self._lost is not None:
            raise AgentError(f"The session with hyperstart in {self.vm_id} was lost: {self._lost}")
        if self._closed:
            raise AgentError(f"The session with hyperstart in {self.vm_id} is closed.")

    def fail(self, reason: str) -> None:
        """End it, and say why. Idempotent."""
        self._on_lost(reason)

    def abort(self) -> None:
        """End it at once, silently. Idempotent."""
        self._closed = True
        self.ctl.abort()
        self.tty.abort()
        self._release()

    async def close(self) -> None:
        """End it; returns when the sockets are closed. Idempotent."""
        self.abort()
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await self.ctl.gone()
            await self.tty.gone()

    # -- commands ----------------------------------------------------------------------------------

    def send(
        self,
        code: Code,
        payload: bytes,
        on_answer: Callable[[Answer], None],
        max_answer: int = wire.MAX_ANSWER_BYTES,
    ) -> None:
        """Send a command. *on_answer* is called with its answer, or with ticket 0 when the end comes first.

        Raises:
            UnsupportedError: It is too long.
        """
        try:
            ticket = self._control.send(code, payload, max_answer=max_answer)
        except ValueError as exc:
            raise UnsupportedError(f"{code.name} to hyperstart cannot be sent: {exc}.") from exc
        self._on_answer[ticket] = on_answer
        self._flush()

    async def command(
        self,
        code: Code,
        payload: bytes = b"",
        *,
        on_answer: Callable[[Answer], None] | None = None,
        max_answer: int = wire.MAX_ANSWER_BYTES,
    ) -> bytes:
        """Send a command and wait for its answer; *on_answer* is called even if nobody waits any more.

        Raises:
            RefusedError: The guest has answered ERROR.
            AgentError: The end came first.
        """
        self.check()
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def take(answer: Answer) -> None:
            if on_answer is not None and answer.ticket:
                on_answer(answer)
            if not answered.done():
                answered.set_result(answer)

        self.send(code, payload, take, max_answer)
        answer = await answered
        if not answer.ticket:
            self.check()
        if not answer.ok:
            told = answer.payload.rstrip(b"\0").decode("utf-8", "replace")[:200]
            why = f": {told}" if told else "; its console says why"
            raise RefusedError(f"hyperstart in {self.vm_id} refused {code.name}{why}.")
        return answer.payload

    def bounded(self, what: str, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """A block that waits for the answer to *what*. Raises AgentError when it takes longer."""
        return deadline_as(
            timeout_s,
            lambda: AgentError(f"hyperstart in {self.vm_id} did not answer {what} within {timeout_s:g} s."),
        )

    # -- streams -----------------------------------------------------------------------------------

    async def write_input(self, seq: int, data: memoryview, wanted: Callable[[], bool]) -> None:
        """Send input piece by piece, each once the guest has taken the one before, while it is *wanted*.

        How that shows: a frame of a number that nobody has is answered, in order. The guest writes what it
        has of the input to the process before it answers, if the process has room for it.
        """
        for piece in wire.pieces_of(data):
            await self.tty.writable()
            if not wanted():
                return
            self.check()
            probe = new_seq()
            taken = self._probes[probe] = asyncio.Event()
            try:
                self.tty.write(wire.frame(seq, bytes(piece)) + wire.frame(probe))
                while not await _came(taken):
                    self.check()
                    self.tty.write(wire.frame(probe))
            finally:
                del self._probes[probe]

    def end_input(self, seq: int) -> None:
        """Send the end of input."""
        self.tty.write(wire.frame(seq))

    # -- what comes --------------------------------------------------------------------------------

    def _on_version(self, answer: Answer) -> None:
        if not answer.ticket:
            return
        version = wire.parse_version(answer.payload)
        if version not in wire.DIALECTS:
            known = ", ".join(map(str, wire.DIALECTS))
            raise ProtocolError(f"API version {version}, and only {known} are known")
        self._dialect = wire.clearcontainers(version) if self._fork else wire.DIALECTS[version]
        self._look_whether_open()

    def _look_whether_open(self) -> None:
        if self._dialect is not None and self._streams.synced and not self.opened.done():
            self.opened.set_result(None)

    def _on_control(self, data: bytes) -> None:
        try:
            for event in self._control.receive_data(data):
                if isinstance(event, Answer):
                    if (on_answer := self._on_answer.pop(event.ticket, None)) is not None:
                        on_answer(event)
                elif not isinstance(event, wire.Ready):
                    self._on_event(event)
        except (ProtocolError, AgentError) as exc:
            self._broke(exc)
            return
        self._flush()

    def _on_streams(self, data: bytes) -> None:
        try:
            for piece in self._streams.receive_data(data):
                if not piece.data and (taken := self._probes.get(piece.seq)) is not None:
                    taken.set()
                else:
                    self._hear_piece(piece)
        except (ProtocolError, AgentError) as exc:
            self._broke(exc)
            return
        self._look_whether_open()

    def _broke(self, exc: Exception) -> None:
        self.fail(exc.message if isinstance(exc, AgentError) else f"The guest broke the protocol: {exc}.")

    def _on_lost(self, reason: str) -> None:
        if self.is_over:
            return
        self._lost = reason
        self.ctl.abort()
        self.tty.abort()
        self._hear_loss(reason)
        self._release()

    def _release(self) -> None:
        """Let everybody look who waits."""
        if not self.opened.done():
            self.opened.set_result(None)
        waiting, self._on_answer = self._on_answer, {}
        for on_answer in waiting.values():
            on_answer(Answer(0, False, b""))
        for taken in self._probes.values():
            taken.set()

    def _flush(self) -> None:
        self.ctl.write(self._control.data_to_send())


async def _came(event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(PROBE_AGAIN_S):
            await event.wait()
    except TimeoutError:
        return False
    return True


def new_seq() -> int:
    """A number that no stream has."""
    return secrets.randbelow(wire.MAX_SEQ - 1) + 1
