"""Looks into network namespaces, as an operator would, and namespaces that somebody else has made."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.netns import private_network

RTMGRP_LINK = 1
"""Multicast group of changes to interfaces (linux/rtnetlink.h)."""


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """A private network in which IPv6 addresses can be used at once: nobody else can have them."""
    with private_network():
        for which in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{which}/accept_dad").write_text("0")
        yield


@contextlib.contextmanager
def named(name: str) -> Iterator[str]:
    """A namespace with a name, as somebody else would make it; its path."""
    run("ip", "netns", "add", name)
    try:
        yield f"/run/netns/{name}"
    finally:
        run("ip", "netns", "del", name)


def run(*argv: str, netns: str | None = None) -> str:
    """Output of a program that must succeed, in a namespace if one is named (by its path)."""
    inside = ("nsenter", f"--net={netns}", "--") if netns is not None else ()
    done = subprocess.run([*inside, *argv], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


def show(*words: str, netns: str | None = None, program: str = "ip") -> Any:
    """What ``ip -j`` or ``tc -j`` says."""
    return json.loads(run(program, "-j", "-d", *words, netns=netns) or "[]")


def links(netns: str | None = None) -> set[str]:
    """Names of all interfaces but the loopback."""
    return {link["ifname"] for link in show("link", netns=netns)} - {"lo"}


def picture(netns: str) -> dict[str, Any]:
    """All that can be seen of a namespace's network and does not change by itself."""
    volatile = {
        "valid_life_time",
        "preferred_life_time",
        "cache",
        "expires",
        "ifi",
        "stats64",
        "num_tx_queues",
    }

    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: steady(inner) for key, inner in value.items() if key not in volatile}
        return [steady(inner) for inner in value] if isinstance(value, list) else value

    looks = {
        "links": show("addr", netns=netns),
        "routes4": show("-4", "route", "show", "table", "all", netns=netns),
        "routes6": show("-6", "route", "show", "table", "all", netns=netns),
        "rules": show("rule", netns=netns),
        "qdiscs": show("qdisc", "show", netns=netns, program="tc"),
    }
    return {name: steady(look) for name, look in looks.items()}


def gone(prefix: str) -> None:
    """Wait until no interface has a name that begins so: the kernel takes a removed namespace apart later."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE) as changes:
        changes.bind((0, RTMGRP_LINK))  # before the look, or the last change could be missed
        changes.settimeout(10)
        while any(name.startswith(prefix) for name in links()):
            changes.recv(65536)


def settle(netns: str, *names: str) -> None:
    """Wait until interfaces have a carrier and a link-local address, which come a moment later."""
    deadline = time.monotonic() + 10
    while True:
        found = {link["ifname"]: link for link in show("addr", netns=netns)}
        ready = [
            name
            for name in names
            if "NO-CARRIER" not in found[name]["flags"]
            and any(a["scope"] == "link" and "tentative" not in a for a in found[name]["addr_info"])
        ]
        if len(ready) == len(names):
            return
        assert time.monotonic() < deadline, f"{set(names) - set(ready)} does not come up"
        time.sleep(0.01)


def quiet_taps(netns: str) -> None:
    """Wait until taps that nobody holds are seen without a carrier: the kernel notices it a moment later."""
    deadline = time.monotonic() + 10
    while any(
        link["operstate"] == "UNKNOWN"
        for link in show("link", netns=netns)
        if link["ifname"].startswith("tap")
    ):
        assert time.monotonic() < deadline, "a tap is still held"
        time.sleep(0.01)


def own_namespaces() -> set[str]:
    """Names below /run/netns."""
    return set(os.listdir("/run/netns")) if Path("/run/netns").is_dir() else set()
