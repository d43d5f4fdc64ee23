"""Holds every message that a test sends or receives against the schemas in ``contracts/``.

Four places see them all: the dispatcher (what a node takes and answers), the transaction that makes an
event, the buckets (what a node writes into them), and the client (what comes from nodes that are other
processes, their buckets' values as far as a client watches them). What does not fit is noted and fails the
test.

A request that the node has accepted must satisfy its schema; one that it refused may or may not. What the
node sends must satisfy the schema and have no field that the schema does not name.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jsonschema_rs import Draft202012Validator, meta
from nats.js.kv import KeyValue
from pydantic import BaseModel

from vcnode.client.requests import Requester
from vcnode.contracts.payloads import PAYLOADS
from vcnode.contracts.schemas import schema, strict
from vcnode.handlers.dispatch import Dispatcher
from vcnode.models import wire
from vcnode.models.events import Event
from vcnode.models.node import NodeLease
from vcnode.models.pod import PodStatus
from vcnode.pods.store import Tx

violations: list[str] = []
"""What did not fit, since somebody last emptied it."""
seen: set[str] = set()
"""Names of the payloads that were checked."""


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """The validator for a payload: as published for what goes to a node, stricter for what comes from one."""
    made = schema(name) if PAYLOADS[name].direction == "to_node" else strict(name)
    meta.validate(made)
    return Draft202012Validator(made, validate_formats=True)


def problem(name: str, content: Any) -> str | None:
    """Why *content* is no payload *name*; None when it is one."""
    seen.add(name)
    first = next(validator(name).iter_errors(content), None)
    return None if first is None else f"{name}: {first.instance_path}: {first.message}"[:2000]


def check(name: str, body: bytes | str) -> None:
    """Note it when *body* is no payload *name*."""
    try:
        content = json.loads(body or "{}")
    except ValueError:
        violations.append(f"{name}: not JSON: {body[:200]!r}")
        return
    if found := problem(name, content):
        violations.append(found)


def check_exchange(verb: str, request: bytes, reply: bytes, *, ok: bool) -> None:
    """Check a command and its answer."""
    if ok:
        check(f"{verb}.request", request)
        check(f"{verb}.reply", reply)
    else:
        check("error", reply)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Check everything for as long as the block runs."""
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        yield


def _caller() -> str:
    """The module that called the checked method."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _written(method: str) -> Any:
    """A method of buckets that checks what a node writes; tests write what they like."""
    plain = getattr(KeyValue, method)

    # No coroutine function: by the time that ran, it would not be known any more who called.
    def checked(self: KeyValue, key: str, value: bytes, *args: Any, **kwargs: Any) -> Any:
        if _caller() == "vcnode.bus.kv":
            check(f"kv.{self._name.rpartition('-')[2]}", value)
        return plain(self, key, value, *args, **kwargs)

    return mock.patch.object(KeyValue, method, checked)


def _read(model: type[BaseModel], name: str) -> Any:
    """Checks what the client's view reads from a bucket; what is no such value at all, it says itself."""
    plain = model.model_validate_json

    def checked(body: bytes, **kwargs: Any) -> BaseModel:
        value = plain(body, **kwargs)
        if _caller() == "vcnode.client.view":
            check(name, body)
        return value

    return mock.patch.object(model, "model_validate_json", staticmethod(checked))


def _patches() -> Iterator[Any]:
    dispatch, answer = Dispatcher.dispatch, Dispatcher.answer
    emit, request, parse = Tx.emit, Requester.request, Event.model_validate_json

    async def checked_dispatch(self: Any, verb: str, headers: Any, body: bytes, **options: Any) -> Any:
        outcome = await dispatch(self, verb, headers, body, **options)
        check_exchange(verb, body, outcome.body, ok=outcome.ok)
        return outcome

    def checked_answer(self: Any, verb: str, headers: Any, body: bytes) -> Any:
        outcome = answer(self, verb, headers, body)
        check_exchange(verb, body, outcome.body, ok=outcome.ok)
        return outcome

    def checked_emit(self: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
        event = emit(self, kind, *args, **kwargs)
        if _caller().startswith("vcnode."):  # tests of the store emit what they like
            check(f"event.{kind.value}", event.model_dump_json())
        return event

    async def checked_request(self: Any, subject: str, body: bytes, headers: Any, **kwargs: Any) -> Any:
        msg = await request(self, subject, body, headers, **kwargs)
        prefix, way, _node, *verb = subject.split(".")
        if prefix and way == "rpc":
            failed = wire.SERVICE_ERROR_CODE in (msg.headers or {})
            check_exchange(".".join(verb), body, msg.data, ok=not failed)
        return msg

    def checked_parse(body: bytes, **kwargs: Any) -> Event:
        event = parse(body, **kwargs)
        if _caller() == "vcnode.client.events" and f"event.{event.kind}" in PAYLOADS:
            check(f"event.{event.kind}", body)
        return event

    yield mock.patch.object(Dispatcher, "dispatch", checked_dispatch)
    yield mock.patch.object(Dispatcher, "answer", checked_answer)
    yield mock.patch.object(Tx, "emit", checked_emit)
    yield mock.patch.object(Requester, "request", checked_request)
    yield mock.patch.object(Event, "model_validate_json", staticmethod(checked_parse))
    yield from map(_written, ("put", "create", "update"))
    yield _read(NodeLease, "kv.nodes")
    yield _read(PodStatus, "kv.pods")
