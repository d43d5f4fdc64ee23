"""Reaches guests by SSH, over the pod's network."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path

import asyncssh

import vcnode
from vcnode.aio import deadline_as
from vcnode.drivers.agent.sshd import keys
from vcnode.drivers.agent.sshd.session import SshdSession
from vcnode.drivers.base import PLAIN_ACCESS, AgentAccess, GuestSession, Vm
from vcnode.errors import AgentError, InvalidArgumentError
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, AgentType
from vcnode.models.vm import SHARE_TAG, Channel

log = logging.getLogger(__name__)

RETRY_S = 0.1
RETRY_MAX_S = 2.0
ATTEMPT_LIMIT_S = 20.0
"""Seconds for one attempt, of which a busy guest needs most for its key exchange."""
KEEPALIVE_S = 10.0
KEEPALIVE_COUNT = 3
"""Questions without an answer after which a guest counts as lost."""


class SshdAgent:
    """The `GuestAgent` for guests with an SSH server.

    Args:
        state_dir: Holds the node's own key, which is made if it is missing.

    Raises:
        StorageError: That cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        self._own = keys.own_key(state_dir)

    @property
    def info(self) -> DriverInfo:
        """See `GuestAgent.info`."""
        return DriverInfo(
            type=AgentType.SSHD,
            version=vcnode.__version__,
            capabilities=("containers", "exec", "forward", "privileges", "readonly", "tty"),
            notes=(f"The node logs in with the key {keys.public_line(self._own)}",),
        )

    @property
    def share_tag(self) -> str:
        """See `GuestAgent.share_tag`: that of the native agent, for want of another."""
        return SHARE_TAG

    def channels(self, config: AgentConfig) -> tuple[Channel, ...]:
        """See `GuestAgent.channels`: none, it comes over the network."""
        return ()

    async def connect(self, vm: Vm, *, access: AgentAccess = PLAIN_ACCESS, timeout_s: float) -> GuestSession:
        """See `GuestAgent.connect`: tries until the guest lets us in, or the time is over.

        A guest whose server has another key than it must have is given up at once.

        Raises:
            InvalidArgumentError: The pod has no address, or its key cannot be used.
        """
        vm_id = vm.record.vm_id
        target = Target.of(vm_id, access)
        key = self._key(access)
        attempts = Attempts()
        late = lambda: AgentError(  # noqa: E731
            f"The SSH server of {vm_id} at {target} let nobody in within {timeout_s:g} s; at last:"
            f" {attempts.last}."
        )
        async with deadline_as(timeout_s, late):
            while True:
                try:
                    return await _open(target, key)
                except NotYetError as exc:
                    attempts.last = str(exc)
                    log.debug("No session with %s yet", target, exc_info=exc)
                # Nothing tells when a guest begins to listen.
                await asyncio.sleep(attempts.next_pause_s())

    def _key(self, access: AgentAccess) -> asyncssh.SSHKey:
        if access.private_key is not None:
            return keys.read_private(access.private_key, "pod.agent_config.sshd.private_key_file")
        return self._own


@dataclass(slots=True)
class Attempts:
    """What the last attempt came to, and how long to wait for the next."""

    last: str = "nothing was tried"
    pause_s: float = RETRY_S

    def next_pause_s(self) -> float:
        """Seconds until the next attempt; grows."""
        pause_s, self.pause_s = self.pause_s, min(self.pause_s * 1.5, RETRY_MAX_S)
        return pause_s


@dataclass(frozen=True, slots=True)
class Target:
    """Where to log in, as whom, and what the server has to prove."""

    vm_id: str
    host: str
    port: int
    user: str
    host_key: str | None
    """As `keys.public_line` has it; None: the first one is taken."""

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"

    @classmethod
    def of(cls, vm_id: str, access: AgentAccess) -> Target:
        """From a pod's settings and addresses.

        Raises:
            InvalidArgumentError: The pod has no address.
        """
        config = access.config.sshd
        host = config.server or next(
            (str(ip_interface(address).ip) for e in access.endpoints for address in e.addresses), None
        )
        if host is None:
            raise InvalidArgumentError.field(
                "pod.network", "gives the guest no address at which the agent sshd could reach it"
            )
        return cls(vm_id, host, config.port, config.username, config.host_key or access.host_key)


class NotYetError(Exception):
    """A guest that may still be booting."""


class _Client(asyncssh.SSHClient):
    """Judges the server's key, and hears of the end of the connection."""

    def __init__(self, expected: str | None) -> None:
        self._expected = expected
        self.refused: str | None = None
        self.session: SshdSession | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        found = keys.public_line(key)
        if self._expected is not None and found != self._expected:
            self.refused = found
        return self.refused is None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.session is not None:
            self.session.on_lost(exc)


async def _open(target: Target, key: asyncssh.SSHKey) -> SshdSession:
    """One attempt.

    Raises:
        NotYetError: The guest is not there yet, or does not know us yet.
        AgentError: It is another one, or speaks another protocol.
    """
    client = _Client(target.host_key)
    # A pinned key names the one algorithm: a guest that has several shows that one.
    algorithms = keys.algorithms_for(target.host_key)
    try:
        async with asyncio.timeout(ATTEMPT_LIMIT_S):
            connection, _ = await asyncssh.create_connection(
                lambda: client,
                target.host,
                target.port,
                username=target.user,
                client_keys=[key],
                known_hosts=([], [], []),
                server_host_key_algs=algorithms,
                x509_trusted_certs=None,
                preferred_auth="publickey",
                agent_path=None,
                config=None,
                compression_algs=None,
                keepalive_interval=KEEPALIVE_S,
                keepalive_count_max=KEEPALIVE_COUNT,
            )
    except asyncssh.HostKeyNotVerifiable as exc:
        raise AgentError(
            f"The SSH server of {target.vm_id} at {target} has the host key {client.refused}, and must have"
            f" {target.host_key}; if that is meant, give the new one as agent_config.sshd.host_key.",
            host_key=client.refused,
        ) from exc
    except (asyncssh.KeyExchangeFailed, asyncssh.ProtocolNotSupported) as exc:
        raise AgentError(
            f"The SSH server of {target.vm_id} at {target} speaks nothing that we do: {exc}."
        ) from exc
    except asyncssh.PermissionDenied as exc:  # keys may be set late in a boot
        raise NotYetError(f"it does not take the key {keys.public_line(key)}") from exc
    except TimeoutError as exc:
        raise NotYetError(f"no answer within {ATTEMPT_LIMIT_S:g} s") from exc
    except (OSError, asyncssh.Error) as exc:
        raise NotYetError(str(exc) or type(exc).__name__) from exc
    session = client.session = SshdSession(target.vm_id, connection)
    try:
        async with asyncio.timeout(ATTEMPT_LIMIT_S):
            await session.look()
    except (TimeoutError, AgentError) as exc:
        with contextlib.suppress(Exception):
            await session.close()
        raise NotYetError(f"no shell: {exc}") from exc
    except BaseException:
        connection.abort()
        raise
    return session
