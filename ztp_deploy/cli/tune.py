"""`ztp tune`: the search for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, print_json
from ztp_deploy.defaults import METHOD, TUNE_IMAGES, TUNE_SECONDS, TUNE_TRIALS
from ztp_deploy.errors import GateFailed


def tune(
    context: typer.Context,
    model: options.Model,
    budget: Annotated[
        str, typer.Option(help="flops=0.65 (share of dense), or latency=12ms@batch8 (time of one run of 8 images).")
    ],
    images: Annotated[Path, typer.Option(help="Folder of your own pictures; no labels are needed.")],
    method: options.Method = None,
    weights: options.TrainedWeights = "auto",
    num_classes: options.NumClasses = None,
    img_size: options.ImageSize = None,
    labels: options.Labels = None,
    preprocess: options.Preprocess = None,
    profile: options.Profile = None,
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    trials: Annotated[
        int, typer.Option(help="Plans to try; a larger number goes on where a smaller one ended.")
    ] = TUNE_TRIALS,
    count: Annotated[int, typer.Option(help="How many images; half of them only judge the outcome.")] = TUNE_IMAGES,
    seed: Annotated[int, typer.Option(help="Random seed of the search.")] = 0,
    seconds: Annotated[float, typer.Option(help="With a latency budget: seconds of a measurement.")] = TUNE_SECONDS,
    directory: Annotated[
        Path | None, typer.Option(help="Where the search and its outcome go.  \\[default: tuned/model--method--budget]")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Search for the plan that changes predictions least within a budget, on pictures without labels; resumable."""
    from ztp_deploy.tune.report import show_tune
    from ztp_deploy.tune.run import TuneRequest
    from ztp_deploy.tune.run import tune as search

    if budget.startswith("flops"):
        options.refuse_idle(
            context,
            options.BUILD_OPTIONS - {"device"} | {"seconds"},  # the device is where eager PyTorch runs, too
            f"--budget {budget}: multiply-accumulates are counted, nothing is built",
            "Leave it out, or give a latency budget.",
        )
    wanted = options.asked_plan(context)
    request = TuneRequest(
        model=model,
        images=images,
        budget=budget,
        method=method or METHOD,
        weights=weights,
        size=wanted.size,
        labels=wanted.labels,
        preprocessing=wanted.preprocessing,
        build=options.asked_build(context),
        trials=trials,
        count=count,
        seed=seed,
        seconds=seconds,
        device=device or "auto",
        directory=directory,
        command=options.command_line(),
    )
    report = search(request, Bars())
    if as_json:
        print_json(report.model_dump(mode="json"))
        missed = report.verdict == "misses the budget"
        raise typer.Exit(GateFailed.exit_code if missed else 0)  # a refusal would be a second object
    given = {
        "weights": None if weights == "auto" else weights,
        "num-classes": num_classes,
        "img-size": img_size,
        "labels": labels,
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    show_tune(report, request.folder, [*words, *(word for one in preprocess or () for word in ("--preprocess", one))])
    report.require()
