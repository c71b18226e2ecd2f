"""`ztp demo`: the reference classifier from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, out, print_json
from ztp_deploy.defaults import DEMO_CANVASES, PICTURES_ROOT


def demo(
    context: typer.Context,
    weights: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            rich_help_panel=options.MODEL_PANEL,
            help="pretrained, or the path of weights that the training wrote.",
        ),
    ] = "pretrained",
    profile: options.Profile = None,
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    ratio: options.Ratio = None,
    flops: options.FlopShare = None,
    method: options.Method = None,
    count: Annotated[int, typer.Option("--canvases", min=4, help="Test canvases to classify.")] = DEMO_CANVASES,
    directory: Annotated[Path, typer.Option(help="Where canvases and pictures go.")] = PICTURES_ROOT,
    as_json: options.AsJson = False,
) -> None:
    """The reference classifier from start to end, offline: its engine, parity, speed-up, accuracy and pictures."""
    from ztp_deploy.evidence.report.terminal import show_accuracy, show_summary
    from ztp_deploy.reference.demo import MODEL, RATIO, demonstrate

    if ratio is None and flops is None:
        ratio = RATIO
    wanted = options.plan_request(model=MODEL, method=method, ratio=ratio, flops=flops, weights=weights)
    request = options.asked_build(context)
    made = demonstrate(request, Bars(), wanted=wanted, directory=directory, count=count, command=options.command_line())
    if as_json:
        print_json(
            {
                "summary": made.result.summary.model_dump(mode="json"),
                "accuracy": made.accuracy.model_dump(mode="json"),
                "pictures": made.pictures.to_json(),
            }
        )
        return
    show_summary(made.result.summary)
    show_accuracy(made.accuracy)
    out.print("Pictures of what the engine kept:")
    for one in made.pictures.drawn:
        out.print(str(one.picture), soft_wrap=True)
