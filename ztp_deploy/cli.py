"""The command line: `ztp plan | export | build | check | bench | compare | engine | eval | tune | show | report | …` (`ztp --help`).

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ztp_deploy.console import (
    Bars,
    check_record,
    err,
    out,
    print_json,
    record_comparison,
    record_methods,
    record_result,
    show_parity,
    show_result,
    show_rows,
    warn,
)
from ztp_deploy.defaults import (
    BENCH_SECONDS,
    CHECK_IMAGES,
    DEMO_CANVASES,
    EAGER_BATCH,
    ENGINE_SECONDS,
    ENGINES_ROOT,
    EXPORT_ROOT,
    GPU_BATCHES,
    GPU_MINUTES,
    GPU_MODELS,
    GPU_PRECISIONS,
    GPU_SECONDS,
    GPU_WORKERS,
    MAX_DECODERS,
    METHOD,
    PICTURES_ROOT,
    TUNE_IMAGES,
    TUNE_SECONDS,
    TUNE_TRIALS,
)
from ztp_deploy.ending import end
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.options import (
    BUILD_OPTIONS,
    PLAN_OPTIONS,
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
    ModelOrRecipe,
    Option,
    Precision,
    Profile,
    Ratio,
    Recipe,
    Seconds,
    Sites,
    Weights,
    batch_sizes,
    build_request,
    engine_or_model,
    integers,
    plan_request,
    refuse_idle,
)

if TYPE_CHECKING:
    from ztp_deploy.workflow import BuildRequest

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

    wanted = plan_request(model=model, method=method, ratio=ratio, flops=flops, keep=keep, sites=sites, option=option)
    made = wanted.plan(wanted.model)
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
    model: ModelOrRecipe = None,
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
    directory: ExportRoot = EXPORT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Export a pruned model to a folder with its graph and manifest."""
    from ztp_deploy import exporters, models, workflow

    exporters.get(format)
    wanted = plan_request(
        model=model,
        method=method,
        ratio=ratio,
        flops=flops,
        keep=keep,
        sites=sites,
        option=option,
        weights=weights,
        recipe=recipe,
    )
    request = build_request(precision=precision, input=input, export_root=directory)
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
    out.print(f"Next: ztp build --artifact {shlex.quote(str(artifact.directory))}", soft_wrap=True)


@app.command()
def build(
    context: typer.Context,
    artifact: Annotated[Path, typer.Option("--artifact", "-a", help="An artifact folder that `ztp export` made.")],
    backend: BackendName = None,
    device: DeviceName = None,
    precision: Precision = None,
    batch: Batch = None,
    profile: Profile = None,
    images: Images = None,
    directory: EnginesRoot = ENGINES_ROOT,
    as_json: AsJson = False,
) -> None:
    """Build an engine folder from an artifact; int8 and fp8 are calibrated on images."""
    from ztp_deploy import backends, exporters, workflow

    request = build_request(
        profile=profile, backend=backend, device=device, precision=precision, batch=batch, engines_root=directory
    )
    if request.precision not in backends.get(backends.choose(request.backend)).CALIBRATED:
        beside = f"precision {request.precision}, which is fitted to no images"
        refuse_idle(context, ["images"], beside, "Leave it out; `ztp check` takes images for the proof.")
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
    out.print(f"Next: ztp check --engine {shlex.quote(str(engine.directory))}", soft_wrap=True)


@app.command()
def check(
    engine: EngineDir,
    images: Images = None,
    count: Annotated[int, typer.Option(help="How many images.")] = CHECK_IMAGES,
    as_json: AsJson = False,
) -> None:
    """Prove that an engine does what the eager PyTorch model does; exit code 1 where it does not."""
    from ztp_deploy import models, workflow
    from ztp_deploy.backends import find_engine, require_runnable

    found = find_engine(engine)
    require_runnable(found)
    clock = workflow.Clock(Bars())
    with clock.step(f"load {found.manifest.source.name}"):
        model = models.reload_model(found.manifest.source)
    report = workflow.check(found, model, images, clock, count)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_parity(report)
    report.require()


