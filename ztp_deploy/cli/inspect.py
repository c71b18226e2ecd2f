"""`ztp inspect`: what an engine folder holds."""

from __future__ import annotations

from rich.table import Table

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json


def inspect(engine: options.EngineDir, as_json: options.AsJson = False) -> None:
    """What an engine folder holds and whether this machine can open it; its files are verified, nothing is run."""
    from ztp_deploy.evidence.overview import overview

    found = overview(engine)
    manifest, plan = found.manifest, found.manifest.plan
    source, span = manifest.source, manifest.batch
    if as_json:
        print_json(
            {
                "engine": str(engine),
                "bytes": found.bytes,
                "library": found.library,
                "unusable": found.unusable,
                "parity": found.parity,
                "selftest": found.selftest,
                "speedups": [speedup._asdict() for speedup in found.speedups],
                "measured_on": found.measured_on,
                "manifest": manifest.model_dump(mode="json", by_alias=True),
            }
        )
        return
    stages = f"after blocks {', '.join(str(stage.block) for stage in plan.stages)}" if plan.stages else "no stage"
    tokens = " → ".join(map(str, (plan.patch_tokens, *plan.counts)))
    sides = f"[B, 3, {manifest.input.size}, {manifest.input.size}]"
    built = f"{manifest.backend} {manifest.backend_version} on {manifest.device}"
    measured = ", ".join(
        f"{one.times:.2f} × dense at batch {one.batch}{' (inconclusive)' if one.verdict == 'inconclusive' else ''}"
        for one in found.speedups
    )
    table = Table(show_header=False, box=None)
    prepared = source.preprocessing
    pictures = f"{prepared.crop_mode} crop {prepared.crop_pct:g}, {prepared.interpolation}"
    scaled = f"mean {', '.join(f'{x:g}' for x in prepared.mean)}, std {', '.join(f'{x:g}' for x in prepared.std)}"
    labels = source.labels or ()
    theirs = {name: " (your own)" if name in source.own else "" for name in ("labels", "preprocessing")}
    for name, text in {
        "model": f"{source.name} ({source.architecture or 'your own module'}), weights {source.weights.shown}",
        "plan": f"{plan.label}: tokens {tokens}, {stages}, {plan.flops.planned / plan.flops.dense:.1%} of the MACs",
        "precision": manifest.precision,
        "takes": f"{manifest.input.dtype} {sides}, batches of {span.min} to {span.max}, tuned for {span.opt}",
        "pictures": f"{pictures}, {scaled}{theirs['preprocessing']}",
        "classes": f"{len(labels)}, from {labels[0]} to {labels[-1]}{theirs['labels']}" if labels else "without names",
        "gives": ", ".join(manifest.outputs),
        "built with": built,
        "here": found.unusable or f"{manifest.backend} {found.library}",
        "files": f"{', '.join(manifest.files)}: {found.bytes / 1e6:.1f} MB, sha256 verified",
        "parity": found.parity,
        "self-test": "recorded" if found.selftest else "none recorded",
        "speed-up": f"{measured} on {found.measured_on}" if measured else "not measured",
    }.items():
        table.add_row(name, text)
    out.print(table)
