"""What pruning costs in accuracy: two models' logits on the same labelled images, compared image by image.

Arrays in, records out; nothing is read, run or written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart

ACCURACY_FILE = "accuracy.json"
CONFIDENCE = 0.95
DRAWS = 10_000
TOP = 5
_ROWS = 4096
"""Images whose probabilities are in memory at once."""
_CELLS = 1 << 22
"""Bootstrap counts that are in memory at once."""


class _Record(EvidencePart):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Proportion(_Record):
    """`hits` of `images`, and the Wilson interval of their share."""

    hits: int
    images: int
    share: float
    low: float
    high: float
    confidence: float = CONFIDENCE


class Accuracy(_Record):
    """Images whose label is the best class, or among the best five (None where there are no more than five)."""

    top1: Proportion
    top5: Proportion | None


class Change(_Record):
    """Share of right answers, pruned less dense, with its paired bootstrap interval.

    `lost` images were right before, `gained` only after. `p_value` is McNemar's, exact and two-sided; it takes
    images as independent, also where `clusters` (None: no) were resampled instead of images.
    """

    difference: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    draws: int
    seed: int
    clusters: int | None
    lost: int
    gained: int
    p_value: float


class ClassRow(_Record):
    """One class's images, and how many of them each model has right; `dense` is None where there is no reference."""

    label: int
    name: str | None
    images: int
    dense: int | None
    pruned: int


class Comparison(_Record):
    """Two models on the same images.

    `agreement` counts equal best classes, right or wrong; `mean_kl` is KL(dense ‖ pruned) of their probabilities, in
    nats per image.
    """

    images: int
    classes: int
    dense: Accuracy
    pruned: Accuracy
    top1: Change
    top5: Change | None
    agreement: Proportion
    mean_kl: float


class Speed(_Record):
    """How fast the images went by, from their files to logits: reading, decoding and preprocessing are in it.

    `images` are those of the call that ended the run; None a second where all were there from an earlier one.
    """

    role: Literal["dense", "pruned"]
    runs: str
    batch: int
    workers: int
    images: int
    seconds: float
    images_per_second: float | None


class AccuracyReport(EvidenceFile):
    """An evaluation on labelled images (`evidence/accuracy.json`).

    `runs` and `reference` say what gave the logits; the manifest hashes are None for eager PyTorch, and
    `comparison` is None without a reference. `mapping` says how labels became class indices.
    """

    model_config = ConfigDict(frozen=True)

    schema_: Literal["ztp.accuracy/1"] = Field(default="ztp.accuracy/1", alias="schema")
    command: str
    started: str
    model: str
    plan: str
    runs: str
    precision: str
    manifest_sha256: str | None
    weights: str
    weights_sha256: str
    reference: str | None
    reference_manifest_sha256: str | None
    data: str
    data_sha256: str
    images: int
    classes: int
    mapping: str
    accuracy: Accuracy
    comparison: Comparison | None
    per_class: tuple[ClassRow, ...]
    speed: tuple[Speed, ...]
    notes: tuple[str, ...]
    environment: dict[str, Any]


