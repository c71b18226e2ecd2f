"""`ztp report`: an engine's HTML page, rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, out, print_json, warn


def report(
    engine: options.EngineDir,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to draw as `ztp show` does and put into the page; repeatable, in place of earlier ones."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another engine of these weights to draw with this one, accuracy against speed; repeatable."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Render an engine's HTML report again, from the evidence in its folder; without --pictures with those it has."""
    from ztp_deploy.evidence.report.folder import read_evidence
    from ztp_deploy.evidence.report.html import write_report

    evidence = read_evidence(engine)
    if pictures:
        from ztp_deploy.show.draw import picture_report
        from ztp_deploy.workflow.progress import Clock

        picture_report(pictures, engine, Clock(Bars()))
        evidence = read_evidence(engine)
    path = write_report(engine, beside or ())
    if as_json:
        print_json({"report": str(path), "pictures": len(evidence.pictures), "left_out": list(evidence.left_out)})
        return
    for line in evidence.left_out:
        warn(line)
    out.print(f"Report: {path}", soft_wrap=True)
