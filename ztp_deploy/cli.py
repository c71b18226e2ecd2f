"""The command line: `ztp plan | export | build | check | bench | compare | engine | eval | tune | show | report | …` (`ztp --help`).

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ztp_deploy.console import (
    Bars,
    err,
    out,
    print_json,
    record_comparison,
    record_methods,
    record_result,
    show_parity,
    show_result,
    warn,
)
from ztp_deploy.errors import INTERRUPTED, BadRequest, MissingSoftware, ZtpError
from ztp_deploy.options import (
    AsJson,
    BackendName,
    Batch,
    Batches,
    DeviceName,
    EngineDir,
    EnginesRoot,
    ExportRoot,
    FlopShare,
    Images,
    InputType,
    Keep,
    Method,
    Model,
    Option,
    Precision,
    Profile,
    Ratio,
    Recipe,
    Seconds,
    Sites,
    Weights,
    build_request,
    integers,
    plan_request,
    refuse_idle,
)

app = typer.Typer(
    name="ztp",
    help="Token-pruned Vision Transformers in production: plan, export, build, prove, measure, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# --- commands ----------------------------------------------------------------------------------


@app.command()
def plan(
    model: Model,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    as_json: AsJson = False,
) -> None:
    """Fix the token count of every stage, and count multiply-accumulates. Nothing is built."""
    from ztp_deploy.evidence.report.markdown import giga, percent

    made = plan_request(model, method, ratio, flops, keep, sites, option, "auto", None).plan(model)
    if as_json:
        print_json(json.loads(made.to_json()))
        return
    table = Table(title=f"{made.model} · {made.label}", title_justify="left", title_style="bold")
    for name in ("stage", "block", "acts", "tokens in", "tokens out", "fixed numbers"):
        table.add_column(name, justify="left" if name in ("acts", "fixed numbers") else "right")
    for index, stage in enumerate(made.stages, start=1):
        static = ", ".join(f"{key} {value}" for key, value in stage.static.items())
        table.add_row(
            str(index),
            str(stage.block),
            stage.place.replace("_", " "),
            str(stage.tokens_in),
            str(stage.tokens_out),
            static,
        )
    out.print(table if made.stages else f"{made.model}: the dense model, {made.patch_tokens} patch tokens throughout.")
    out.print(
        f"Multiply-accumulates an image: {giga(made.flops.dense)} G dense, {giga(made.flops.planned)} G planned "
        f"({percent(made.flops.share)}), {giga(made.flops.executed)} G executed: FLOP limit × {made.flops.speedup_limit:.2f}."
    )


@app.command()
def export(
    model: Model,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Weights = "auto",
    recipe: Recipe = None,
    format: Annotated[str, typer.Option(help="onnx, torch_export or torchscript.")] = "onnx",
    precision: Precision = None,
    input: InputType = None,
    directory: ExportRoot = Path("export"),
    as_json: AsJson = False,
) -> None:
    """Export a pruned model to a folder with its graph and manifest."""
    from ztp_deploy import exporters, models, workflow

    exporters.get(format)
    wanted = plan_request(model, method, ratio, flops, keep, sites, option, weights, recipe)
    request = build_request(None, None, None, precision, None, input, directory, Path("engines"))
    exporters.check_precision(format, request.precision)
    models.check_request(wanted.model, wanted.weights)
    wanted.check()
    clock = workflow.Clock(Bars())
    module = workflow.load(wanted.model, wanted.weights, clock)
    artifact = workflow.export_model(module, wanted.plan(module), request, format, request.precision, clock)
    if as_json:
        print_json(
            {"artifact": str(artifact.directory), "manifest": artifact.manifest.model_dump(mode="json", by_alias=True)}
        )
        return
    size = sum(record.bytes for record in artifact.manifest.files.values())
    out.print(f"Exported {wanted.model} {artifact.manifest.plan.label} as {format}, {size / 2**20:.1f} MiB.")
    out.print(f"Artifact: {artifact.directory}", soft_wrap=True)
    out.print(f"Next: ztp build --artifact {artifact.directory}", soft_wrap=True)


@app.command()
def build(
    artifact: Annotated[Path, typer.Option("--artifact", "-a", help="An artifact folder that `ztp export` made.")],
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    profile: Profile = None,
    images: Images = None,
    directory: EnginesRoot = Path("engines"),
    as_json: AsJson = False,
) -> None:
    """Build an engine folder from an artifact; int8 and fp8 are calibrated on images."""
    from ztp_deploy import exporters, workflow

    request = build_request(profile, backend, device, precision, batch, None, Path("export"), directory)
    engine = workflow.build_engine(exporters.load_artifact(artifact), request, workflow.Clock(Bars()), images)
    if as_json:
        print_json(
            {"engine": str(engine.directory), "manifest": engine.manifest.model_dump(mode="json", by_alias=True)}
        )
        return
    only = ", not run" if engine.manifest.unproved else ""
    out.print(
        f"Built{only} for {engine.manifest.backend} {engine.manifest.backend_version} on {engine.manifest.device}."
    )
    out.print(f"Engine: {engine.directory}", soft_wrap=True)
    out.print(f"Next: ztp check --engine {engine.directory}", soft_wrap=True)


@app.command()
def check(
    engine: EngineDir,
    images: Images = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Prove that an engine does what the eager PyTorch model does; exit code 1 where it does not."""
    from ztp_deploy import models, workflow
    from ztp_deploy.backends import find_engine, require_runnable
    from ztp_deploy.evidence.report.html import write_report

    found = find_engine(engine)
    require_runnable(found)
    clock = workflow.Clock(Bars())
    with clock.step(f"load {found.manifest.source.name}"):
        model = models.reload_model(found.manifest.source)
    report = workflow.check(found, model, images, clock, count)
    write_report(found.directory)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_parity(report)
    report.require()


