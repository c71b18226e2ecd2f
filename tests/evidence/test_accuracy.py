"""Accuracy: intervals, tests and divergences by hand, and arrays that do not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import accuracy
from ztp_deploy.evidence.accuracy import compare, hits, mcnemar, mean_kl, paired_bootstrap, wilson


def test_wilson_by_hand():
    """(p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964."""
    found = wilson(8, 10)
    assert (found.hits, found.images, found.share) == (8, 10, 0.8)
    assert found.low == pytest.approx(0.490162, abs=1e-6)
    assert found.high == pytest.approx(0.943318, abs=1e-6)
    assert wilson(0, 5).low == 0
    assert wilson(5, 5).high == 1
    for impossible in ((6, 5), (-1, 5), (0, 0)):
        with pytest.raises(BadRequest, match="are not a share"):
            wilson(*impossible)


def test_mcnemar_by_hand():
    assert mcnemar(1, 6) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(6, 1) == mcnemar(1, 6)
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1


def test_kl_by_hand():
    dense = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]))
    thin = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]))
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert mean_kl(dense, thin) == pytest.approx(by_hand / 2)
    assert mean_kl(dense + 7, thin - 1e4) == pytest.approx(by_hand / 2)  # logits are free to shift
    assert mean_kl(dense, dense) == 0
    assert mean_kl(thin, dense) == pytest.approx((0.25 * math.log(0.5) + 0.5 * math.log(2)) / 2)


def test_kl_is_the_same_in_parts(monkeypatch):
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 50, 7), np.float32)
    whole = mean_kl(one, other)
    monkeypatch.setattr(accuracy, "_ROWS", 8)
    assert mean_kl(one, other) == pytest.approx(whole, rel=1e-12)
    logs = [torch.from_numpy(x).double().log_softmax(-1) for x in (one, other)]
    assert whole == pytest.approx((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item())


def test_hits_go_by_rank_and_ties_to_the_lower_class():
    logits = np.array([[3, 2, 2, 1], [3, 2, 2, 1], [3, 2, 2, 1], [3, 2, 2, 1]], np.float32)
    labels = np.arange(4)
    assert hits(logits, labels).tolist() == [True, False, False, False]
    assert hits(logits, labels, 2).tolist() == [True, True, False, False]
    assert hits(logits, labels, 3).tolist() == [True, True, True, False]
    noise = np.random.default_rng(0).standard_normal((100, 9))
    labels = np.arange(100) % 9
    assert_array_equal(hits(noise, labels), noise.argmax(axis=1) == labels)
    best = np.argsort(-noise, axis=1, kind="stable")[:, :5]
    assert_array_equal(hits(noise, labels, 5), (best == labels[:, None]).any(axis=1))


def test_the_bootstrap_of_clusters_is_that_of_a_slow_loop():
    """The same draws, each resample put together image by image."""
    values = np.array([1.0, 0, 0, -1, 1, 1, 0, 0, 0, 0])
    clusters = np.array(["a", "b", "b", "c", "c", "c", "c", "d", "d", "d"])
    groups = [values[clusters == name] for name in "abcd"]
    order = sorted(range(4), key=lambda index: (groups[index].sum(), len(groups[index])))
    generator = np.random.default_rng(3)
    means = []
    for counts in generator.multinomial(4, [0.25] * 4, size=500):
        drawn = [groups[index] for index, count in zip(order, counts, strict=True) for _ in range(count)]
        means.append(np.concatenate(drawn).mean())
    mean, low, high = paired_bootstrap(values, clusters, draws=500, seed=3)
    assert mean == values.mean() == pytest.approx(0.2)
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), rel=1e-12)


def test_the_bootstrap_draws_as_resampling_does():
    """Against images, and clusters, drawn one by one by another generator."""
    generator = np.random.default_rng(0)
    values = generator.choice([-1, 0, 1], 400, p=[0.06, 0.9, 0.04])
    means = [generator.choice(values, 400).mean() for _ in range(4000)]
    _, low, high = paired_bootstrap(values, draws=4000)
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=0.0026)
    clusters = np.repeat(np.arange(40), 10)
    values = np.repeat(generator.choice([-1, 0, 1], 40), 10)  # images of a cluster agree: they count but once
    groups = values.reshape(40, 10)
    means = [groups[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    _, low, high = paired_bootstrap(values, clusters, draws=4000)
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=0.03)
    _, narrow, wide = paired_bootstrap(values, draws=4000)
    assert high - low > 2.5 * (wide - narrow)


def test_the_bootstrap_is_the_same_in_parts_and_by_seed(monkeypatch):
    values = np.random.default_rng(0).standard_normal(60)
    whole = paired_bootstrap(values, draws=300)
    assert paired_bootstrap(values, draws=300, seed=1) != whole
    assert paired_bootstrap(values, np.arange(60), draws=300) == whole
    monkeypatch.setattr(accuracy, "_CELLS", 60 * 7)
    assert paired_bootstrap(values, draws=300) == pytest.approx(whole, rel=1e-12)
    assert paired_bootstrap(np.zeros(5)) == (0, 0, 0)
    for wrong in (np.zeros(0), np.zeros((2, 2)), np.array([np.nan])):
        with pytest.raises(BadRequest, match="finite differences"):
            paired_bootstrap(wrong)
    with pytest.raises(BadRequest, match="clusters has shape"):
        paired_bootstrap(values, [1, 2])


def logits_for(best, classes=7):
    """Logits whose best class is as given, the next ones in order."""
    return np.stack([np.roll(np.arange(classes, 0, -1, dtype=np.float32), one) for one in best])


def test_a_comparison_by_hand():
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2])
    dense = logits_for([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])  # 8 right; 1 and 2 are second and third
    thin = logits_for([0, 1, 2, 3, 4, 6, 0, 0, 1, 4])  # 7 right: loses 5 and 6, gains the second 1
    found = compare(dense, thin, labels, draws=200)
    assert (found.images, found.classes) == (10, 7)
    assert found.dense.top1.hits == 8
    assert found.pruned.top1.hits == 7
    assert (found.top1.lost, found.top1.gained) == (2, 1)
    assert found.top1.difference == pytest.approx(-0.1)
    assert found.top1.low <= -0.1 <= found.top1.high
    assert found.top1.p_value == 1
    assert found.dense.top5 is not None
    assert found.pruned.top5 is not None
    assert found.top5 is not None
    assert found.dense.top5.hits == 10
    assert found.pruned.top5.hits == 7  # 5 after 6 comes last of seven, 6 after 0 too, 2 after 4 is sixth
    assert (found.top5.lost, found.top5.gained) == (3, 0)
    assert found.agreement.hits == 6
    assert found.mean_kl > 0
    assert compare(dense, thin, labels, clusters=np.arange(10) // 2, draws=200).top1.clusters == 5
    same = compare(dense, dense, labels, draws=50)
    assert (same.top1.low, same.top1.high, same.top1.p_value, same.mean_kl) == (0, 0, 1, 0)
    assert compare(dense[:, :5], dense[:, :5], labels % 5, draws=50).top5 is None


def test_classes_one_by_one():
    labels = np.array([2, 2, 2, 0])
    rows = accuracy.class_rows(logits_for([2, 1, 2, 0]), labels, logits_for([2, 2, 2, 1]), list("abcdefg"))
    assert [(row.label, row.name, row.images, row.dense, row.pruned) for row in rows] == [
        (0, "a", 1, 0, 1),
        (2, "c", 3, 3, 2),
    ]
    assert accuracy.class_rows(logits_for([1]), np.array([1]))[0].dense is None


@pytest.mark.parametrize(
    "dense, thin, labels, words",
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), np.zeros(3, int), "cannot be compared"),
        (np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(2, int), "labels"),
        (np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(3), "float64"),
        (np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0, int), "n at least 1"),
        (np.zeros((3, 4)), np.zeros((3, 4)), np.array([0, 4, 0]), "Image 1 has label 4, but the classes are 0 to 3"),
        (np.zeros((3, 4)), np.zeros((3, 4)), np.array([0, 0, -1]), "Image 2 has label -1"),
        (np.zeros((1, 4)), np.array([[0, np.nan, 0, 0]]), np.zeros(1, int), "logits of image 0 are NaN"),
    ],
)
def test_arrays_that_do_not_fit(dense, thin, labels, words):
    with pytest.raises(BadRequest, match=words):
        compare(dense, thin, labels)
