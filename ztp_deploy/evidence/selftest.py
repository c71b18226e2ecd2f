"""The run that travels with an engine, so that another machine can repeat it, without what made the engine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.atomic import write_bytes
from ztp_deploy.backends import EVIDENCE, load_engine
from ztp_deploy.backends.base import Session
from ztp_deploy.errors import BadRequest, DamagedFiles, GateFailed
from ztp_deploy.evidence.tolerances import TOLERANCES
from ztp_deploy.manifest import manifest_sha256

SELFTEST_FILE = "selftest.safetensors"
_FULL_BATCH = 2
"""The smallest batch in which an engine could mix up images."""
_DO_NOT_SHIP = "Do not use this engine here: build it again on this machine, and run `ztp check`."
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def write_selftest(directory: Path | str, images: NDArray[Any]) -> Path:
    """Runs an engine on the first of `images` [M, 3, H, W] and keeps what it gave in `evidence/selftest.safetensors`.

    Tensors: `images`, `logits`, `kept_1` … ascending, and `assignment_1` …, which of them carries each patch.
    Metadata: `manifest_sha256`, and `tolerance` in units of an image's logit σ. Two images where the engine's batch range allows it. Raises what `load_engine` and `run` raise.
    """
    from safetensors.numpy import save

    folder = Path(directory)
    with load_engine(folder) as session:
        manifest = session.manifest
        batch = min(max(_FULL_BATCH, manifest.batch.min), manifest.batch.max)
        pixels = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
        tensors = {"images": pixels, "logits": session.run(pixels)}
        for name, stages in (("kept", session.kept()), ("assignment", session.assignment())):
            for stage, tokens in enumerate(stages, start=1):
                tensors[f"{name}_{stage}"] = np.ascontiguousarray(tokens, dtype=np.int32)
    metadata = {
        "manifest_sha256": manifest_sha256(folder),
        "tolerance": repr(TOLERANCES[manifest.precision].logits),
    }
    path = folder / EVIDENCE / SELFTEST_FILE
    write_bytes(path, save(tensors, metadata))
    return path


def has_selftest(directory: Path) -> bool:
    """Whether an engine's folder holds a record of the engine as it stands."""
    path = directory / EVIDENCE / SELFTEST_FILE
    try:
        return path.is_file() and _Record(path).text("manifest_sha256") == manifest_sha256(directory)
    except DamagedFiles:
        return False


@dataclass(frozen=True)
class SelfTest:
    """What a repeated run found: how many images, and the largest logit difference in units of an image's logit σ."""

    images: int
    worst_logit: float


def repeat_selftest(session: Session) -> SelfTest:
    """Repeats the run that `write_selftest` recorded in an open engine's folder and compares, as the C++ runtime does.

    Raises GateFailed where tokens, their merges or logits differ, BadRequest where nothing was recorded or for another
    manifest, DamagedFiles where the record cannot be read.
    """
    path = session.directory / EVIDENCE / SELFTEST_FILE
    if not path.is_file():
        raise BadRequest(
            f"{session.directory} carries no self-test: it has no {EVIDENCE}/{SELFTEST_FILE}.",
            "Record one with `ztp check`.",
        )
    record = _Record(path)
    if record.text("manifest_sha256") != manifest_sha256(session.directory):
        raise BadRequest(f"{path} belongs to another manifest than this engine's.", "Record it again with `ztp check`.")
    wanted = session.manifest.input
    images = record.tensor("images", np.uint8 if wanted.dtype == "uint8" else np.float32, 4)
    if images.shape[1:] != (3, wanted.size, wanted.size):
        record.damaged("holds images of another size than the engine takes")
    if not session.manifest.batch.min <= len(images) <= session.manifest.batch.max:
        record.damaged(
            f"holds {len(images)} images, and the engine takes {session.manifest.batch.min} to {session.manifest.batch.max}"
        )
    if not np.isfinite(images).all():
        record.damaged("holds pixels that are NaN or infinite")
    logits = session.run(images)
    _compare_tokens(record, "kept", session.kept(), "keeps other tokens")
    _compare_tokens(record, "assignment", session.assignment(), "carries patches in other tokens")
    return SelfTest(len(images), _compare_logits(record, logits))


class _Record:
    """What was recorded; its path is in every refusal."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            path.open("rb").close()  # what refuses says why; safetensors says that there is no such file
            with safe_open(path, "np") as stored:
                self._metadata: dict[str, str] = stored.metadata() or {}
                self._tensors: dict[str, NDArray[Any]] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except OSError as error:
            raise DamagedFiles(
                f"{path} cannot be read: {error.strerror or error}.", "Check who may read it."
            ) from error
        except (SafetensorError, TypeError) as error:  # TypeError: an element type that NumPy lacks
            raise DamagedFiles(
                f"{path} is not a whole safetensors file.", "Write it again with `ztp check`."
            ) from error

    def damaged(self, what: str) -> NoReturn:
        raise DamagedFiles(f"{self._path} {what}.", "Write it again with `ztp check`.")

    def text(self, name: str) -> str:
        if name not in self._metadata:
            self.damaged(f"does not say {name}")
        return self._metadata[name]

    def tensor(self, name: str, dtype: type[np.generic], dimensions: int) -> NDArray[Any]:
        if name not in self._tensors:
            self.damaged(f"holds no {name}")
        tensor = self._tensors[name]
        if tensor.dtype != dtype or tensor.ndim != dimensions:
            self.damaged(f"holds {name} of another kind")
        return tensor

    def tolerance(self) -> float:
        """Above zero and finite, written as the C++ runtime reads numbers: without sign or blanks."""
        written = self.text("tolerance")
        value = float(written) if _NUMBER.fullmatch(written) else math.nan
        if not 0 < value < math.inf:
            self.damaged("gives no tolerance above zero")
        return value


def _compare_tokens(record: _Record, name: str, found: list[NDArray[np.int32]], does: str) -> None:
    """Holds what every stage said, [B, …], against what was recorded; `does` says what a difference means."""
    for stage, tokens in enumerate(found, start=1):
        recorded = record.tensor(f"{name}_{stage}", np.int32, 2)
        if recorded.size != tokens.size:
            record.damaged("holds another number of tokens than the engine gives")
        differing = np.flatnonzero((recorded.reshape(tokens.shape) != tokens).any(axis=1))
        if differing.size:
            raise GateFailed(
                f"Self-test fails: stage {stage} {does} on image {differing[0]} than when the engine was checked.",
                _DO_NOT_SHIP,
            )


def _compare_logits(record: _Record, logits: NDArray[np.float32]) -> float:
    """The largest difference in units of an image's logit σ."""
    tolerance = record.tolerance()
    recorded = record.tensor("logits", np.float32, 2)
    if recorded.size != logits.size:
        record.damaged("holds another number of logits than the engine gives")
    worst = 0.0
    for image, (expected, found) in enumerate(zip(recorded.reshape(logits.shape), logits, strict=True)):
        apart = _distance(expected.astype(np.float64), found.astype(np.float64))
        if not apart <= tolerance:
            raise GateFailed(
                f"Self-test fails: the same tokens are kept but logits differ by {apart:.2g} σ (at most {tolerance:.2g}) "
                f"on image {image}.",
                _DO_NOT_SHIP,
            )
        worst = max(worst, apart)
    return worst


def _distance(recorded: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Largest |difference| of an image's logits in units of the recorded ones' σ; what is not a number is infinitely far."""
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.abs(recorded - found).max()
        apart = largest / recorded.std() if largest else 0.0
    return math.inf if np.isnan(apart) else float(apart)
