"""`ztp engine`: from a model's name to a checked, measured engine."""

from __future__ import annotations

from typing import Annotated

import typer

from ztp_deploy.cli.options import (
    AsJson,
    BackendName,
    Batch,
    Batches,
    DeviceName,
    EnginesRoot,
    ExportRoot,
    FlopShare,
    Images,
    ImageSize,
    InputType,
    Keep,
    Method,
    ModelOrRecipe,
    NumClasses,
    Option,
    Precision,
    Profile,
    Ratio,
    Recipe,
    Seconds,
    Sites,
    Weights,
    asked_build,
    asked_plan,
    batch_sizes,
    command_line,
    refuse_idle,
)
from ztp_deploy.console import Bars, show_result
from ztp_deploy.defaults import ENGINE_SECONDS, ENGINES_ROOT, EXPORT_ROOT


def engine(
    context: typer.Context,
    model: ModelOrRecipe = None,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Weights = "auto",
    num_classes: NumClasses = None,
    img_size: ImageSize = None,
    recipe: Recipe = None,
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    input: InputType = None,
    images: Images = None,
    batches: Batches = None,
    seconds: Seconds = ENGINE_SECONDS,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency against the dense engine and the slice twin.")
    ] = True,
    export_directory: ExportRoot = EXPORT_ROOT,
    directory: EnginesRoot = ENGINES_ROOT,
    as_json: AsJson = False,
) -> None:
    """From a model's name to a checked, measured engine: plan, export, build, check, bench."""
    from ztp_deploy.workflow.make import make_engine

    if not measure:
        refuse_idle(context, ["batches", "seconds"], "--no-bench", "Leave one of them out.")
    wanted = asked_plan(context)
    request = asked_build(context, export_root=export_directory, engines_root=directory)
    result = make_engine(
        wanted,
        request,
        Bars(),
        images=images,
        batches=batch_sizes(batches),
        seconds=seconds,
        measure=measure,
        command=command_line(),
    )
    show_result(result, as_json)
