"""`ztp eval`: accuracy on labelled pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.atomic import check_writable
from ztp_deploy.cli import options
from ztp_deploy.console import Bars, err, out, print_json
from ztp_deploy.defaults import EAGER_BATCH, MAX_DECODERS


def eval_(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Option(
            "--data", help="Labelled pictures: a folder with a sub-folder per class, or a CSV file file,label."
        ),
    ],
    engine: Annotated[Path | None, typer.Option("--engine", "-e", help="An engine folder.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            rich_help_panel=options.MODEL_PANEL,
            help="Or a model: pruned against dense, both in eager PyTorch.",
        ),
    ] = None,
    method: options.Method = None,
    ratio: options.Ratio = None,
    flops: options.FlopShare = None,
    keep: options.Keep = None,
    sites: options.Sites = None,
    option: options.Option = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            rich_help_panel=options.MODEL_PANEL,
            help="auto or pretrained (from the hub or its cache), or a checkpoint's path; "
            "with --engine where that of its weights lies now, if it was moved.",
        ),
    ] = "auto",
    num_classes: options.NumClasses = None,
    img_size: options.ImageSize = None,
    labels: options.Labels = None,
    preprocess: options.Preprocess = None,
    recipe: options.Recipe = None,
    dense_engine: Annotated[
        Path | None,
        typer.Option(help="With --engine: an engine of the dense model as the reference, instead of eager PyTorch."),
    ] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Without the dense model: accuracy alone.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(help=f"Images a run.  \\[default: an engine's optimum; {EAGER_BATCH} in eager PyTorch]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help=f"Threads that decode images.  \\[default: one per core, at most {MAX_DECODERS}]"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where eager PyTorch runs: auto, cpu or cuda.")] = "auto",
    record: Annotated[
        Path | None,
        typer.Option(
            help="With --model: write the report, and what an interrupted run goes on from, into this folder."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """What pruning costs in accuracy, on labelled pictures; interrupted, the same command goes on."""
    from ztp_deploy.evidence.report.terminal import show_accuracy
    from ztp_deploy.evidence.schema import HTML_FILE
    from ztp_deploy.workflow.evaluate import EvalRequest, evaluate_engine, evaluate_model

    options.engine_or_model(engine, model, recipe, "ztp eval --engine engines/… --data imagenet/val")
    fix = "Leave one of them out."
    if engine is None:
        options.refuse_idle(context, ["dense_engine"], "--model", fix)
    else:
        options.refuse_idle(context, options.PLAN_OPTIONS - {"weights"} | {"record"}, "--engine", fix)
    check_writable(record)
    if no_dense:
        options.refuse_idle(context, ["dense_engine"], "--no-dense", fix)
    if engine is not None and (no_dense or dense_engine):
        without = "--no-dense" if no_dense else "--dense-engine"
        options.refuse_idle(context, ["device", "weights"], f"{without}: nothing runs in eager PyTorch", fix)
    moved = None if engine is None or weights == "auto" else weights
    request = EvalRequest(data, not no_dense, batch, workers, device, moved, options.command_line())
    try:
        if engine is not None:
            report = evaluate_engine(engine, request, Bars(), dense_engine=dense_engine)
        else:
            wanted = options.asked_plan(context)
            report = evaluate_model(wanted, request, Bars(), record=record)
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            err.print(f"{interrupt}.", soft_wrap=True)
        raise
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_accuracy(report)
    if engine is not None:
        out.print(f"Report: {engine}/evidence/{HTML_FILE}", soft_wrap=True)