def wilson(hits: int, images: int) -> Proportion:
    """A share with its Wilson 95 % interval. Raises BadRequest unless 0 ≤ hits ≤ images and there are images."""
    from scipy.stats import binomtest

    if not 0 <= hits <= images or images < 1:
        raise BadRequest(f"{hits} hits of {images} images are not a share.", "Give at least one image.")
    interval = binomtest(int(hits), int(images)).proportion_ci(CONFIDENCE, method="wilson")
    return Proportion(
        hits=int(hits), images=int(images), share=hits / images, low=float(interval.low), high=float(interval.high)
    )


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p-value: that of a fair coin over the images where just one model is right."""
    from scipy.stats import binomtest

    return float(binomtest(int(lost), int(lost + gained), 0.5).pvalue) if lost + gained else 1.0


def paired_bootstrap(
    difference: NDArray[Any], clusters: NDArray[Any] | Sequence[Any] | None = None, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of per-image differences [n] and its percentile bootstrap 95 % interval: (mean, low, high).

    `clusters` [n] are group ids, numbers or text: whole groups are resampled, and each resample's mean is over as
    many images as it drew, so that large groups weigh what they hold. Raises BadRequest for arrays that do not fit.
    """
    values = np.asarray(difference, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or draws < 1:
        raise BadRequest(
            f"A bootstrap takes finite differences [n] and at least one draw; got {list(values.shape)} and {draws}.",
            "Give one number per image.",
        )
    sums, sizes = _cluster_sums(values, clusters)
    # Resampling groups one by one is a multinomial draw of how often each comes; groups of equal sum and size are
    # as good as one another, so that a draw over the kinds of group is the same draw, and a short one.
    kinds, count = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, _CELLS // len(kinds))
    for start in range(0, draws, step):
        drawn = generator.multinomial(len(sums), count / len(sums), size=min(step, draws - start))
        means[start : start + step] = (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(values.mean()), float(low), float(high)


def _cluster_sums(values: NDArray[Any], clusters: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Every group's sum and size; without groups every image is its own."""
    if clusters is None:
        return values, np.ones(len(values))
    ids = np.asarray(clusters)
    if ids.shape != values.shape:
        raise BadRequest(
            f"clusters has shape {list(ids.shape)} for {len(values)} images.", "Give one group id an image."
        )
    _, group = np.unique(ids, return_inverse=True)
    return np.bincount(group, values), np.bincount(group).astype(np.float64)


def hits(logits: NDArray[Any], labels: NDArray[Any], top: int = 1) -> NDArray[np.bool_]:
    """Per image, whether its label is among the `top` best classes; of equal logits the lower class is the better.

    logits [n, classes], labels [n]. Raises BadRequest where they do not fit each other.
    """
    logits, labels = _checked(logits, labels)
    own = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1]) < labels[:, None]
    better: NDArray[Any] = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return np.asarray(better < top)


def accuracy(logits: NDArray[Any], labels: NDArray[Any]) -> Accuracy:
    """Top-1 and top-5 of logits [n, classes] against labels [n]."""

    def share(top: int) -> Proportion:
        right = hits(logits, labels, top)
        return wilson(int(right.sum()), len(right))

    return Accuracy(top1=share(1), top5=share(TOP) if np.shape(logits)[1] > TOP else None)


def class_rows(
    logits: NDArray[Any],
    labels: NDArray[Any],
    reference_logits: NDArray[Any] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[ClassRow, ...]:
    """Top-1 class by class, classes without an image left out."""
    right = hits(logits, labels)
    before = None if reference_logits is None else hits(reference_logits, labels)
    rows = []
    for label in np.unique(labels).tolist():
        mine = np.asarray(labels) == label
        rows.append(
            ClassRow(
                label=label,
                name=names[label] if names else None,
                images=int(mine.sum()),
                dense=None if before is None else int(before[mine].sum()),
                pruned=int(right[mine].sum()),
            )
        )
    return tuple(rows)


def mean_kl(reference_logits: NDArray[Any], logits: NDArray[Any]) -> float:
    """KL(reference ‖ other) of the probabilities behind two arrays of logits [n, classes], in nats per image."""
    return float(image_kl(reference_logits, logits).mean())


def image_kl(reference_logits: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.float64]:
    """The same of every image, [n]."""
    found = np.empty(len(logits))
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        one, other = _log_softmax(reference_logits[rows]), _log_softmax(logits[rows])
        found[rows] = (np.exp(one) * (one - other)).sum(axis=1)
    return found


def _log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def compare(
    reference_logits: NDArray[Any],
    logits: NDArray[Any],
    labels: NDArray[Any],
    *,
    clusters: NDArray[Any] | Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Dense against pruned on the same images: both logits [n, classes], labels [n] as class indices.

    `clusters` [n], where given, are the groups that the bootstrap resamples (photographs of one object, say).
    Raises BadRequest for arrays that do not fit each other or hold NaN or infinities.
    """
    if np.shape(reference_logits) != np.shape(logits):
        raise BadRequest(
            f"Logits {list(np.shape(reference_logits))} and {list(np.shape(logits))} cannot be compared.",
            "Run both models on the same images and classes.",
        )
    reference_logits, _ = _checked(reference_logits, labels)
    logits, labels = _checked(logits, labels)

    def change(top: int) -> Change:
        before, after = hits(reference_logits, labels, top), hits(logits, labels, top)
        difference, low, high = paired_bootstrap(after.astype(np.int8) - before.astype(np.int8), clusters, draws, seed)
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        return Change(
            difference=difference,
            low=low,
            high=high,
            draws=draws,
            seed=seed,
            clusters=None if clusters is None else len(np.unique(np.asarray(clusters))),
            lost=lost,
            gained=gained,
            p_value=mcnemar(lost, gained),
        )

    count, classes = logits.shape
    same = int((reference_logits.argmax(axis=1) == logits.argmax(axis=1)).sum())
    return Comparison(
        images=count,
        classes=classes,
        dense=accuracy(reference_logits, labels),
        pruned=accuracy(logits, labels),
        top1=change(1),
        top5=change(TOP) if classes > TOP else None,
        agreement=wilson(same, count),
        mean_kl=mean_kl(reference_logits, logits),
    )


def _checked(logits: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size or labels.dtype.kind not in "iu":
        raise BadRequest(
            f"Accuracy takes logits [n, classes] and whole-number labels [n], n at least 1; got {list(logits.shape)} and "
            f"{labels.dtype} {list(labels.shape)}.",
            "Give one class index an image.",
        )
    if not np.isfinite(logits).all():
        first = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise BadRequest(f"The logits of image {first} are NaN or infinite.", "Check the model that gave them.")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise BadRequest(
            f"Image {first} has label {labels[first]}, but the classes are 0 to {logits.shape[1] - 1}.",
            "Labels are class indices, counted from 0.",
        )
    return logits, labels
