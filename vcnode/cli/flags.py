"""Parameters that several commands share, as typer reads them, and the files that commands read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vcnode.cli.complete import complete_container, complete_image, complete_pod

MAX_FILE_BYTES = 1024 * 1024
"""Largest spec that is read; a request could not be larger either."""

Pod = Annotated[str, typer.Argument(metavar="POD", help="Pod id.", autocompletion=complete_pod)]
Container = Annotated[
    str, typer.Argument(metavar="CONTAINER", help="Container id.", autocompletion=complete_container)
]
ImageName = Annotated[str, typer.Argument(metavar="NAME", help="Image name.", autocompletion=complete_image)]

Args = Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Program and arguments.")]
SpecFile = Annotated[
    str | None,
    typer.Option("--file", "-f", metavar="FILE", help="Spec as JSON or TOML; - is standard input."),
]
Image = Annotated[
    str | None,
    typer.Option("--image", metavar="NAME", help="Image of the container.", autocompletion=complete_image),
]
Rootfs = Annotated[
    str | None, typer.Option("--rootfs", metavar="DIR", help="Directory on the node's host that is its root.")
]
Readonly = Annotated[bool, typer.Option("--readonly", help="Mount the container's root read-only.")]
Disk = Annotated[
    int | None,
    typer.Option(
        "--disk",
        metavar="MIB",
        help="What the container writes goes to a disk of this size (64, 128, 256, …), not to memory.",
    ),
]
Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Environment.")]
Workdir = Annotated[str | None, typer.Option("--workdir", "-w", metavar="DIR", help="Working directory.")]
User = Annotated[
    str | None, typer.Option("--user", "-u", metavar="USER[:GROUP]", help="User inside, by name or number.")
]
Cpus = Annotated[float | None, typer.Option("--cpus", min=0.01, help="CPUs that the container may use.")]
MemLimit = Annotated[
    int | None, typer.Option("--memory-limit", metavar="MIB", help="Memory limit of the container.")
]
PidsLimit = Annotated[int | None, typer.Option("--pids-limit", help="Most processes of the container.")]
Restart = Annotated[
    str | None,
    typer.Option(
        "--restart",
        metavar="POLICY[:MAX]",
        help="Start the container again when it has ended: never, on-failure (at most MAX times), always.",
    ),
]
RestartPod = Annotated[
    str | None,
    typer.Option(
        "--restart-pod", metavar="POLICY[:MAX]", help="The same for the pod, when its VM has ended."
    ),
]
OnDisconnect = Annotated[
    str | None,
    typer.Option(
        "--on-disconnect",
        metavar="ACTION:SECONDS",
        help="When the node has had no NATS for so long: pause:60 or stop:60. Default: the pod goes on.",
    ),
]
_PROBE = "[SETTING=N,...]ACTION"
StartupProbe = Annotated[
    str | None,
    typer.Option(
        "--startup-probe",
        metavar=_PROBE,
        help="What must succeed once before other probes begin: exec:COMMAND, tcp:PORT or http:PORT/PATH.",
    ),
]
ReadinessProbe = Annotated[
    str | None,
    typer.Option(
        "--readiness-probe",
        metavar=_PROBE,
        help="What says that the container is ready, such as period=5,http:8080/ready.",
    ),
]
LivenessProbe = Annotated[
    str | None,
    typer.Option(
        "--liveness-probe",
        metavar=_PROBE,
        help="What ends the container when it fails, such as timeout=2,failures=5,tcp:5432.",
    ),
]
Mounts = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        "-v",
        metavar="SOURCE:DEST[:OPTIONS]",
        help="Mount a volume of the pod, or a part of it (TAG/path), in the container.",
    ),
]
VolumesAndMounts = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        "-v",
        metavar="SOURCE:DEST[:OPTIONS]",
        help="Mount a directory of the node's host, or a volume of the file (TAG or TAG/path).",
    ),
]
Tmpfs = Annotated[
    list[str] | None,
    typer.Option("--tmpfs", metavar="DEST[:OPTIONS]", help="Mount memory, such as /tmp:size=64m."),
]
Sockets = Annotated[
    list[str] | None,
    typer.Option(
        "--socket",
        metavar="PATH:NAME[:connect]",
        help="UNIX socket of the node's host that leads to the guest's serial port NAME, or that it is"
        " connected to.",
    ),
]
Label = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label.")]
Annotation = Annotated[
    list[str] | None, typer.Option("--annotation", metavar="KEY=VALUE", help="Annotation.")
]
Grace = Annotated[
    float | None,
    typer.Option(
        "--grace", metavar="SECONDS", min=0, max=3600, help="Time to end by itself; 0 kills at once."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Also when it is running: stop it first.")]
Tty = Annotated[bool, typer.Option("--tty", "-t", help="Run it on a terminal, which is ours.")]
OpenStdin = Annotated[
    bool, typer.Option("--stdin", help="Keep the main process's input open, for 'vcnode attach -i'.")
]
OpenTty = Annotated[bool, typer.Option("--tty", help="Run the main process on a terminal.")]
Stdin = Annotated[bool, typer.Option("--stdin", "-i", help="Pass standard input on.")]
StdinFirst = Annotated[
    bool, typer.Option("--stdin", "-i", help="Pass standard input on (all of it is read first).")
]
ExecTimeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Kill the command after this long."),
]
CommandId = Annotated[
    str | None,
    typer.Option("--command-id", metavar="ID", help="Idempotency key: sent twice, the command is done once."),
]


def read_file(name: str) -> bytes:
    """The bytes of the file *name*, or of standard input for '-'.

    Raises:
        UsageError: It cannot be read, or is larger than MAX_FILE_BYTES.
    """
    from vcnode.cli.exits import UsageError

    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"Cannot read {name}: {exc.strerror}.") from exc
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{name} is larger than {MAX_FILE_BYTES} bytes.")
    return data


def read_spec(name: str | None) -> dict[str, Any] | None:
    """The object in the spec file *name*; None when none was named. Raises UsageError as `specs.parse`."""
    if name is None:
        return None
    from vcnode.cli.specs import parse

    return parse(read_file(name), "standard input" if name == "-" else name)
