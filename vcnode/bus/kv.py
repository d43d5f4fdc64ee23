"""What the fleet can look up: the last status of every pod, and the lease of every node.

Both buckets are copies. The truth is the node's database; whatever the buckets hold of this node is
compared with it at every connection and put right.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, KeyValueConfig
from pydantic import ValidationError

from vcnode import aio
from vcnode.bus.connection import Connection
from vcnode.bus.library import SturdyClient, uncancelled
from vcnode.bus.streams import storage
from vcnode.errors import UnavailableError, VcnodeError
from vcnode.models.node import NodeLease
from vcnode.models.subjects import Subjects
from vcnode.pods.contact import Contact
from vcnode.settings import NatsSettings

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

log = logging.getLogger(__name__)

API_TIMEOUT_S = 10.0
RETRY_S = 5.0
INACTIVE_S = 5.0
"""After so long without its reader the server forgets a consumer."""
RENEWALS = 3
"""Renewals of a lease within its time."""
HASTE = 10
"""A renewal that is not answered within this part of a lease is sent again: the server that led the bucket
may have died with it, and the others need up to 9 s to elect another."""
EARLIER = 0.2
"""Renewals come up to this share of their interval early, at random: nodes that a restart of the server has
put in step get out of it."""
LOOK_S = 0.5
"""Least seconds between two looks whether the lease says something else; a tenth of short leases."""
RECHECK_S = 600.0
"""Seconds, about, between two looks at what the bucket has: somebody may have purged it."""
GATHER_S = 0.05
"""Seconds between two looks for changed pods: a start makes half a dozen changes, and the last one counts."""


class _ConnectionLost(Exception):  # noqa: N818 -- a signal, not a failure
    """Ends a session; the next one begins when the connection is back."""


class NameTakenError(UnavailableError):
    """Another node of the same name is alive."""


async def open_bucket(
    js: JetStreamContext, name: str, description: str, settings: NatsSettings, *, ttl_s: float | None = None
) -> KeyValue:
    """The bucket called *name*, made if it is missing and never changed if it is there.

    Raises:
        nats.errors.Error: JetStream refuses or does not answer.
    """
    try:
        return await uncancelled(js.key_value(name))
    except nats.js.errors.NotFoundError:
        pass
    config = KeyValueConfig(
        bucket=name,
        description=description,
        history=1,
        ttl=ttl_s,
        storage=storage(settings),
        replicas=settings.stream_replicas,
        direct=True,  # a look-up then names its key in its subject, where permissions can see it
    )
    try:
        made = await uncancelled(js.create_key_value(config))
    except nats.js.errors.BadRequestError:
        return await uncancelled(js.key_value(name))  # another node made it meanwhile, with other settings
    log.info("Made bucket %s", name)
    return made


class PodMirror:
    """Keeps the bucket of pods as the node's pods are; key ``<node>.<pod>``, value a ``PodStatus``.

    Args:
        connection: To NATS.
        pods: The status of every pod as JSON, by id.
        changed: Set whenever they may have changed; cleared here.
        node_name: The node's name.
        subjects: Names under the prefix.
        settings: For a bucket that does not exist yet.
    """

    def __init__(
        self,
        connection: Connection,
        pods: Callable[[], Mapping[str, bytes]],
        changed: asyncio.Event,
        *,
        node_name: str,
        subjects: Subjects,
        settings: NatsSettings,
    ) -> None:
        self._connection = connection
        self._pods = pods
        self._changed = changed
        self._node_name = node_name
        self._subjects = subjects
        self._settings = settings
        self._session = aio.Interruptible()
        self._known: tuple[KeyValue, dict[str, bytes]] | None = None
        """The bucket, and what it has of this node; None while that is not known."""
        self._last_complaint = ""
        connection.on_change(self._on_change)

    async def flush(self, *, timeout_s: float) -> None:
        """Put the bucket right once more, at most *timeout_s* seconds; `run` must have ended."""
        if self._known is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._put_right(*self._known)
        except (nats.errors.Error, OSError, TimeoutError, VcnodeError) as exc:
            log.warning("The last changes of pods are mirrored after the next start", exc_info=exc)

    async def run(self) -> None:
        """Mirror for ever; ends by cancellation only."""
        while True:
            await self._connection.wait_connected()
            self._session, self._known = aio.Interruptible(), None
            try:
                async with self._session:
                    await self._mirror()
            except _ConnectionLost:
                continue
            except Exception as exc:  # whatever it is: the mirror must not stand still for ever
                self._last_complaint = _complain("Pods cannot be mirrored", exc, self._last_complaint)
                await asyncio.sleep(RETRY_S)

    async def _mirror(self) -> None:
        js = self._connection.client.jetstream(timeout=API_TIMEOUT_S)
        bucket = await open_bucket(
            js, self._subjects.pod_bucket, "Last status of every pod, by node and pod", self._settings
        )
        while True:
            self._known = bucket, await self._read(js)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S * random.uniform(0.5, 1.5)):  # noqa: S311 -- spreading
                    await self._follow(*self._known)

    async def _follow(self, bucket: KeyValue, there: dict[str, bytes]) -> None:
        while True:
            self._changed.clear()
            await self._put_right(bucket, there)
            self._last_complaint = ""
            await asyncio.sleep(GATHER_S)
            await self._changed.wait()

    async def _read(self, js: JetStreamContext) -> dict[str, bytes]:
        """What the bucket has of this node.

        By a consumer with a name, not by the library's watcher: then what it filters is part of the API's
        subject, and permissions can keep a node from reading what is another's.
        """
        name = self._subjects.pod_bucket
        start = f"$KV.{name}.{self._node_name}."
        client = self._connection.client
        inbox = client.new_inbox()
        sub = await uncancelled(client.subscribe(inbox))
        try:
            config = ConsumerConfig(
                name=f"mirror-{secrets.token_hex(8)}",
                deliver_subject=inbox,
                deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=AckPolicy.NONE,
                max_deliver=1,
                filter_subject=f"{start}>",
                inactive_threshold=INACTIVE_S,
                mem_storage=True,
                num_replicas=1,
            )
            info = await uncancelled(js.add_consumer(f"KV_{name}", config))
            sent = info.delivered.consumer_seq if info.delivered else 0
            found: dict[str, bytes] = {}
            for _ in range(sent + (info.num_pending or 0)):
                msg = await uncancelled(sub.next_msg(timeout=API_TIMEOUT_S))
                if "KV-Operation" not in (msg.headers or {}):  # else: the mark that a deletion leaves (ADR-8)
                    found[msg.subject.removeprefix(start)] = msg.data
            return found
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(sub.unsubscribe())

    async def _put_right(self, bucket: KeyValue, there: dict[str, bytes]) -> None:
        """Make *there*, which is what the bucket has, and the bucket itself equal to the truth."""
        pods = self._pods()
        for pod_id in [pod_id for pod_id in there if pod_id not in pods]:
            await uncancelled(bucket.delete(f"{self._node_name}.{pod_id}"))
            del there[pod_id]
        for pod_id, body in pods.items():
            if there.get(pod_id) != body:
                await uncancelled(bucket.put(f"{self._node_name}.{pod_id}", body))
                there[pod_id] = body

    def _on_change(self, up: bool) -> None:
        if not up:
            self._session.interrupt(_ConnectionLost())


class Lease:
    """Keeps this node's entry in the bucket of nodes, and sees to it that a name is used once.

    It is renewed in time, and published anew at once when `look` finds that the node has become another one:
    its state, labels, taints, and what pods may have in all. What pods have of it waits for the next renewal,
    or every start would be written here as well.

    A node that finds its name taken by another state directory is not let in: its connection does not come up
    until the other has gone (it releases the lease when it stops, and loses it ``lease_s`` after it was
    last heard of). Without JetStream there are no leases, and nothing is refused.

    Args:
        connection: Its clients are refused while the name is taken.
        describe: What the lease says now.
        contact: Hears of each renewal, with the time at which it was begun; and of a server that has no
            JetStream, where nobody could hear more of this node.
        subjects: Names under the prefix.
        settings: ``lease_s``, and for a bucket that does not exist yet.
    """

    def __init__(
        self,
        connection: Connection,
        describe: Callable[[], NodeLease],
        contact: Contact,
        *,
        subjects: Subjects,
        settings: NatsSettings,
    ) -> None:
        self._connection = connection
        self._describe = describe
        self._contact = contact
        self._subjects = subjects
        self._settings = settings
        self._revision: int | None = None
        self._opened: tuple[SturdyClient, KeyValue] | None = None
        self._published: NodeLease | None = None
        self._changed = asyncio.Event()
        self._look_at = 0.0
        """Loop time before which no change is looked at."""
        self._rival: tuple[int, float] | None = None
        """Revision of somebody else's lease, and when it was first seen (monotonic)."""
        self._last_complaint = ""
        connection.on_client(self._set_up)
        connection.on_change(self._on_connection)

    def _on_connection(self, up: bool) -> None:
        """Renew at once when the server is back: who has paused pods for want of it waits for that."""
        if up:
            self._published = None
            self._changed.set()

    def look(self) -> None:
        """Something that the lease says may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Renew for ever; ends by cancellation only."""
        loop = asyncio.get_running_loop()
        renewed = True
        while True:
            interval_s = self._settings.lease_s / RENEWALS * random.uniform(1 - EARLIER, 1)  # noqa: S311
            renew_at = loop.time() + (interval_s if renewed else self._haste_s)
            while loop.time() < renew_at and not await self._became_another(renew_at):
                pass
            renewed = False
            if not self._connection.connected:
                continue
            try:
                async with asyncio.timeout(self._haste_s):
                    await self._renew(self._connection.client)
                self._last_complaint = ""
                renewed = True
            except Exception as exc:  # whatever it is: without this task the node would count as gone
                self._opened = None
                self._last_complaint = _complain("The lease is not renewed", exc, self._last_complaint)

    @property
    def _haste_s(self) -> float:
        return min(API_TIMEOUT_S, max(1.0, self._settings.lease_s / HASTE))

    async def _became_another(self, until: float) -> bool:
        """Wait for a change that is to be published at once; False: it was none, or it is time to renew."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
                await asyncio.sleep(self._look_at - loop.time())
        except TimeoutError:
            return False
        self._changed.clear()
        self._look_at = loop.time() + min(LOOK_S, self._settings.lease_s / 10)
        try:
            return self._published is None or _essence(self._published) != _essence(self._describe())
        except Exception:  # whatever it is: whoever publishes it complains
            return True

    async def release(self) -> None:
        """Give the name back, so that another may use it at once."""
        if self._revision is None or not self._connection.connected:
            return
        try:
            async with asyncio.timeout(API_TIMEOUT_S):
                bucket = await self._bucket(self._connection.client)
                await uncancelled(bucket.delete(self._describe().node, last=self._revision))
        except (nats.errors.Error, OSError, TimeoutError, VcnodeError) as exc:
            log.warning("The lease could not be released; it runs out by itself", exc_info=exc)
        self._revision = None

    async def _set_up(self, client: SturdyClient) -> None:
        try:
            await self._renew(client)
        except VcnodeError:
            raise
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            self._last_complaint = _complain("There is no lease", exc, self._last_complaint)

    async def _renew(self, client: SturdyClient) -> None:
        """Take or renew the lease, and note the contact. Raises as `_claim`."""
        began_s = self._contact.clock()
        try:
            await self._claim(client)
        except nats.js.errors.ServiceUnavailableError:
            self._contact.note(began_s)
            raise
        self._contact.note(began_s)

    async def _bucket(self, client: SturdyClient) -> KeyValue:
        """The bucket; looked up once per client, or every renewal would ask for it first."""
        if self._opened is not None and self._opened[0] is client:
            return self._opened[1]
        bucket = await self._open(client)
        self._opened = client, bucket
        return bucket

    async def _open(self, client: SturdyClient) -> KeyValue:
        js = client.jetstream(timeout=API_TIMEOUT_S)
        return await open_bucket(
            js,
            self._subjects.node_bucket,
            "Leases of the nodes, with what they have and use",
            self._settings,
            ttl_s=self._settings.lease_s,
        )

    async def _claim(self, client: SturdyClient) -> None:
        """Take or renew the lease.

        Raises:
            NameTakenError: Another node holds it.
            nats.errors.Error: JetStream refuses or does not answer.
        """
        bucket = await self._bucket(client)
        lease = self._describe()
        body = lease.model_dump_json().encode()
        if self._revision is not None:
            try:
                self._revision = int(await uncancelled(bucket.update(lease.node, body, last=self._revision)))
                self._published = lease
                return
            except nats.js.errors.KeyWrongLastSequenceError:
                self._revision = None  # it ran out, or somebody else has taken it
        try:
            entry = await uncancelled(bucket.get(lease.node))
        except nats.js.errors.KeyNotFoundError:
            self._revision = await self._write(bucket.create(lease.node, body), lease)
            return
        holder = _parse(entry.value or b"")
        if holder is not None and holder.identity != lease.identity:
            self._respect(holder, entry.revision or 0)
        self._revision = await self._write(bucket.update(lease.node, body, last=entry.revision), lease)
        self._rival = None

    async def _write(self, write: object, lease: NodeLease) -> int:
        try:
            revision = int(await uncancelled(write))  # type: ignore[arg-type]
        except nats.js.errors.KeyWrongLastSequenceError as exc:
            raise NameTakenError(f"Another node called {lease.node} was quicker to take the name.") from exc
        self._published = lease
        return revision

    def _respect(self, holder: NodeLease, revision: int) -> None:
        """Refuse, unless the holder has not renewed its lease for as long as it lasts (by our clock)."""
        now = time.monotonic()
        if self._rival is None or self._rival[0] != revision:
            self._rival = (revision, now)
        if now - self._rival[1] < holder.lease_s:
            raise NameTakenError(
                f"Another node agent is called {holder.node} (on host {holder.host}, process {holder.pid}); "
                "give each node its own node_name. If it is gone, its name is free "
                f"{holder.lease_s:g} s after it was last heard of.",
                node=holder.node,
                host=holder.host,
            )
        log.warning("Taking over the name of a node that is gone", extra={"host": holder.host})


def _essence(lease: NodeLease) -> tuple[object, ...]:
    """What schedulers are to know at once."""
    return lease.state, lease.labels, lease.taints, lease.capacity, lease.allocatable


def _parse(body: bytes) -> NodeLease | None:
    try:
        return NodeLease.model_validate_json(body)
    except ValidationError:
        return None  # whatever it is, no node keeps it up


def _complain(what: str, exc: Exception, last: str) -> str:
    """Log what is wrong, once per cause rather than at each of endless attempts; returns the cause."""
    text = f"{type(exc).__name__}: {exc}"
    if isinstance(exc, nats.js.errors.ServiceUnavailableError):
        text = "the server has no JetStream, or none for this account"
    known = isinstance(exc, (nats.errors.Error, OSError, TimeoutError, VcnodeError))
    log.log(
        logging.DEBUG if text == last else logging.WARNING,
        "%s: %s",
        what,
        text,
        exc_info=None if known else exc,
    )
    return text
