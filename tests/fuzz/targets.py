"""The targets. Each takes any bytes, and raises when the code behind it does what it must not.

What a target calls may refuse its input with the error that it documents; anything else that comes out of it
(another exception, too much memory kept, a file outside of its directory) is a bug.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.unit.guest.test_protocol import OTHER_SESSION, connected
from vcnode.drivers.agent.hyperstart import wire as hyper
from vcnode.drivers.agent.native import messages
from vcnode.drivers.network.cni import config, results
from vcnode.drivers.storage import oci, unpack
from vcnode.errors import InvalidArgumentError, VcnodeError
from vcnode.guest.protocol import (
    MAX_MESSAGE,
    MORE,
    SYNC_ZEROS,
    EventReceived,
    Guest,
    Host,
    LocalError,
    ProtocolError,
    ReplyReceived,
    RequestReceived,
    encode_frame,
)
from vcnode.handlers import headers
from vcnode.handlers.decode import decode
from vcnode.models import wire
from vcnode.models.commands import COMMANDS

VERBS = sorted(COMMANDS)
MOST_KEPT = MAX_MESSAGE + len(SYNC_ZEROS)
"""Most bytes of input that one end of the guest protocol may hold: one message, and one frame."""


def commands(data: bytes) -> None:
    """A command's body and headers, as anybody may send them. The first byte picks the verb."""
    if not data:
        return
    model = COMMANDS[VERBS[data[0] % len(VERBS)]].request
    try:
        request = decode(model, data[1:])
    except InvalidArgumentError as exc:
        if not exc.details["violations"] or len(str(exc)) > 10_000:
            raise AssertionError(f"an error that does not help: {exc}") from exc
    else:
        if decode(model, request.model_dump_json(exclude_unset=True).encode()) != request:
            raise AssertionError(f"{request!r} does not survive a round trip")
    text = data[1:65].decode("latin-1")
    names = (wire.COMMAND_ID, wire.DEADLINE, wire.EXPECTED_REVISION, wire.TRACEPARENT)
    for name in names:
        try:
            headers.parse({name: text})
        except InvalidArgumentError:
            continue


def host(data: bytes) -> None:
    """What a guest sends to the node: a session is open, then these bytes come in two chunks."""
    end, _ = connected()
    _feed(end, data)


def guest(data: bytes) -> None:
    """What a node sends to the guest agent, which must never fail, whatever comes."""
    _, end = connected()
    try:
        _feed(end, data)
    except ProtocolError as exc:
        raise AssertionError("the guest's end is to hunt for the next sync, not to fail") from exc
    # It finds the next session, whatever stood in its way.
    other = Host(OTHER_SESSION)
    other.send_sync()
    for _ in end.receive_data(other.data_to_send()):
        pass
    if not end.established:
        raise AssertionError("the guest does not find the next session")


def _frames(data: bytes) -> bytes:
    """What the peer sends: the bytes as they are, or, when the first is odd, cut into frames with checksums.

    A fuzzer does not guess a checksum, so it would never come past the first look at a frame.
    """
    if not data or not data[0] & 1:
        return data
    made = bytearray()
    at = 1
    while at + 4 <= len(data):
        kind, flags, stream, length = data[at : at + 4]
        payload = data[at + 4 : at + 4 + length]
        made += encode_frame(kind % 10, stream % 4, payload, flags & MORE)
        at += 4 + length
    return bytes(made)


def _feed(end: Host | Guest, data: bytes) -> None:
    data = _frames(data)
    half = len(data) // 2
    for chunk in (data[:half], data[half:]):
        try:
            for event in end.receive_data(chunk):
                _look(event)
                if isinstance(end, Guest) and isinstance(event, RequestReceived):
                    end.send_reply(event, {})
        except ProtocolError:
            if isinstance(end, Guest):
                raise
            return
        except LocalError:
            continue
        if len(end._incoming) + len(end._partial) > MOST_KEPT:
            raise AssertionError("it keeps more input than a message and a frame")


def _look(event: object) -> None:
    """What the node makes of a guest's message."""
    if isinstance(event, EventReceived):
        content = event.fields
    elif isinstance(event, ReplyReceived):
        content = event.result or {}
    else:
        return
    for read in (
        messages.container_exited,
        messages.container_states,
        messages.exit_code,
        messages.pid,
        messages.process_id,
    ):
        try:
            read(content)
        except (messages.BadFieldError, VcnodeError):
            continue


def manifest(data: bytes) -> None:
    """An image's manifest, index or config, as a registry may serve it."""
    try:
        document = oci.parse(data)
    except oci.BadImageError:
        return
    for read in (oci.image_config, oci.contents, oci.choose, oci.descriptor):
        try:
            read(document)
        except oci.BadImageError:
            continue


def cni(data: bytes) -> None:
    """What a CNI plugin answers, and what stands in the directory of configurations."""
    results.parse_failure(data)
    for parse in (results.parse_spoken, results.parse_result, config.parse):
        try:
            parsed = parse(data)
        except ValueError as exc:
            if len(str(exc)) > 1000:
                raise AssertionError(f"an error without end: {exc}") from exc
            continue
        if isinstance(parsed, config.Network):
            if config.from_json(json.loads(json.dumps(parsed.dump()))) != parsed:
                raise AssertionError("what is kept of a network is another")
        elif isinstance(parsed[-1], results.Result):
            parsed[-1].addresses_of("eth0")
            if parsed[-1].dns is not None:
                parsed[-1].dns.config()


def layer(data: bytes) -> None:
    """A layer of an image: nothing beside the directory that it is unpacked into may change."""
    top = Path(tempfile.mkdtemp(prefix="vcfuzz-"))
    try:
        root, precious = top / "root", top / "precious"
        root.mkdir(mode=0o700)
        precious.mkdir()
        (precious / "file").write_text("precious")
        (top / "tar").write_bytes(data)
        tar_fd = os.open(top / "tar", os.O_RDONLY)
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        before = os.listdir("/proc/self/fd")
        try:
            unpack.unpack(tar_fd, root_fd, reserve_bytes=0, max_bytes=1 << 20)
        except (unpack.RefusedError, OSError):
            pass
        finally:
            if len(os.listdir("/proc/self/fd")) != len(before):
                raise AssertionError("a descriptor was left open")
            os.close(tar_fd)
            os.close(root_fd)
        if sorted(os.listdir(top)) != ["precious", "root", "tar"] or os.listdir(precious) != ["file"]:
            raise AssertionError("something was made beside the directory")
        if (precious / "file").read_text() != "precious":
            raise AssertionError("a file beside the directory was changed")
    finally:
        shutil.rmtree(top)


def hyperstart(data: bytes) -> None:
    """What hyperstart sends on both channels; before its first answer when the first byte is small."""
    control, streams = hyper.Control(), hyper.Streams(1)
    control.send(hyper.Code.VERSION)
    control.data_to_send()
    if data[:1] > b"\x7f":
        control.receive_data(struct.pack(">III", hyper.Code.ACK, 12, 4244))
        streams.receive_data(hyper.frame(1))
    for receive, kept in (
        (control.receive_data, control._received),
        (streams.receive_data, streams._received),
    ):
        half = len(data) // 2
        for chunk in (data[1:half], data[half:]):
            try:
                receive(chunk)
            except hyper.ProtocolError:
                break
            if len(kept) > hyper.MAX_FRAME_BYTES + hyper.STREAM.size:
                raise AssertionError("it keeps more input than a frame")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (commands, host, guest, hyperstart, manifest, cni, layer)
}
"""Every target by its name."""