@app.command()
def bench(
    context: typer.Context,
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
    images: Images = None,
    batches: Batches = None,
    seconds: Seconds = BENCH_SECONDS,
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

    sizes = batch_sizes(batches)
    check_record(record)
    engine_or_model(engine, model, recipe, "ztp bench --model deit_s --ratio 0.7")
    if engine:
        idle = PLAN_OPTIONS | BUILD_OPTIONS | {"images", "fresh"}
        refuse_idle(context, idle, "--engine", "Leave it out, or give --model in place of --engine.")
        _bench_engines(engine, sizes, seconds, record, as_json)
        return
    wanted = plan_request(
        model=model,
        method=method,
        ratio=ratio,
        flops=flops,
        keep=keep,
        sites=sites,
        option=option,
        weights=weights,
        recipe=recipe,
    )
    request = build_request(profile=profile, backend=backend, device=device, precision=precision, batch=batch)
    workflow.check_runnable(request)
    with _fresh_roots(request) if fresh else contextlib.nullcontext(request) as placed:
        result = workflow.make_engine(
            wanted, placed, Bars(), images=images, batches=sizes, seconds=seconds, command=_command()
        )
    if record is not None:
        record_result(result, record)
    show_result(result, as_json, kept=not fresh)


@contextlib.contextmanager
def _fresh_roots(request: BuildRequest) -> Iterator[BuildRequest]:
    """The request with nothing built yet: its folders lie in a scratch folder while the block runs."""
    scratch = Path(tempfile.mkdtemp(prefix="ztp-bench-"))
    export_root, engines_root = (scratch / root.name for root in (EXPORT_ROOT, ENGINES_ROOT))
    try:
        yield dataclasses.replace(request, export_root=export_root, engines_root=engines_root)
    except GateFailed:
        warn(f"What failed is left in {scratch}, for you to look at and remove.")
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _bench_engines(
    engine: list[Path], sizes: list[int] | None, seconds: float, record: Path | None, as_json: bool
) -> None:
    """Measures engine folders against the first of them."""
    from ztp_deploy import workflow
    from ztp_deploy.backends import find_engine
    from ztp_deploy.evidence.report.comparison import comparison_head, comparison_rows

    if len(set(engine)) < len(engine):
        raise BadRequest("The same engine twice makes no sense with --engine.", "Give each folder once.")
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
    show_rows(comparison_head(report), comparison_rows(report), report)


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
    seconds: Seconds = BENCH_SECONDS,
    images: Images = None,
    record: Annotated[Path | None, typer.Option(help="Also write JSON and Markdown into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure pruning methods against each other, each with its slice twin, at one ratio or FLOP share."""
    check_record(record)
    from ztp_deploy import workflow
    from ztp_deploy.evidence.report.methods import HEAD, methods_rows

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if len(set(names)) < len(names) or not names or (ratio is None) == (flops is None):
        raise BadRequest(
            f"compare takes each method once and one of --ratio and --flops; --methods {methods!r} came.",
            "For example: ztp compare --model deit_s --flops 0.65 --methods zero_tprune,tome.",
        )
    options = _options_by_method(option, names)
    wanted = [
        plan_request(model=model, method=name, ratio=ratio, flops=flops, option=options[name], weights=weights)
        for name in names
    ]
    request = build_request(profile=profile, backend=backend, device=device, precision=precision, batch=batch)
    report = workflow.compare_methods(
        model,
        wanted,
        request,
        Bars(),
        images=images,
        batches=batch_sizes(batches),
        seconds=seconds,
        command=_command(),
    )
    if record is not None:
        record_methods(report, record)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_rows(HEAD, methods_rows(report), report.latency)


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
    context: typer.Context,
    model: ModelOrRecipe = None,
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
    seconds: Seconds = ENGINE_SECONDS,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency against the dense engine and the slice twin.")
    ] = True,
    export_directory: ExportRoot = EXPORT_ROOT,
    directory: EnginesRoot = ENGINES_ROOT,
    as_json: AsJson = False,
) -> None:
    """From a model's name to a checked, measured engine: plan, export, build, check, bench."""
    from ztp_deploy import workflow

    if not measure:
        refuse_idle(context, ["batches", "seconds"], "--no-bench", "Leave one of them out.")
    wanted = plan_request(
        model=model,
        method=method,
        ratio=ratio,
        flops=flops,
        keep=keep,
        sites=sites,
        option=option,
        weights=weights,
        recipe=recipe,
    )
    request = build_request(
        profile=profile,
        backend=backend,
        device=device,
        precision=precision,
        batch=batch,
        input=input,
        export_root=export_directory,
        engines_root=directory,
    )
    result = workflow.make_engine(
        wanted,
        request,
        Bars(),
        images=images,
        batches=batch_sizes(batches),
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
    count: Annotated[int, typer.Option("--canvases", min=4, help="Test canvases to classify.")] = DEMO_CANVASES,
    directory: Annotated[Path, typer.Option(help="Where canvases and pictures go.")] = PICTURES_ROOT,
    as_json: AsJson = False,
) -> None:
    """The reference classifier from start to end, offline: its engine, parity, speed-up, accuracy and pictures."""
    from ztp_deploy.evidence.report.accuracy import show_accuracy
    from ztp_deploy.reference.demo import MODEL, RATIO, demonstrate

    if ratio is None and flops is None:
        ratio = RATIO
    wanted = plan_request(model=MODEL, method=method, ratio=ratio, flops=flops, weights=weights)
    request = build_request(profile=profile, backend=backend, device=device, precision=precision)
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
        out.print(str(one.picture), soft_wrap=True)


@app.command("eval")
def eval_(
    context: typer.Context,
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
        int | None,
        typer.Option(help=f"Images a run.  \\[default: an engine's optimum; {EAGER_BATCH} in eager PyTorch]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help=f"Threads that decode images.  \\[default: one a core, at most {MAX_DECODERS}]"),
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

    engine_or_model(engine, model, recipe, "ztp eval --engine engines/… --data imagenet/val")
    fix = "Leave one of them out."
    if engine is None:
        refuse_idle(context, ["dense_engine"], "--model", fix)
    else:
        refuse_idle(context, PLAN_OPTIONS | {"record"}, "--engine", fix)
    check_record(record)
    if no_dense:
        refuse_idle(context, ["dense_engine"], "--no-dense", fix)
    request = EvalRequest(data, not no_dense, batch, workers, device, _command())
    try:
        if engine is not None:
            report = evaluate_engine(engine, request, Bars(), dense_engine=dense_engine)
        else:
            wanted = plan_request(
                model=model,
                method=method,
                ratio=ratio,
                flops=flops,
                keep=keep,
                sites=sites,
                option=option,
                weights=weights,
                recipe=recipe,
            )
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
        out.print(f"Report: {engine}/evidence/{HTML_FILE}", soft_wrap=True)


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
    from ztp_deploy.evidence.report.folder import read_evidence
    from ztp_deploy.evidence.report.html import write_report

    evidence = read_evidence(engine)
    if pictures:
        from ztp_deploy import workflow
        from ztp_deploy.show.draw import picture_report

        picture_report(pictures, engine, workflow.Clock(Bars()))
        evidence = read_evidence(engine)
    path = write_report(engine, beside or ())
    if as_json:
        print_json({"report": str(path), "pictures": len(evidence.pictures), "left_out": list(evidence.left_out)})
        return
    for line in evidence.left_out:
        warn(line)
    out.print(f"Report: {path}", soft_wrap=True)


@app.command()
def tune(
    context: typer.Context,
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
    trials: Annotated[
        int, typer.Option(help="Plans to try; a larger number goes on where a smaller one ended.")
    ] = TUNE_TRIALS,
    count: Annotated[int, typer.Option(help="How many images; half of them only judge the outcome.")] = TUNE_IMAGES,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    seconds: Annotated[float, typer.Option(help="With a latency budget: seconds of a measurement.")] = TUNE_SECONDS,
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
            context,
            BUILD_OPTIONS - {"device"} | {"seconds"},  # the device is where eager PyTorch runs, too
            f"--budget {budget}: multiply-accumulates are counted, nothing is built",
            "Leave it out, or give a latency budget.",
        )
    request = TuneRequest(
        model=model,
        images=images,
        budget=budget,
        method=method or METHOD,
        weights=weights,
        build=build_request(profile=profile, backend=backend, device=device, precision=precision),
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
        list[str] | None,
        typer.Option("--model", "-m", help=f"Models; repeatable.  \\[default: {', '.join(GPU_MODELS)}]"),
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="Only these runtimes; repeatable.  \\[default: all]")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Precisions; int8 and fp8 of TensorRT only.")] = ",".join(
        GPU_PRECISIONS
    ),
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = ",".join(map(str, GPU_BATCHES)),
    weights: Weights = "auto",
    minutes: Annotated[
        float, typer.Option(help="Begin nothing that would end later; the next call goes on.")
    ] = GPU_MINUTES,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed in earlier calls.")] = False,
    seconds: Annotated[float, typer.Option(help="Seconds of measuring a cell.")] = GPU_SECONDS,
    workers: Annotated[
        int | None,
        typer.Option(
            help=f"Processes that build engines side by side.  \\[default: half the cores, at most {GPU_WORKERS}]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(hidden=True, help="cuda, or cpu to try the report out.")] = "cuda",
    directory: Annotated[Path, typer.Option(help="Where reports lie.")] = ENGINES_ROOT / "evidence",
    as_json: AsJson = False,
) -> None:
    """Measure everything this machine's GPU can run: runtimes × precisions × batches × plans × models, resumable.

    What cannot be measured is a row that says why.
    """
    from ztp_deploy.environment import usable_cores
    from ztp_deploy.evidence.latency import check_seconds
    from ztp_deploy.gpu_report.measure import Grid, measure_gpu, report_path
    from ztp_deploy.gpu_report.runtimes import RUNTIMES
    from ztp_deploy.gpu_report.table import render_gpu_report
    from ztp_deploy.scratch import write_text

    check_seconds(seconds)
    check_seconds(minutes * 60)
    if workers is None:
        workers = max(1, min(usable_cores() // 2, GPU_WORKERS))
    grid = Grid(
        models=model or GPU_MODELS,
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
    out.print(table, soft_wrap=True)
    for line in (*progress.lines(), f"Report: {path}"):
        out.print(line, soft_wrap=True)


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
    context: typer.Context,
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
    weights: Weights = "auto",
    recipe: Recipe = None,
    directory: Annotated[Path, typer.Option(help="Where pictures go.")] = PICTURES_ROOT,
    as_json: AsJson = False,
) -> None:
    """Draw what pruning did: per image one picture with the patches each stage dropped, why, and the scores behind it."""
    engine_or_model(engine, model, recipe, "ztp show photo.jpg --model deit_s --ratio 0.7")
    wanted = None
    if engine:
        refuse_idle(context, PLAN_OPTIONS, "--engine", "The engine has its plan; or give --model.")
    else:
        wanted = plan_request(
            model=model,
            method=method,
            ratio=ratio,
            flops=flops,
            keep=keep,
            sites=sites,
            option=option,
            weights=weights,
            recipe=recipe,
        )
    from ztp_deploy import workflow
    from ztp_deploy.show.draw import show as draw

    shown = draw(images, directory, workflow.Clock(Bars()), engine=engine, wanted=wanted)
    if as_json:
        print_json(shown.to_json())
        return
    for one in shown.drawn:
        out.print(str(one.picture), soft_wrap=True)


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


def main() -> None:
    """Entry point: runs a command, turns every refusal into one sentence and its exit code."""
    end(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
