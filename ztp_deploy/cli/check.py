"""`ztp check`: the parity gate."""

from __future__ import annotations

from typing import Annotated

import typer

from ztp_deploy.atomic import check_writable
from ztp_deploy.cli import options
from ztp_deploy.console import Bars, print_json
from ztp_deploy.defaults import CHECK_IMAGES
from ztp_deploy.errors import GateFailed


def check(
    engine: options.EngineDir,
    images: options.ProofImages = None,
    count: Annotated[int, typer.Option(help="How many images.")] = CHECK_IMAGES,
    weights: options.SameWeights = None,
    as_json: options.AsJson = False,
) -> None:
    """Prove that an engine does what the eager PyTorch model does; exit code 1 where it does not."""
    from ztp_deploy.backends import find_engine, require_runnable
    from ztp_deploy.evidence.report.terminal import show_parity
    from ztp_deploy.workflow import steps
    from ztp_deploy.workflow.progress import Clock

    found = find_engine(engine)
    require_runnable(found)
    check_writable(found.evidence)
    clock = Clock(Bars())
    model = steps.reload(found.manifest.source, weights, clock)
    report = steps.check(found, model, images, clock, count)
    if as_json:
        print_json(report.model_dump(mode="json"))
        raise typer.Exit(0 if report.passed else GateFailed.exit_code)  # a refusal would be a second object
    show_parity(report)
    report.require()
