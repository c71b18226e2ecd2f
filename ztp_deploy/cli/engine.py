"""`ztp engine`: from a model's name to a checked, measured engine."""

from __future__ import annotations

from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, print_json
from ztp_deploy.defaults import ENGINE_SECONDS, ENGINES_ROOT, EXPORT_ROOT


def engine(
    context: typer.Context,
    model: options.ModelOrRecipe = None,
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
    profile: options.Profile = None,
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    batch: options.Batch = None,
    input: options.InputType = None,
    images: options.Images = None,
    batches: options.Batches = None,
    seconds: options.Seconds = ENGINE_SECONDS,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency against the dense engine and the slice twin.")
    ] = True,
    export_directory: options.ExportRoot = EXPORT_ROOT,
    directory: options.EnginesRoot = ENGINES_ROOT,
    as_json: options.AsJson = False,
) -> None:
    """From a model's name to a checked, measured engine: plan, export, build, check, bench."""
    from ztp_deploy.evidence.report.terminal import show_summary
    from ztp_deploy.workflow.make import make_engine

    if not measure:
        options.refuse_idle(context, ["batches", "seconds"], "--no-bench", "Leave one of them out.")
    wanted = options.asked_plan(context)
    request = options.asked_build(context, export_root=export_directory, engines_root=directory)
    result = make_engine(
        wanted,
        request,
        Bars(),
        images=images,
        batches=options.listed("batches", batches, int),
        seconds=seconds,
        measure=measure,
        command=options.command_line(),
    )
    if as_json:
        print_json(result.summary.model_dump(mode="json"))
    else:
        show_summary(result.summary)