@app.command()
def bench(
    engine: Annotated[
        list[Path] | None,
        typer.Option("--engine", "-e", help="An engine folder; repeatable, the first is the reference."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Or a model: dense, pruned and slice twin are built and compared."),
    ] = None,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Weights = "auto",
    recipe: Recipe = None,
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    batches: Batches = None,
    seconds: Seconds = 60.0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Build everything anew in a scratch folder, so that its time counts.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Also write the report's JSON and Markdown into this folder, named after what was measured and the machine."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, engines interleaved; with --model, everything `engine` does, measured longer."""
    from ztp_deploy import workflow

    sizes = integers("batches", batches) if batches is not None else None
    if bool(engine) == bool(model):
        raise BadRequest(
            "Give either engine folders (--engine) or a model (--model).",
            "For example: ztp bench --model deit_s --ratio 0.7.",
        )
    if model:
        wanted = plan_request(model, method, ratio, flops, keep, sites, option, weights, recipe)
        request = build_request(profile, backend, device, precision, batch, None, Path("export"), Path("engines"))
        workflow.check_runnable(request)
        with tempfile.TemporaryDirectory() if fresh else contextlib.nullcontext() as scratch:
            if scratch:
                roots = {"export_root": Path(scratch, "export"), "engines_root": Path(scratch, "engines")}
                request = dataclasses.replace(request, **roots)
            result = workflow.make_engine(wanted, request, Bars(), batches=sizes, seconds=seconds, command=_command())
        if record is not None:
            record_result(result, record)
        show_result(result, as_json)
        return
    assert engine is not None
    idle = {
        "--ratio": ratio,
        "--flops": flops,
        "--keep": keep,
        "--sites": sites,
        "--method": method,
        "--fresh": fresh or None,
    }
    fix = "Give each folder once, or --model."
    refuse_idle(idle, "--engine", fix)
    if len(set(engine)) < len(engine):
        raise BadRequest("The same engine twice makes no sense with --engine.", fix)
    from ztp_deploy.backends import find_engine

    # The folder above names back end, version and device.
    named = {f"{path.resolve().parent.name}/{path.resolve().name}": find_engine(path) for path in engine}
    if len(named) < len(engine):
        named = {str(path): find_engine(path) for path in engine}
    report = workflow.bench(named, sizes, seconds, workflow.Clock(Bars()), _command())
    if record is not None:
        record_comparison(report, next(iter(named.values())).manifest.source.name, record)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    from ztp_deploy.evidence.report.comparison import comparison_head, comparison_rows

    table = Table(*comparison_head(report))
    for row in comparison_rows(report):
        table.add_row(*(cell.replace("**", "") for cell in row))
    out.print(table)
    for note in report.notes:
        warn(note)
    out.print(report.gpu)


@app.command()
def compare(
    model: Model,
    methods: Annotated[
        str, typer.Option(help="Methods to compare, such as zero_tprune,tome.")
    ] = "zero_tprune,tome,ats,evit",
    ratio: Ratio = None,
    flops: FlopShare = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A method's option as method.name=value (JSON value); repeatable."),
    ] = None,
    weights: Weights = "auto",
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    batches: Batches = None,
    seconds: Seconds = 60.0,
    images: Images = None,
    record: Annotated[Path | None, typer.Option(help="Also write JSON and Markdown into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure pruning methods against each other, each with its slice twin, at one ratio or FLOP share."""
    from ztp_deploy import workflow
    from ztp_deploy.evidence.report.methods import HEAD, methods_rows

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if len(set(names)) < len(names) or not names or (ratio is None) == (flops is None):
        raise BadRequest(
            f"compare takes each method once and one of --ratio and --flops; --methods {methods!r} came.",
            "For example: ztp compare --model deit_s --flops 0.65 --methods zero_tprune,tome.",
        )
    options = _options_by_method(option, names)
    wanted = [plan_request(model, name, ratio, flops, None, None, options[name], weights, None) for name in names]
    request = build_request(profile, backend, device, precision, batch, None, Path("export"), Path("engines"))
    report = workflow.compare_methods(
        model,
        wanted,
        request,
        Bars(),
        images=images,
        batches=integers("batches", batches) if batches is not None else None,
        seconds=seconds,
        command=_command(),
    )
    if record is not None:
        record_methods(report, record)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    table = Table(*HEAD)
    for row in methods_rows(report):
        table.add_row(*(cell.replace("**", "") for cell in row))
    out.print(table)
    for note in report.latency.notes:
        warn(note)
    out.print(report.latency.gpu)


def _options_by_method(option: list[str] | None, names: list[str]) -> dict[str, list[str] | None]:
    """`method.name=value` sorted by method."""
    found: dict[str, list[str] | None] = dict.fromkeys(names)
    for text in option or []:
        method, dot, rest = text.partition(".")
        if not dot or method not in found:
            raise BadRequest(f"--option {text!r} names no method of this comparison.", "Write method.name=value.")
        found[method] = [*(found[method] or []), rest]
    return found


@app.command()
def engine(
    model: Model,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Weights = "auto",
    recipe: Recipe = None,
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    input: InputType = None,
    images: Images = None,
    batches: Batches = None,
    seconds: Seconds = 12.0,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency against the dense engine and the slice twin.")
    ] = True,
    export_directory: ExportRoot = Path("export"),
    directory: EnginesRoot = Path("engines"),
    as_json: AsJson = False,
) -> None:
    """From a model's name to a checked, measured engine: plan, export, build, check, bench."""
    from ztp_deploy import workflow

    wanted = plan_request(model, method, ratio, flops, keep, sites, option, weights, recipe)
    request = build_request(profile, backend, device, precision, batch, input, export_directory, directory)
    result = workflow.make_engine(
        wanted,
        request,
        Bars(),
        images=images,
        batches=integers("batches", batches) if batches is not None else None,
        seconds=seconds,
        measure=measure,
        command=_command(),
    )
    show_result(result, as_json)


@app.command()
def demo(
    weights: Annotated[
        str, typer.Option(help="pretrained, or the path of weights that the training wrote.")
    ] = "pretrained",
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    method: Method = None,
    count: Annotated[int, typer.Option("--canvases", min=4, help="Test canvases to classify.")] = 1194,
    directory: Annotated[Path, typer.Option(help="Where canvases and pictures go.")] = Path("pictures"),
    as_json: AsJson = False,
) -> None:
    """The reference classifier from start to end, offline: its engine, parity, speed-up, accuracy and pictures."""
    from ztp_deploy.evidence.report.accuracy import show_accuracy
    from ztp_deploy.reference.demo import MODEL, RATIO, demonstrate

    if ratio is None and flops is None:
        ratio = RATIO
    wanted = plan_request(MODEL, method, ratio, flops, None, None, None, weights, None)
    request = build_request(profile, backend, device, precision, None, None, Path("export"), Path("engines"))
    made = demonstrate(request, Bars(), wanted=wanted, directory=directory, count=count, command=_command())
    if as_json:
        print_json(
            {
                "summary": made.result.summary.model_dump(mode="json"),
                "accuracy": made.accuracy.model_dump(mode="json"),
                "pictures": made.pictures.to_json(),
            }
        )
        return
    show_result(made.result, False)
    show_accuracy(made.accuracy, out)
    out.print("Pictures of what the engine kept:")
    for one in made.pictures.drawn:
        out.print(str(one.picture), soft_wrap=True, markup=False)


@app.command("eval")
def eval_(
    data: Annotated[
        Path,
        typer.Option("--data", help="Labelled pictures: a folder with a sub-folder a class, or a CSV file file,label."),
    ],
    engine: Annotated[Path | None, typer.Option("--engine", "-e", help="An engine folder.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Or a model: pruned against dense, both in eager PyTorch.")
    ] = None,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Annotated[
        str, typer.Option(help="auto or pretrained (from the hub or its cache), or a checkpoint's path.")
    ] = "auto",
    recipe: Recipe = None,
    dense_engine: Annotated[
        Path | None,
        typer.Option(help="With --engine: an engine of the dense model as the reference, instead of eager PyTorch."),
    ] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Without the dense model: accuracy alone.")] = False,
    batch: Annotated[
        int | None, typer.Option(help="Images a run.  \\[default: an engine's optimum; 32 in eager PyTorch]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode images.  \\[default: one a core, at most 8]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where eager PyTorch runs: auto, cpu or cuda.")] = "auto",
    record: Annotated[
        Path | None,
        typer.Option(
            help="With --model: write the report, and what an interrupted run goes on from, into this folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What pruning costs in accuracy, on labelled pictures; interrupted, the same command goes on."""
    from ztp_deploy.evaluate import EvalRequest, evaluate_engine, evaluate_model
    from ztp_deploy.evidence.report.accuracy import show_accuracy
    from ztp_deploy.evidence.report.html import HTML_FILE

    if (engine is None) == (model is None):
        raise BadRequest(
            "Give either an engine folder (--engine) or a model (--model).",
            "For example: ztp eval --engine engines/… --data imagenet/val.",
        )
    fix = "Leave one of them out."
    if engine is None:
        refuse_idle({"--dense-engine": dense_engine}, "--model", fix)
    else:
        idle: dict[str, object] = {"--method": method, "--ratio": ratio, "--flops": flops, "--keep": keep}
        idle |= {"--sites": sites, "--option": option, "--recipe": recipe, "--record": record}
        refuse_idle(idle | {"--weights": None if weights == "auto" else weights}, "--engine", fix)
    if no_dense:
        refuse_idle({"--dense-engine": dense_engine}, "--no-dense", fix)
    request = EvalRequest(data, not no_dense, batch, workers, device, _command())
    try:
        if engine is not None:
            report = evaluate_engine(engine, request, Bars(), dense_engine=dense_engine)
        else:
            assert model is not None
            wanted = plan_request(model, method, ratio, flops, keep, sites, option, weights, recipe)
            report = evaluate_model(wanted, request, Bars(), record=record)
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            err.print(f"{interrupt}.", soft_wrap=True)
        raise
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_accuracy(report, out)
    if engine is not None:
        out.print(f"Report: {engine}/evidence/{HTML_FILE}", soft_wrap=True, markup=False)


@app.command()
def report(
    engine: EngineDir,
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
    as_json: AsJson = False,
) -> None:
    """Render an engine's HTML report again, from the evidence in its folder; without --pictures with those it has."""
    from ztp_deploy.evidence.report.html import read_evidence, write_report

    evidence = read_evidence(engine)
    if pictures:
        from ztp_deploy import workflow
        from ztp_deploy.show import picture_report

        picture_report(pictures, engine, workflow.Clock(Bars()))
        evidence = read_evidence(engine)
    path = write_report(engine, beside or ())
    if as_json:
        print_json({"report": str(path), "pictures": len(evidence.pictures), "left_out": list(evidence.left_out)})
        return
    for line in evidence.left_out:
        warn(line)
    out.print(f"Report: {path}", soft_wrap=True, markup=False)


@app.command()
def tune(
    model: Model,
    budget: Annotated[
        str, typer.Option(help="flops=0.65 (share of dense), or latency=12ms@batch8 (time of one run of 8 images).")
    ],
    images: Annotated[Path, typer.Option(help="Folder of your own pictures; no labels are needed.")],
    method: Method = None,
    weights: Annotated[
        str, typer.Option(help="auto or pretrained (from the hub or its cache), or a checkpoint's path.")
    ] = "auto",
    profile: Profile = None,
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    trials: Annotated[int, typer.Option(help="Plans to try; a larger number goes on where a smaller one ended.")] = 60,
    count: Annotated[int, typer.Option(help="How many images; half of them only judge the outcome.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    seconds: Annotated[float, typer.Option(help="With a latency budget: seconds of a measurement.")] = 10.0,
    directory: Annotated[
        Path | None, typer.Option(help="Where the search and its outcome go.  \\[default: tuned/model--method--budget]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search for the plan that changes predictions least within a budget, on pictures without labels; resumable."""
    from ztp_deploy.tune.report import show_tune
    from ztp_deploy.tune.run import TuneRequest
    from ztp_deploy.tune.run import tune as search

    if budget.startswith("flops"):
        refuse_idle(
            {"--profile": profile, "--backend": backend, "--precision": precision},
            f"--budget {budget}: multiply-accumulates are counted, nothing is built",
            "Leave it out, or give a latency budget.",
        )
    request = TuneRequest(
        model=model,
        images=images,
        budget=budget,
        method=method or "zero_tprune",
        weights=weights,
        build=build_request(profile, backend, device, precision, None, None, Path("export"), Path("engines")),
        trials=trials,
        count=count,
        seed=seed,
        seconds=seconds,
        device=device or "auto",
        directory=directory,
        command=_command(),
    )
    report = search(request, Bars())
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_tune(report, request.folder, out)
    report.require()


@app.command("gpu-report")
def gpu_report(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Models; repeatable.  \\[default: deit_s, deit_b]")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="Only these runtimes; repeatable.  \\[default: all]")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Precisions; int8 and fp8 of TensorRT only.")] = (
        "fp32,fp16,bf16,int8,fp8"
    ),
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64,256",
    weights: Weights = "auto",
    minutes: Annotated[float, typer.Option(help="Begin nothing that would end later; the next call goes on.")] = 9,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed in earlier calls.")] = False,
    seconds: Annotated[float, typer.Option(help="Seconds of measuring a cell.")] = 4.0,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that build engines side by side.  \\[default: half the cores, at most 6]"),
    ] = None,
    device: Annotated[str, typer.Option(hidden=True, help="cuda, or cpu to try the report out.")] = "cuda",
    directory: Annotated[Path, typer.Option(help="Where reports lie.")] = Path("engines/evidence"),
    as_json: AsJson = False,
) -> None:
    """Measure everything this machine's GPU can run: runtimes × precisions × batches × plans × models, resumable.

    What cannot be measured is a row that says why.
    """
    from ztp_deploy.environment import usable_cores
    from ztp_deploy.evidence.gpu_report import Grid, measure_gpu, report_path
    from ztp_deploy.evidence.gpu_runtimes import RUNTIMES
    from ztp_deploy.evidence.latency import check_seconds
    from ztp_deploy.evidence.report.gpu import render_gpu_report
    from ztp_deploy.manifest import write_text

    check_seconds(seconds)
    check_seconds(minutes * 60)
    if workers is None:
        workers = max(1, min(usable_cores() // 2, 6))
    grid = Grid(
        models=model or Grid.models,
        runtimes=runtime or RUNTIMES,
        precisions=precisions.replace(" ", "").split(","),
        batches=integers("batches", batches),
        device=device,
        weights=weights,
        seconds=seconds,
        workers=workers,
    )
    path = report_path(directory, device)
    progress = measure_gpu(grid, path, minutes=minutes, retry=retry, command=_command(), advance=err.print)
    table = render_gpu_report(progress.report)
    write_text(path.with_suffix(".md"), table)
    if as_json:
        print_json(progress.report.model_dump(mode="json"))
        return
    out.print(table, markup=False, soft_wrap=True)
    for line in (*progress.lines(), f"Report: {path}"):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE…")],
    engine: EngineDir,
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Classify images with an engine: the best classes and their probabilities."""
    import numpy as np

    from ztp_deploy.backends import load_engine
    from ztp_deploy.backends.batches import filled_batches

    with load_engine(engine) as session:
        manifest = session.manifest
        pixels = session.preprocess(list(images))
        batches = filled_batches(pixels, manifest.batch.max, manifest.batch.min)
        parts = [session.run(chunk)[:count] for chunk, count in batches]
    logits = np.concatenate(parts).astype(np.float64)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    labels = manifest.source.labels
    found: list[dict[str, Any]] = [
        {
            "image": str(path),
            "top": [
                {"class": int(index), "name": labels[index] if labels else None, "probability": float(row[index])}
                for index in np.argsort(-row, kind="stable")[:top]
            ],
        }
        for path, row in zip(images, probabilities, strict=True)
    ]
    if as_json:
        print_json({"engine": str(engine), "random_weights": manifest.random_weights, "images": found})
        return
    if manifest.random_weights:
        warn("This engine has random weights: the names below mean nothing.")
    for entry in found:
        table = Table(title=str(entry["image"]), title_justify="left", title_style="bold", show_header=False, box=None)
        for guess in entry["top"]:
            table.add_row(f"{guess['probability'] * 100:6.2f} %", guess["name"] or f"class {guess['class']}")
        out.print(table)


@app.command()
def show(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE…")],
    engine: Annotated[
        Path | None, typer.Option("--engine", "-e", help="An engine folder, whose tokens are drawn.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Or a model, pruned as the options say, in eager PyTorch.")
    ] = None,
    method: Method = None,
    ratio: Ratio = None,
    flops: FlopShare = None,
    keep: Keep = None,
    sites: Sites = None,
    option: Option = None,
    weights: Annotated[
        str | None,
        typer.Option(help="With --model: auto, pretrained, random, or a checkpoint's path.  \\[default: auto]"),
    ] = None,
    recipe: Recipe = None,
    directory: Annotated[Path, typer.Option(help="Where pictures go.")] = Path("pictures"),
    as_json: AsJson = False,
) -> None:
    """Draw what pruning did: per image one picture with the patches each stage dropped, why, and the scores behind it."""
    if bool(engine) == bool(model):
        raise BadRequest(
            "Give either an engine folder (--engine) or a model (--model).",
            "For example: ztp show photo.jpg --model deit_s --ratio 0.7.",
        )
    wanted = None
    if model:
        wanted = plan_request(model, method, ratio, flops, keep, sites, option, weights or "auto", recipe)
    else:
        idle = {
            "--method": method,
            "--ratio": ratio,
            "--flops": flops,
            "--keep": keep,
            "--sites": sites,
            "--option": option,
            "--weights": weights,
            "--recipe": recipe,
        }
        refuse_idle(idle, "--engine", "The engine has its plan; or give --model.")
    from ztp_deploy import workflow
    from ztp_deploy.show import show as draw

    shown = draw(images, directory, workflow.Clock(Bars()), engine=engine, wanted=wanted)
    if as_json:
        print_json(shown.to_json())
        return
    for one in shown.drawn:
        out.print(str(one.picture), soft_wrap=True, markup=False)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Models, methods, formats and back ends; what is missing for each and how to get it."""
    from ztp_deploy import backends, exporters, methods, models

    examples = models.examples()
    pairs = methods.pairs({name: models.describe(name)[1] for name in examples.values()})
    known: dict[str, list[dict[str, Any]]] = {
        "models": [{"name": name, "timm": arch} for name, arch in models.model_names().items()],
        "families": [{"name": name, "about": models.family(name).SUMMARY} for name in models.FAMILIES],
        "methods": [{"name": "dense", "about": "the model as it is"}]
        + [{"name": name, "about": methods.get(name).SUMMARY} for name in methods.METHODS],
        "formats": [
            {"name": name, "about": exporters.get(name).SUMMARY, "precisions": list(exporters.get(name).PRECISIONS)}
            for name in exporters.FORMATS
        ],
        "backends": [
            {
                "name": name,
                "about": backends.get(name).SUMMARY,
                "built from": backends.get(name).FORMAT,
                "status": "OK" if not (missing := backends.get(name).missing()) else f"missing: pip install {missing}",
            }
            for name in backends.BACKENDS
        ],
        "pairs": [
            {"method": method, "model": model, "status": "refused" if reason else "OK", "because": reason}
            for method, reasons in pairs.items()
            for model, reason in reasons.items()
        ],
    }
    if as_json:
        print_json(known)
        return
    for title, rows in known.items():
        if title == "pairs":
            _print_pairs(pairs, examples)
            continue
        if title == "models":
            names = Table(title="models", title_justify="left", title_style="bold", show_header=False, box=None)
            for row in rows:
                names.add_row(row["name"], row["timm"])
            out.print(names)
            out.print("and any timm ViT made of plain blocks, by its timm name.\n")
            continue
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            table.add_row(row["name"], str(row.get("status", "")), row["about"])
        out.print(table)
        out.print()


def _print_pairs(pairs: dict[str, dict[str, str | None]], examples: dict[str, str]) -> None:
    """Methods against one model of each family: OK, or a number that stands for the reason below."""
    reasons = list(dict.fromkeys(reason for row in pairs.values() for reason in row.values() if reason))
    table = Table(title="which method prunes which family", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for family in examples:
        table.add_column(family)
    for method, row in pairs.items():
        cells = (f"no ({reasons.index(why) + 1})" if (why := row[model]) else "OK" for model in examples.values())
        table.add_row(method, *cells)
    out.print(table)
    for number, reason in enumerate(reasons, start=1):
        out.print(f"({number}) {reason}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, and what would be used on this machine."""
    from ztp_deploy import backends, environment

    machine = environment.snapshot()
    uses: dict[str, str] = {}
    for name in backends.BACKENDS:
        module = backends.get(name)
        missing = module.missing()
        try:
            uses[name] = (
                f"missing: pip install {missing}"
                if missing
                else f"{module.version()} on {module.resolve_device('auto').slug}"
            )
        except MissingSoftware as error:  # a library that is here and a device that is not
            uses[name] = error.problem
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if environment.installed(name)]
    problems = []
    if len(both) == 2:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, install one."
        )
    busy = environment.busy_share()
    if busy > 0.1:
        problems.append(f"The machine is busy ({busy:.0%} of its processor time): latency figures will not be quiet.")
    facts = {
        "machine": machine,
        "gpu": environment.gpu_line(),
        "would use": uses,
        "auto": backends.choose("auto"),
        "problems": problems,
    }
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None)
    table.add_row("processor", f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['cpu_features'])})")
    table.add_row("memory", f"{machine['memory_gib']} GiB")
    table.add_row("gpu", environment.gpu_line().removeprefix("GPU: "))
    table.add_row("system", f"{machine['system']}, Python {machine['python']}")
    for name, version in machine["packages"].items():
        table.add_row(name, version)
    for name, use in uses.items():
        table.add_row(f"back end {name}", use)
    table.add_row("BACKEND=auto takes", backends.choose("auto"))
    out.print(table)
    for problem in problems:
        warn(problem)
    if not problems:
        out.print("No problems found.", style="green")


def _command() -> str:
    """The command as typed, without the interpreter's and the machine's paths."""
    return shlex.join(["ztp", *sys.argv[1:]])


class _Interrupts:
    """Remembers that Ctrl-C was pressed, since libraries wrap the exception it raises."""

    pressed = False

    def __call__(self, number: int, frame: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point: runs a command, turns every refusal into one sentence and its exit code."""
    interrupts = _Interrupts()
    previous = signal.signal(signal.SIGINT, interrupts)
    try:
        code = app(standalone_mode=False)
        code = code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        pressed = interrupts.pressed or isinstance(error, KeyboardInterrupt)
        code = INTERRUPTED if pressed else _refuse(error)
    finally:
        signal.signal(signal.SIGINT, previous)
    if code == INTERRUPTED:
        err.print("Interrupted; nothing half-written was left.")
        sys.stdout.flush()
        # Python would kill itself with the signal where the interrupt once passed through an exec().
        os._exit(INTERRUPTED)
    sys.exit(code)


def _refuse(error: BaseException) -> int:
    """Prints a refusal, as JSON where that was asked for, and returns its exit code; raises what is a fault of ours."""
    if isinstance(error, ZtpError):
        problem, fix, code = error.problem, error.fix, error.exit_code
    elif isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        problem, fix, code = f"{named}{error.strerror or error}.", "Check the path.", BadRequest.exit_code
    elif type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", 0))
    elif type(error).__name__ == "Abort":
        return INTERRUPTED
    elif hasattr(error, "format_message"):  # how click and typer refuse a command line
        message = str(error.format_message()).rstrip(". ")
        if not message:  # no command: the help was shown
            return BadRequest.exit_code
        problem, fix, code = f"{message}.", "See `ztp --help`.", BadRequest.exit_code
    else:
        raise error
    if "--json" in sys.argv:
        print_json({"error": {"problem": problem, "fix": fix, "exit_code": code}})
    else:
        err.print("error: ", style="bold red", end="")
        err.print(f"{problem} {fix}".strip(), markup=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
