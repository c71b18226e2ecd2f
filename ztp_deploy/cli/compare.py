"""`ztp compare`: methods against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.atomic import check_writable
from ztp_deploy.cli import options
from ztp_deploy.console import Bars, print_json, recorded
from ztp_deploy.defaults import BENCH_SECONDS
from ztp_deploy.errors import BadRequest


def compare(
    context: typer.Context,
    model: options.Model,
    methods: Annotated[
        str, typer.Option(help="Methods to compare, such as zero_tprune,tome.")
    ] = "zero_tprune,tome,ats,evit",
    ratio: options.Ratio = None,
    flops: options.FlopShare = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A method's option as method.name=value (JSON value); repeatable."),
    ] = None,
    weights: options.Weights = "auto",
    num_classes: options.NumClasses = None,
    img_size: options.ImageSize = None,
    labels: options.Labels = None,
    preprocess: options.Preprocess = None,
    profile: options.Profile = None,
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    batch: options.Batch = None,
    batches: options.Batches = None,
    seconds: options.Seconds = BENCH_SECONDS,
    images: options.Images = None,
    record: Annotated[Path | None, typer.Option(help="Also write JSON and Markdown into this folder.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure pruning methods against each other, each with its slice twin, at one ratio or FLOP share."""
    from ztp_deploy.evidence.records import record_methods
    from ztp_deploy.evidence.report.methods import HEAD, methods_rows
    from ztp_deploy.evidence.report.terminal import show_rows
    from ztp_deploy.workflow.compare import compare_methods

    check_writable(record)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    _check(names, ratio, flops)
    by_method = _options_by_method(option, names)
    wanted = [
        options.plan_request(
            model=model,
            method=name,
            ratio=ratio,
            flops=flops,
            option=by_method[name],
            weights=weights,
            num_classes=num_classes,
            img_size=img_size,
            labels=labels,
            preprocess=preprocess,
        )
        for name in names
    ]
    request = options.asked_build(context)
    report = compare_methods(
        model,
        wanted,
        request,
        Bars(),
        images=images,
        batches=options.listed("batches", batches, int),
        seconds=seconds,
        command=options.command_line(),
    )
    if record is not None:
        recorded(record_methods(report, record))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_rows(HEAD, methods_rows(report), report.latency)


def _check(names: list[str], ratio: float | None, flops: float | None) -> None:
    """Raises BadRequest for no methods, one that is given twice, and unless one of ratio and FLOP share is given."""
    example = "For example: ztp compare --model deit_s --flops 0.65 --methods zero_tprune,tome."
    twice = [name for name in names if names.count(name) > 1]
    if not names:
        problem = "--methods names no method."
    elif twice:
        problem = f"--methods names {twice[0]} twice; each method is compared once."
    elif ratio is None and flops is None:
        problem = "Neither --ratio nor --flops was given: how much the methods are to prune is not known."
    elif ratio is not None and flops is not None:
        problem = f"--ratio {ratio:g} and --flops {flops:g} were both given; compare takes one of them."
    else:
        return
    raise BadRequest(problem, example)


def _options_by_method(option: list[str] | None, names: list[str]) -> dict[str, list[str] | None]:
    """`method.name=value` sorted by method."""
    found: dict[str, list[str] | None] = dict.fromkeys(names)
    for text in option or []:
        method, dot, rest = text.partition(".")
        if not dot or method not in found:
            raise BadRequest(f"--option {text!r} names no method of this comparison.", "Write method.name=value.")
        found[method] = [*(found[method] or []), rest]
    return found
