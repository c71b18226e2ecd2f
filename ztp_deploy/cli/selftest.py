"""`ztp selftest`: the recorded run, repeated on this machine."""

from __future__ import annotations

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json


def selftest(engine: options.EngineDir, as_json: options.AsJson = False) -> None:
    """Repeat the run recorded in an engine's folder, on this machine; exit code 1 where it differs."""
    from ztp_deploy.backends import load_engine
    from ztp_deploy.evidence.selftest import repeat_selftest

    with load_engine(engine) as session:
        found = repeat_selftest(session)
    if as_json:
        print_json({"engine": str(engine), "images": found.images, "worst_logit": found.worst_logit})
        return
    out.print(
        f"Self-test holds: {found.images} images, the same tokens kept, logits within {found.worst_logit:.2g} σ.",
        style="green",
        soft_wrap=True,
    )
