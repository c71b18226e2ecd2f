"""Logits of one model on labelled pictures: batch by batch, kept in a file so that an interrupted run goes on."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.atomic import write_bytes
from ztp_deploy.errors import BadRequest, DamagedFiles, GateFailed
from ztp_deploy.evidence.accuracy import Speed
from ztp_deploy.evidence.labelled import Labelled, batches
from ztp_deploy.manifest import hash_of
from ztp_deploy.preprocessing import Transform

SAVE_EVERY = 25
"""Batches between two writes of the partial file."""


@dataclass(frozen=True)
class Predictor:
    """What gives logits: `forward` takes prepared pictures [≤ batch, 3, H, W] to [≤ batch, classes].

    `runs` names it for reports. `identity` is all that decides its logits but the data.
    """

    role: Literal["dense", "pruned"]
    runs: str
    identity: dict[str, str]
    transform: Transform
    batch: int
    forward: Callable[[NDArray[Any]], NDArray[Any]]


def partial_file(folder: Path, predictor: Predictor, data: Labelled) -> Path:
    """Where an unfinished run lies: named after all that decides its logits, batch size and data included."""
    return folder / f"accuracy-{predictor.role}-{_key(predictor, data)[:16]}.npz"


def _key(predictor: Predictor, data: Labelled) -> str:
    return hash_of(identity=predictor.identity, batch=predictor.batch, data=data.sha256, written=data.written)


def predict(
    predictor: Predictor,
    data: Labelled,
    classes: int,
    *,
    workers: int,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[NDArray[np.float32], Speed]:
    """Logits [n, classes] of all pictures, and how fast they came.

    With a `folder` the logits so far are written there now and then and when the run is cut short, and an earlier
    run's are gone on from; the file stays until the caller takes it away, when what it is for is safe. Raises
    BadRequest for pictures that cannot be read, GateFailed where logits are NaN or infinite, DamagedFiles for a
    partial file that cannot be read.
    """
    count = len(data.files)
    logits = np.empty((count, classes), np.float32)
    partial = partial_file(folder, predictor, data) if folder else None
    first = done = _restore(partial, _key(predictor, data), logits) if partial else 0
    advance(first)
    if partial and not partial.is_file():
        _save(partial, _key(predictor, data), logits[:0])  # a folder that takes no files is found out now
    begin = time.perf_counter()
    try:
        for number, pictures in enumerate(batches(data, predictor.transform, predictor.batch, workers, first), 1):
            found = predictor.forward(pictures)
            _check(found, data.names[done : done + len(pictures)], classes)
            logits[done : done + len(found)] = found
            done += len(found)
            advance(len(found))
            if partial and number % SAVE_EVERY == 0 and done < count:
                _save(partial, _key(predictor, data), logits[:done])
        seconds = time.perf_counter() - begin
    except BaseException as error:
        if partial and done > first:
            _save(partial, _key(predictor, data), logits[:done])
        elif partial and not done:
            partial.unlink(missing_ok=True)
        if partial and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{done} of {count} images are kept, and the same command goes on") from error
        raise
    if partial and done > first:
        _save(partial, _key(predictor, data), logits)
    speed = Speed(
        role=predictor.role,
        runs=predictor.runs,
        batch=predictor.batch,
        workers=workers,
        images=count - first,
        seconds=round(seconds, 3),
        images_per_second=(count - first) / seconds if count > first else None,
    )
    return logits, speed


def _check(found: NDArray[Any], names: tuple[str, ...], classes: int) -> None:
    if found.shape != (len(names), classes):
        raise BadRequest(
            f"{len(names)} images of {classes} classes were run; got logits {list(found.shape)}.",
            "Compare models of the same classes.",
        )
    wrong = ~np.isfinite(found).all(axis=1)
    if wrong.any():
        raise GateFailed(
            f"The logits of {names[int(wrong.argmax())]} are NaN or infinite.",
            "Do not ship this model; run `ztp check` on the engine.",
        )


def _save(path: Path, key: str, logits: NDArray[np.float32]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), logits=logits)
    write_bytes(path, buffer.getvalue())


def _restore(path: Path, key: str, logits: NDArray[np.float32]) -> int:
    """Fills in what an earlier run left and returns how many images that are; 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        with np.load(path, allow_pickle=False) as left:
            found, kept = str(left["key"]), left["logits"]
            if found != key or kept.dtype != logits.dtype or kept.shape[1:] != logits.shape[1:]:
                raise ValueError("another run's")
            logits[: len(kept)] = kept
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFiles(f"{path} holds no run that can be gone on from.", "Remove it and start anew.") from error
    return len(kept)
