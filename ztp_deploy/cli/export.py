"""`ztp export`: a pruned model as a graph file."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, out, print_json
from ztp_deploy.defaults import EXPORT_ROOT


def export(
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
    format: Annotated[str, typer.Option(help="onnx, torch_export or torchscript.")] = "onnx",
    precision: options.GraphPrecision = None,
    input: options.InputType = None,
    directory: options.ExportRoot = EXPORT_ROOT,
    as_json: options.AsJson = False,
) -> None:
    """Export a pruned model to a folder with its graph and manifest."""
    from ztp_deploy import exporters
    from ztp_deploy.workflow.progress import Clock
    from ztp_deploy.workflow.steps import export_model, load

    exporters.get(format)
    wanted = options.asked_plan(context)
    request = options.asked_build(context, export_root=directory)
    exporters.check_precision(format, request.precision)
    wanted.backbone.check()
    wanted.check()
    clock = Clock(Bars())
    module = load(wanted.backbone, clock)
    artifact = export_model(module, wanted.plan(module), request, format, request.precision, clock)
    if as_json:
        print_json(
            {"artifact": str(artifact.directory), "manifest": artifact.manifest.model_dump(mode="json", by_alias=True)}
        )
        return
    size = sum(record.bytes for record in artifact.manifest.files.values())
    out.print(f"Exported {wanted.model} {artifact.manifest.plan.label} as {format}, {size / 2**20:.1f} MiB.")
    out.print(f"Artifact: {artifact.directory}", soft_wrap=True)
    out.print(f"Next: ztp build --artifact {shlex.quote(str(artifact.directory))}", soft_wrap=True)
