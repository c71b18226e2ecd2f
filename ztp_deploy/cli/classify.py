"""`ztp classify`: images by an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ztp_deploy.cli import options
from ztp_deploy.console import err, out, print_json, warn
from ztp_deploy.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ztp_deploy.backends.base import Session


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE…")],
    engine: options.EngineDir,
    top: Annotated[int, typer.Option(min=1, help="How many classes.")] = 5,
    as_json: options.AsJson = False,
) -> None:
    """Classify images with an engine: the best classes and their probabilities.

    What cannot be read is named, the rest is classified, and the exit code is 2.
    """
    from ztp_deploy.backends import load_engine

    files = _files(images)
    failed = 0
    entries: list[dict[str, Any]] = []
    with load_engine(engine) as session:
        random_weights = session.manifest.random_weights
        if random_weights and not as_json:
            warn("This engine has random weights: the names below mean nothing.")
        for entry in _classified(session, files, top):
            failed += "error" in entry
            if as_json:
                entries.append(entry)
            else:
                _show(entry)
    if as_json:
        print_json({"engine": str(engine), "random_weights": random_weights, "images": entries})
        raise typer.Exit(BadRequest.exit_code if failed else 0)  # a refusal would be a second object
    if failed:
        raise BadRequest(
            f"{failed} of {len(files)} images could not be read and are named above.", "Take them out, or repair them."
        )


def _files(given: Sequence[Path]) -> list[Path]:
    """The files, and of folders those that are images by name. Raises BadRequest for a folder without any."""
    from ztp_deploy.evidence.images import listed_files

    files: list[Path] = []
    for path in given:
        if not path.is_dir():
            files.append(path)
            continue
        found, strange = listed_files(path)
        inside = [file for file in found if file not in set(strange)]
        if not inside:
            raise BadRequest(f"The folder {path} holds no images.", "Give images, or a folder of them.")
        files += inside
    return files


def _classified(session: Session, files: Sequence[Path], top: int) -> Iterator[dict[str, Any]]:
    """What is known of each file, in batches that the engine takes: the best classes, or an error."""
    import numpy as np

    from ztp_deploy.backends.batches import filled

    span, labels = session.manifest.batch, session.manifest.source.labels
    for start in range(0, len(files), span.max):
        entries: list[dict[str, Any]] = []
        pictures: list[NDArray[Any]] = []
        for path in files[start : start + span.max]:
            try:
                pictures.append(session.preprocess(path)[0])
                entries.append({"image": str(path)})
            except BadRequest as error:
                if len(files) == 1:
                    raise
                entries.append({"image": str(path), "error": error.problem})
        if pictures:
            logits = session.run(filled(np.stack(pictures), span.min))[: len(pictures)].astype(np.float64)
            shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
            rows = shifted / shifted.sum(axis=1, keepdims=True)
            for entry, row in zip((one for one in entries if "error" not in one), rows, strict=True):
                entry["top"] = [
                    {"class": int(index), "name": labels[index] if labels else None, "probability": float(row[index])}
                    for index in np.argsort(-row, kind="stable")[:top]
                ]
        yield from entries


def _show(entry: dict[str, Any]) -> None:
    """An image and its classes; what could not be read goes to stderr."""
    if "error" in entry:
        err.print(f"error: {entry['error']}", soft_wrap=True)
        return
    out.print(entry["image"], style="bold", soft_wrap=True)  # piped lines stay whole
    for guess in entry["top"]:
        name = guess["name"] or f"class {guess['class']}"
        out.print(f" {guess['probability'] * 100:6.2f} %  {name}", soft_wrap=True)
