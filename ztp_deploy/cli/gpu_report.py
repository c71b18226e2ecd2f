"""`ztp gpu-report`: everything a GPU can run, measured."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import err, out, print_json
from ztp_deploy.defaults import (
    ENGINES_ROOT,
    GPU_BATCHES,
    GPU_MINUTES,
    GPU_MODELS,
    GPU_PRECISIONS,
    GPU_SECONDS,
    GPU_WORKERS,
)


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
    weights: options.Weights = "auto",
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
    as_json: options.AsJson = False,
) -> None:
    """Measure everything this machine's GPU can run: runtimes × precisions × batches × plans × models, resumable.

    What cannot be measured is a row that says why.
    """
    from pydantic import ValidationError

    from ztp_deploy.atomic import write_text
    from ztp_deploy.environment import usable_cores
    from ztp_deploy.evidence.latency import check_seconds
    from ztp_deploy.gpu_report.grid import Grid
    from ztp_deploy.gpu_report.measure import measure_gpu, report_path
    from ztp_deploy.gpu_report.rows import GpuReport
    from ztp_deploy.gpu_report.runtimes import RUNTIMES
    from ztp_deploy.gpu_report.table import render_gpu_report

    check_seconds(seconds)
    check_seconds(minutes, "minutes")
    if workers is None:
        workers = max(1, min(usable_cores() // 2, GPU_WORKERS))
    grid = Grid(
        models=model or GPU_MODELS,
        runtimes=runtime or RUNTIMES,
        precisions=precisions.replace(" ", "").split(","),
        batches=options.listed("batches", batches, int),
        device=device,
        weights=weights,
        seconds=seconds,
        workers=workers,
    )
    path = report_path(directory, device)

    def write_table(report: GpuReport) -> str:
        table = render_gpu_report(report)
        write_text(path.with_suffix(".md"), table)
        return table

    try:
        result = measure_gpu(
            grid, path, minutes=minutes, retry=retry, command=options.command_line(), advance=err.print
        )
    except BaseException:  # Ctrl-C, too: the table beside the file shows what the file holds
        with suppress(FileNotFoundError, ValidationError):
            write_table(GpuReport.model_validate_json(path.read_bytes()))
        raise
    table = write_table(result.report)
    if as_json:
        print_json(result.report.model_dump(mode="json"))
        return
    out.print(table, soft_wrap=True)
    for line in (*result.lines(), f"Report: {path}"):
        out.print(line, soft_wrap=True)
