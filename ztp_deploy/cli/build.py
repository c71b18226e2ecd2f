"""`ztp build`: an artifact into an engine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import Bars, out, print_json
from ztp_deploy.defaults import ENGINES_ROOT
from ztp_deploy.errors import BadRequest


def build(
    context: typer.Context,
    artifact: Annotated[Path, typer.Option("--artifact", "-a", help="An artifact folder that `ztp export` made.")],
    backend: options.BackendName = None,
    device: options.DeviceName = None,
    precision: options.Precision = None,
    batch: options.Batch = None,
    profile: options.Profile = None,
    images: options.Images = None,
    directory: options.EnginesRoot = ENGINES_ROOT,
    as_json: options.AsJson = False,
) -> None:
    """Build an engine folder from an artifact; int8 and fp8 are calibrated on images."""
    from ztp_deploy import backends, exporters
    from ztp_deploy.workflow.progress import Clock
    from ztp_deploy.workflow.steps import build_engine

    request = options.asked_build(context, engines_root=directory)
    if request.precision not in backends.get(backends.choose(request.backend)).CALIBRATED:
        beside = f"precision {request.precision}, which is fitted to no images"
        options.refuse_idle(context, ["images"], beside, "Leave it out; `ztp check` takes images for the proof.")
    found = exporters.load_artifact(artifact)
    takes = found.manifest.input.dtype
    if "input" in request.model_fields_set and request.input != takes:
        raise BadRequest(
            f"The profile {profile} asks for {request.input} images, and {artifact} was exported for {takes}.",
            f"Export again with --input {request.input}, or let `ztp engine --profile {shlex.quote(str(profile))}` do both.",
        )
    engine = build_engine(found, request, Clock(Bars()), images)
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
