"""`ztp bench`: latency, engines interleaved; with clients or a rate, throughput and latency under load."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ztp_deploy.atomic import check_writable
from ztp_deploy.cli import options
from ztp_deploy.console import Bars, print_json, recorded, warn
from ztp_deploy.defaults import BENCH_SECONDS, ENGINES_ROOT, EXPORT_ROOT
from ztp_deploy.errors import GateFailed

if TYPE_CHECKING:
    from ztp_deploy.evidence.load import Load, LoadReport
    from ztp_deploy.workflow.requests import BuildRequest


def bench(
    context: typer.Context,
    engine: Annotated[
        list[Path] | None,
        typer.Option("--engine", "-e", help="An engine folder; repeatable, the first is the reference."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            rich_help_panel=options.MODEL_PANEL,
            help="Or a model: dense, pruned and slice twin are built and compared.",
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
    profile: options.Profile = None,
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    batch: options.Batch = None,
    images: options.Images = None,
    batches: options.Batches = None,
    clients: Annotated[
        str | None,
        typer.Option(help="Measure under load: so many clients, each asking again as soon as answered, such as 1,2,4."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Measure under load: requests that come at so many a second, such as 20 or 10,20,40."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Beside --rate: how many threads serve; by default one a core.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Seconds of measuring a batch size, under load one level of it.")
    ] = BENCH_SECONDS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Build everything anew in a scratch folder, so that its time counts.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Also write the report's JSON and Markdown into this folder, named after what was measured and the machine."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure latency, engines interleaved; with --model, everything `engine` does, measured longer.

    With --clients or --rate, throughput and latency under load.
    """
    sizes = options.listed("batches", batches, int)
    loads = _asked_loads(clients, rate, threads)
    check_writable(record)
    options.engine_or_model(engine, model, recipe, "ztp bench --model deit_s --ratio 0.7")
    if engine:
        idle = options.PLAN_OPTIONS | options.BUILD_OPTIONS | {"images", "fresh"}
        options.refuse_idle(context, idle, "--engine", "Leave it out, or give --model in place of --engine.")
        _bench_engines(engine, loads, sizes, seconds, record, as_json)
        return
    from ztp_deploy.evidence.records import record_summary
    from ztp_deploy.evidence.report.terminal import show_summary
    from ztp_deploy.workflow.make import make_and_load, make_engine
    from ztp_deploy.workflow.steps import check_runnable

    wanted = options.asked_plan(context)
    request = options.asked_build(context)
    check_runnable(request)
    command = options.command_line()
    with _fresh_roots(request) if fresh else contextlib.nullcontext(request) as placed:
        if loads is not None:
            report = make_and_load(
                wanted, placed, Bars(), loads, images=images, batches=sizes, seconds=seconds, command=command
            )
            _show_load(report, wanted.model, record, as_json)
            return
        result = make_engine(wanted, placed, Bars(), images=images, batches=sizes, seconds=seconds, command=command)
    if record is not None:
        assert result.latency is not None  # only what runs here is measured
        recorded(record_summary(result.summary, result.latency, record))
    if as_json:
        print_json(result.summary.model_dump(mode="json"))
    else:
        show_summary(result.summary, kept=not fresh)


def _asked_loads(clients: str | None, rate: str | None, threads: int | None) -> list[Load] | None:
    """The loads that the options ask for; None where they ask for none. Raises BadRequest for what makes no load."""
    if clients is None and rate is None and threads is None:
        return None
    from ztp_deploy.evidence.load import asked_loads

    numbers, rates = options.listed("clients", clients, int), options.listed("rate", rate, float, "10,20.5")
    return asked_loads(numbers, rates, threads)


@contextlib.contextmanager
def _fresh_roots(request: BuildRequest) -> Iterator[BuildRequest]:
    """The request with nothing built yet: its folders lie in a scratch folder while the block runs."""
    scratch = Path(tempfile.mkdtemp(prefix="ztp-bench-"))
    export_root, engines_root = (scratch / root.name for root in (EXPORT_ROOT, ENGINES_ROOT))
    try:
        yield request.model_copy(update={"export_root": export_root, "engines_root": engines_root})
    except GateFailed:
        warn(f"What failed is left in {scratch}, for you to look at and remove.")
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _bench_engines(
    engine: list[Path],
    loads: list[Load] | None,
    sizes: list[int] | None,
    seconds: float,
    record: Path | None,
    as_json: bool,
) -> None:
    """Measures engine folders against the first of them, under load where loads are given."""
    from ztp_deploy.backends import find_engine
    from ztp_deploy.evidence.latency import check_seconds, path_ends
    from ztp_deploy.evidence.records import record_comparison
    from ztp_deploy.evidence.report.comparison import comparison_head, comparison_rows
    from ztp_deploy.evidence.report.terminal import show_rows
    from ztp_deploy.workflow import measure
    from ztp_deploy.workflow.progress import Clock

    check_seconds(seconds)
    names = path_ends(engine, least=2)  # the folder above names back end, version and device
    named = {name: find_engine(path) for name, path in zip(names, engine, strict=True)}
    model = next(iter(named.values())).manifest.source.name
    clock, command = Clock(Bars()), options.command_line()
    if loads is not None:
        for one in named.values():
            check_writable(one.evidence)
        _show_load(measure.bench_load(named, loads, sizes, seconds, clock, command), model, record, as_json)
        return
    report = measure.bench(named, sizes, seconds, clock, command)
    if record is not None:
        recorded(record_comparison(report, model, record))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_rows(comparison_head(report), comparison_rows(report), report)


def _show_load(report: LoadReport, model: str, record: Path | None, as_json: bool) -> None:
    """Writes the record that was asked for, and prints the report."""
    from ztp_deploy.evidence.records import record_load
    from ztp_deploy.evidence.report.terminal import show_load

    if record is not None:
        recorded(record_load(report, model, record))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_load(report)
