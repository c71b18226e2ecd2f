"""`ztp classify`: images by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json, warn


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE…")],
    engine: options.EngineDir,
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    as_json: options.AsJson = False,
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
    for entry in found:  # soft_wrap: piped lines stay whole
        out.print(entry["image"], style="bold", soft_wrap=True)
        for guess in entry["top"]:
            name = guess["name"] or f"class {guess['class']}"
            out.print(f" {guess['probability'] * 100:6.2f} %  {name}", soft_wrap=True)
