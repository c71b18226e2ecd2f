"""`ztp show`: what pruning did, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, out, print_json
from ztp_deploy.defaults import PICTURES_ROOT


def show(
    context: typer.Context,
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE…")],
    engine: Annotated[
        Path | None, typer.Option("--engine", "-e", help="An engine folder, whose tokens are drawn.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            rich_help_panel=options.MODEL_PANEL,
            help="Or a model, pruned as the options say, in eager PyTorch.",
        ),
    ] = None,
    method: options.Method = None,
    ratio: options.Ratio = None,
    flops: options.FlopShare = None,
    keep: options.Keep = None,
    sites: options.Sites = None,
    option: options.Option = None,
    weights: options.Weights = "auto",
    num_classes: options.NumClasses = None,
    img_size: options.ImageSize = None,
    labels: options.Labels = None,
    preprocess: options.Preprocess = None,
    recipe: options.Recipe = None,
    directory: Annotated[Path, typer.Option(help="Where pictures go.")] = PICTURES_ROOT,
    as_json: options.AsJson = False,
) -> None:
    """Draw what pruning did: per image one picture with the patches each stage dropped, why, and the scores behind it."""
    from ztp_deploy.show.draw import show_engine, show_model
    from ztp_deploy.workflow.progress import Clock

    options.engine_or_model(engine, model, recipe, "ztp show photo.jpg --model deit_s --ratio 0.7")
    clock = Clock(Bars())
    if engine:
        options.refuse_idle(context, options.PLAN_OPTIONS, "--engine", "The engine has its plan; or give --model.")
        shown = show_engine(images, directory, clock, engine)
    else:
        shown = show_model(images, directory, clock, options.asked_plan(context))
    if as_json:
        print_json(shown.to_json())
        return
    for one in shown.drawn:
        out.print(str(one.picture), soft_wrap=True)
