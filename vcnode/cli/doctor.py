"""``vcnode doctor``: whether this host can run pods, and how to mend what keeps it from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vcnode.cli.command import NatsUrl, Output, OutputOption, execute

if TYPE_CHECKING:
    from vcnode.doctor import Finding

MARKS = {"ok": ("✔", "green"), "warn": ("!", "yellow"), "fail": ("✘", "bold red")}


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command("doctor")(doctor)


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="TOML file with the node's settings."),
    ] = None,
    nats_url: NatsUrl = None,
    output: OutputOption = None,
) -> None:
    """Check whether this host can run pods, and say how to mend what keeps it from it. Changes nothing.

    Ends with 1 when a check failed; warnings are drawbacks that pods can live with.

    \b
    vcnode doctor
    vcnode doctor --config /etc/vcnode/node.toml
    """

    async def work() -> int:
        from vcnode.cli.exits import Exit
        from vcnode.cli.host_checks import probes
        from vcnode.cli.settings import load
        from vcnode.doctor import examine

        settings = load(config, nats={"url": nats_url})
        findings = []
        async for finding in examine(settings, probes(settings)):
            findings.append(finding)
            if output is not Output.JSON:
                _show(finding)
        if output is Output.JSON:
            _show_json(findings)
        return Exit.FAILED if any(finding.level == "fail" for finding in findings) else Exit.OK

    sys.exit(execute(work, output=output))


def _show(finding: Finding) -> None:
    from rich.text import Text

    from vcnode.cli.output import console, printable

    mark, style = MARKS[finding.level]
    out = console()
    line = Text.assemble((f"{mark} ", style), finding.check.ljust(19), printable(finding.detail))
    out.print(line, soft_wrap=True)
    if finding.mend:
        out.print(Text(f"  {'':19}{printable(finding.mend)}", style="dim"), soft_wrap=True)


def _show_json(findings: list[Finding]) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2, ensure_ascii=False))
