"""The processes of one guest: pieces of streams and ends find theirs, signals and input go to it."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets

from vcnode.drivers.agent.hyperstart import messages, wire
from vcnode.drivers.agent.hyperstart.dialogue import Dialogue, new_seq
from vcnode.drivers.agent.hyperstart.errors import RefusedError
from vcnode.drivers.agent.hyperstart.process import SIGKILL, HyperProcess, Running
from vcnode.drivers.agent.hyperstart.wire import Answer, Code, Dialect, ProtocolError
from vcnode.errors import UnsupportedError
from vcnode.models.vm import GuestProcess

LINGER_S = 2.0
"""Seconds that the last output of a process may take after the guest has told its end."""
SIGNAL_LIMIT_S = 10.0
"""Seconds for the answer to a signal or a window size; the Protocol gives those no limit of their own."""


class Processes:
    """What runs, main processes among it; `process.Owner` of each.

    Args:
        dialogue: With the guest; not open yet.
    """

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._by_seq: dict[int, Running] = {}
        self._numbers = itertools.count(1)
        self._session_id = secrets.token_hex(4)

    @property
    def _dialect(self) -> Dialect:
        return self._dialogue.dialect

    # -- for the session ---------------------------------------------------------------------------

    def add(self, running: Running) -> None:
        """Hear of a process from now on; its output may come before the answer to its start."""
        self._by_seq |= dict.fromkeys(running.seqs, running)

    def forget(self, running: Running) -> None:
        """It was not started: who waits for it learns that it has ended, and `Running.on_end` does not."""
        running.on_end = None
        self._drop(running)
        running.finish(signal_deaths_are_zero=False)

    def of(self, container_id: str) -> list[Running]:
        """What was executed in a container, and runs."""
        return [
            running
            for running in set(self._by_seq.values())
            if running.container_id == container_id and running.started and not _is_main(running)
        ]

    async def execute(
        self, wanted: GuestProcess, container_id: str, tty: tuple[int, int] | None
    ) -> HyperProcess:
        """Start a process; one whose start nobody waits for any more is killed.

        Raises:
            RefusedError, AgentError, UnsupportedError: It was not started.
        """
        running = Running(
            container_id=container_id,
            process_id=f"x{next(self._numbers)}-{self._session_id}",
            stdio=new_seq(),
            stderr=0 if tty else new_seq(),
            terminal=tty is not None,
        )
        told = messages.process(
            wanted,
            self._dialect,
            process_id=running.process_id,
            stdio=running.stdio,
            stderr=running.stderr,
            terminal=running.terminal,
        )
        handle = HyperProcess(self, running)
        self.add(running)
        try:
            on_answer = functools.partial(self._on_execute, running)
            payload = messages.execute(container_id, told)
            await self._dialogue.command(Code.EXECCMD, payload, on_answer=on_answer)
            if tty is not None:
                await self._resize(running, *tty)
        except asyncio.CancelledError:
            handle.discard()
            raise
        return handle

    async def signal(self, running: Running, number: int) -> None:
        """Send a signal; nothing if it has ended. Raises UnsupportedError where processes have no ids."""
        if running.exit is not None:
            return
        if number == SIGKILL:
            self.kills(running)
        if _is_main(running):
            payload = messages.kill_container(running.container_id, number, self._dialect, everyone=False)
            await self._unless_it_ends(running, Code.KILLCONTAINER, payload)
        elif self._dialect.named_processes:
            payload = messages.signal_process(running.container_id, running.process_id, number)
            await self._unless_it_ends(running, Code.SIGNALPROCESS, payload)
        else:
            self.check()
            raise UnsupportedError(
                f"This hyperstart (API version {self._dialect.version}) has no command that signals what was"
                " executed in a container."
            )

    def kills(self, running: Running) -> None:
        """Nobody need read what a process that is killed has written; it must not keep its end from us."""
        running.killed = True
        self.look_at_readers()

    async def kill_all(self) -> None:
        """Kill what was executed in this session, as far as that can be done; returns when it is done.

        Raises:
            AgentError: The session is over.
        """
        executed = [running for running in set(self._by_seq.values()) if not _is_main(running)]
        for running in executed:
            if not running.killed:
                self.kill_unasked(running)
        if executed:
            await self._dialogue.command(Code.PING)  # answered after all that was sent before

    def wake_all(self) -> None:
        """Let everybody look who waits: the session is over."""
        for running in set(self._by_seq.values()):
            running.wake()

    # -- what comes --------------------------------------------------------------------------------

    def on_piece(self, piece: wire.Piece) -> None:
        """A piece of a stream came. Raises ProtocolError."""
        running = self._by_seq.get(piece.seq)
        if running is None:
            return  # of a process of an earlier session, or the end of one that has ended
        if not piece.data:
            # Also said of a process that has just ended, to input that came too late.
            running.eof = running.eof or piece.seq == running.stdio
        elif not running.eof:
            running.take(piece.seq, piece.data)
            self.look_at_readers()
        elif piece.seq == running.stdio and len(piece.data) == 1 and self._dialect.exit_on_stream:
            running.code = piece.data[0] if running.code is None else running.code
        else:
            raise ProtocolError("output after its end")
        self._look_whether_ended(running)

    def on_end(self, event: wire.ProcessEnded) -> None:
        """The guest tells that a process has ended."""
        for running in set(self._by_seq.values()):
            if (running.container_id, running.process_id) == (event.container, event.process):
                running.code = event.status if running.code is None else running.code
                self._look_whether_ended(running)
                if running.exit is None:
                    # What it has left running may hold its output open.
                    asyncio.get_running_loop().call_later(LINGER_S, self.finish, running)

    def finish(self, running: Running) -> None:
        """It has ended, as far as can be known; nothing if the session is over."""
        if not self._dialogue.is_over:
            self._drop(running)
            running.finish(signal_deaths_are_zero=self._dialect.signal_deaths_are_zero)

    def _look_whether_ended(self, running: Running) -> None:
        if running.eof and running.code is not None:
            self.finish(running)

    def _drop(self, running: Running) -> None:
        for seq in running.seqs:
            self._by_seq.pop(seq, None)
        self.look_at_readers()

    def _on_execute(self, running: Running, answer: Answer) -> None:
        running.started = answer.ok
        if not answer.ok:
            self.forget(running)
        elif running.killed:
            self.kill_unasked(running)

    # -- process.Owner -----------------------------------------------------------------------------

    def check(self) -> None:
        """See `process.Owner`."""
        self._dialogue.check()

    async def write_input(self, running: Running, data: memoryview) -> None:
        """See `process.Owner`."""
        await self._dialogue.write_input(
            running.stdio, data, lambda: running.exit is None and not running.eof
        )

    def end_input(self, running: Running) -> None:
        """See `process.Owner`."""
        self._dialogue.end_input(running.stdio)

    async def signal_process(self, running: Running, number: int) -> None:
        """See `process.Owner`."""
        async with self._dialogue.bounded("a signal", SIGNAL_LIMIT_S):
            await self.signal(running, number)

    async def resize_process(self, running: Running, rows: int, columns: int) -> None:
        """See `process.Owner`."""
        async with self._dialogue.bounded("WINSIZE", SIGNAL_LIMIT_S):
            await self._resize(running, rows, columns)

    def kill_unasked(self, running: Running) -> None:
        """See `process.Owner`. Where processes have no ids, all that can be done is to end its input."""
        self.kills(running)
        if self._dialogue.is_over or not running.started:
            return  # a start under way: its answer leads here again
        if self._dialect.named_processes:
            payload = messages.signal_process(running.container_id, running.process_id, SIGKILL)
            self._dialogue.send(Code.SIGNALPROCESS, payload, _ignore)
        elif not running.terminal and not running.input_ended:
            running.input_ended = True
            self.end_input(running)

    def look_at_readers(self) -> None:
        """See `process.Owner`."""
        behind = any(
            reader.is_behind
            for running in self._by_seq.values()
            if not running.killed
            for reader in running.readers
        )
        self._dialogue.tty.hold(behind)

    async def _resize(self, running: Running, rows: int, columns: int) -> None:
        payload = messages.window(
            running.container_id, running.process_id, running.stdio, rows, columns, self._dialect
        )
        await self._unless_it_ends(running, Code.WINSIZE, payload)

    async def _unless_it_ends(self, running: Running, code: Code, payload: bytes) -> None:
        """Send a command about a process; a refusal is none if the process has ended meanwhile."""
        try:
            await self._dialogue.command(code, payload)
        except RefusedError:
            if running.exit is None and not running.eof and running.code is None:
                raise


def _is_main(running: Running) -> bool:
    return running.process_id == messages.MAIN


def _ignore(answer: Answer) -> None:
    """Nobody asks."""
