"""Latency: interleaving, percentiles, intervals and verdicts; no figure of a machine is asserted."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ztp_deploy as ztp
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import latency
from ztp_deploy.evidence.report.comparison import comparison_rows, engine_names, render_comparison
from ztp_deploy.manifest import BatchRange


def test_bootstrap_interval_of_the_median():
    generator = np.random.default_rng(1)
    alike = [generator.normal(1.5, 0.1, 80) for _ in range(5)]
    low, high = latency.bootstrap_median(alike)
    assert low < 1.5 < high
    assert high - low < 0.05
    assert latency.bootstrap_median([np.full(20, 2.0)] * 3) == (2.0, 2.0)


def test_sittings_that_differ_widen_the_interval():
    """Rounds alone would be sure of themselves; what differs from opening to opening must show."""
    generator = np.random.default_rng(1)
    shifted = [generator.normal(mean, 0.01, 80) for mean in (1.40, 1.45, 1.50, 1.55, 1.60)]
    low, high = latency.bootstrap_median(shifted)
    assert high - low > 0.05
    pooled = [np.concatenate(shifted)]
    assert latency.bootstrap_median(pooled)[1] - latency.bootstrap_median(pooled)[0] < high - low


def ratio(reference, engine):
    return latency.paired_ratio("pruned", "dense", 1, {"dense": [reference] * 2, "pruned": [engine] * 2})


def test_ratios_are_paired_round_by_round():
    """A machine that doubles its speed half-way leaves the paired ratio alone."""
    dense = np.r_[np.full(50, 3.0), np.full(50, 1.5)]
    measured = ratio(dense, dense / 1.5)
    assert measured.speedup == measured.low == measured.high == pytest.approx(1.5)
    assert measured.verdict == "measured"
    assert measured.rounds == 200


def test_noise_and_drift_are_inconclusive():
    generator = np.random.default_rng(2)
    noisy = ratio(generator.uniform(1, 3, 15), np.ones(15))
    assert (noisy.verdict, noisy.reason.split()[-1]) == ("inconclusive", "running")
    halves = {"dense": [np.full(300, 1.0), np.full(300, 1.5)], "pruned": [np.ones(300)] * 2}
    drifting = latency.paired_ratio("pruned", "dense", 1, halves)
    assert drifting.verdict == "inconclusive"
    steady = [np.r_[np.linspace(1.0, 1.2, 3000)]]
    slow = latency.paired_ratio("pruned", "dense", 1, {"dense": steady, "pruned": [np.ones(3000)]})
    assert "drifted" in slow.reason


def test_engines_are_interleaved_and_samples_kept(shared_engine, torchscript_engine):
    seen = []
    report = ztp.measure_latency(
        {"dense": shared_engine, "pruned": torchscript_engine.directory},
        batches=(1, 3),
        seconds=0.2,
        progress=seen.append,
    )
    assert sum(seen) == pytest.approx(2)
    for batch in (1, 3):
        dense, pruned = (report.sample(role, batch).milliseconds for role in ("dense", "pruned"))
        assert [len(sitting) for sitting in dense] == [len(sitting) for sitting in pruned]
        assert len(dense) == 6  # each is opened first three times
        assert min(len(sitting) for sitting in dense) >= latency.MIN_ROUNDS
        one = report.ratio("pruned", "dense", batch)
        assert one.low <= one.speedup <= one.high
    sample = report.sample("dense", 3)
    assert sample.median == pytest.approx(np.median(np.concatenate(sample.milliseconds)), abs=1e-3)
    assert sample.median <= sample.p90 <= sample.p95
    assert sample.images_per_second == pytest.approx(3000 / sample.median)
    assert report.environment["cores"] >= 1
    assert report.gpu.startswith("GPU: ")


def test_engines_of_one_name_in_different_places_are_all_measured(shared_engine, tmp_path):
    """Canonical folders of two back ends differ in the parent alone."""
    name = shared_engine.directory.name
    for place in ("here", "there"):
        shutil.copytree(shared_engine.directory, tmp_path / place / name)
    report = ztp.measure_latency([tmp_path / place / name for place in ("here", "there")], (1,), seconds=0.1)
    assert [sample.role for sample in report.samples] == [f"here/{name}", f"there/{name}"]
    assert len(report.ratios) == 1
    with pytest.raises(BadRequest, match="twice"):
        ztp.measure_latency([shared_engine.directory, shared_engine.directory], (1,))


def test_roles_are_as_short_as_tells_them_apart():
    assert latency.path_ends([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert latency.path_ends([Path("/x/1/a"), Path("/x/2/a"), Path("/x/2/b")]) == ["1/a", "2/a", "2/b"]
    assert latency.path_ends([Path("/1/x/a"), Path("/2/x/a")]) == ["1/x/a", "2/x/a"]


def test_p99_needs_a_hundred_samples(shared_engine):
    few = latency._summary("dense", shared_engine, 1, [[0.001] * 99])
    many = latency._summary("dense", shared_engine, 1, [[0.001] * 50, [0.001] * 49 + [0.002]])
    assert few.p99 is None
    assert many.p99 == pytest.approx(1.01, abs=0.02)


def test_the_order_of_a_round_is_random():
    """Whoever always ran after the same neighbour would inherit its caches."""
    order = []

    class Recorder:
        def __init__(self, role):
            self.role = role

        def run(self, images):
            order.append(self.role)

    roles = {role: Recorder(role) for role in "abc"}
    times = latency.interleave(
        roles, dict.fromkeys(roles), 1000.0, np.random.default_rng(0), lambda share: None, settling=0.0
    )
    measured = order[-6 * latency.MAX_ROUNDS :]  # what came before was warm-up
    # Every turn is an untimed run and a timed one.
    assert measured[::2] == measured[1::2]
    assert {len(values) for values in times.values()} == {latency.MAX_ROUNDS}
    rounds = ["".join(measured[start : start + 6 : 2]) for start in range(0, len(measured), 6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6


@pytest.fixture
def brief_latency():
    """Here the seconds are what is tested."""


def test_caches_settle_before_a_run_is_timed():
    """An engine that takes no time is run again and again for 0.05 s, then timed once."""
    runs = []
    latency.interleave(
        {"a": SimpleNamespace(run=runs.append)},
        {"a": "image"},
        0.01,
        np.random.default_rng(0),
        lambda share: None,
        stopwatch=lambda run: runs.append("turn") or run() or 0.001,
    )
    assert runs.count("turn") == runs.count("image")
    assert len(runs) > 2 * 100 * latency.MIN_ROUNDS
    slow = []
    times = latency.interleave(
        {"a": SimpleNamespace(run=slow.append)},
        {"a": "image"},
        0.01,
        np.random.default_rng(0),
        lambda share: None,
        stopwatch=lambda run: run() or time.sleep(0.06) or 0.06,
    )["a"]
    warm_up = -(-latency.WARM_UP_SECONDS // 0.06)
    assert len(times) == latency.MIN_ROUNDS
    assert len(slow) <= warm_up + 2 + 2 * latency.MIN_ROUNDS  # an untimed run and a timed one


@pytest.mark.parametrize("count", range(1, 13))
def test_every_engine_is_opened_as_often_in_every_place(count):
    """Of equal engines, the first one to be opened is the slowest."""
    roles = [f"r{number}" for number in range(count)]
    orders = latency.orders_of_opening(roles)
    assert 5 <= len(orders) < 5 + count
    for place in zip(*orders, strict=True):
        assert sorted(place) == sorted(roles * (len(orders) // count))


def test_three_engines_are_opened_in_all_their_orders():
    assert len({tuple(order) for order in latency.orders_of_opening("abc")}) == 6


@pytest.mark.parametrize(
    "spans, batches",
    [
        (["1:8:64"], [1, 8]),
        (["1:1:1"], [1]),
        (["4:8:16"], [8]),
        (["4:4:4"], [4]),
        (["2:4:6"], [4]),
        (["1:8:64", "1:1:4"], [1]),
        (["8:8:8", "1:8:64"], [8]),
        (["2:4:7", "1:8:64"], [4]),
        (["16:32:64", "2:4:24"], [24]),
    ],
)
def test_usual_batches_are_those_that_all_engines_take(spans, batches):
    assert latency.usual_batches([BatchRange.parse(span) for span in spans]) == batches


def test_unasked_batches_are_the_usual_ones(shared_engine):
    report = ztp.measure_latency([shared_engine], seconds=0.1)
    assert [sample.batch for sample in report.samples] == [1, 8]


def test_refusals(shared_engine):
    with pytest.raises(BadRequest, match="one begins at 8, another ends at 4"):
        latency.usual_batches([BatchRange.parse(span) for span in ("1:1:4", "8:8:8")])
    with pytest.raises(BadRequest, match="No batch size"):
        ztp.measure_latency([shared_engine], batches=())
    with pytest.raises(BadRequest, match="Batch 9 was asked for, but engine takes 1 to 8"):
        ztp.measure_latency([shared_engine], batches=(9,), seconds=0.1)
    with pytest.raises(BadRequest, match="Batch 4 was asked for twice"):
        ztp.measure_latency([shared_engine], batches=(4, 1, 4))
    with pytest.raises(BadRequest, match="seconds"):
        ztp.measure_latency([shared_engine], seconds=0)
    with pytest.raises(BadRequest, match="No engine"):
        ztp.measure_latency({})


def test_a_comparison_names_back_ends_and_plans(shared_engine, torchscript_engine):
    roles = {
        "onnxruntime-1.31.1-cpu/deit_t--dense--fp32--b1-4-8": shared_engine,
        "openvino-2026.4.1-cpu/deit_t--dense--int8--b2-2-2--s58160a": shared_engine,
        "torchscript-2.15.0-cpu/deit_t--zero_tprune-0.7--bf16--b1-4-8--random": torchscript_engine,
    }
    report = ztp.measure_latency(roles, batches=(2,), seconds=0.2)
    lines = render_comparison(report).splitlines()
    assert lines[0].startswith("| batch | engine |")
    assert "over onnxruntime 1.31.1 dense fp32 (95 % interval)" in lines[0]
    assert lines[2].startswith("| 2 | onnxruntime 1.31.1 dense fp32 |")
    assert lines[3].startswith("| 2 | openvino 2026.4.1 dense int8, fixed batch, settings s58160a |")
    assert lines[4].startswith("| 2 | torchscript 2.15.0 zero_tprune-0.7 bf16 |")
    assert "calibration" not in render_comparison(report)
    dense, _, pruned = roles
    ratio = report.ratio(pruned, dense, 2)
    assert f"**{ratio.speedup:.2f} ×** ({ratio.low:.2f}–{ratio.high:.2f})" in lines[4]


def test_a_comparison_tells_calibrations_apart_where_they_differ(shared_engine):
    start = "openvino-2026.4.1-cpu/deit_t--dense"
    names = [f"{start}--fp32--b1-4-8", f"{start}--int8--b1-4-8--c0000aa", f"{start}--int8--b1-4-8--c0000bb"]
    report = ztp.measure_latency(dict.fromkeys(names, shared_engine), batches=(2,), seconds=0.2)
    shown = [row[1] for row in comparison_rows(report)]
    dense = "openvino 2026.4.1 dense"
    assert shown == [f"{dense} fp32", f"{dense} int8, calibration c0000aa", f"{dense} int8, calibration c0000bb"]
    fewer = report.model_copy(update={"samples": report.samples[:2]})
    assert [row[1] for row in comparison_rows(fewer)] == [f"{dense} fp32", f"{dense} int8"]
    alone = render_comparison(report.model_copy(update={"samples": report.samples[:1]})).splitlines()
    assert alone[0] == "| batch | engine | ms per image: median | p90 | images/s |"  # over nobody
    assert alone[2].count("|") == 6


@pytest.mark.parametrize(
    "machines, engines, told",
    [
        (
            "ort-1-cpu",
            ("deit_s--dense--fp32--b1-8-64", "deit_s--dense--fp32--b1-1-16"),
            ("batch 1:8:64", "batch 1:1:16"),
        ),
        ("ort-1-cpu", ("deit_t--dense--fp32--b1-8-64", "deit_s--dense--fp32--b1-8-64"), ("deit_t", "deit_s")),
        ("ort-1-cpu", ("m--dense--fp32--b1-2-4", "m--dense--fp32--b1-2-4--uint8"), ("float32 input", "uint8 input")),
        (
            "ort-1-cpu",
            ("m--dense--fp32--b1-2-4", "m--dense--fp32--b1-2-4--l0000aa--p0000bb"),
            ("usual labels, usual preprocessing", "labels l0000aa, preprocessing p0000bb"),
        ),
        (
            "ort-1-cpu",
            ("m--dense--fp32--b1-8-64", "m--dense--fp32--b1-8-64--random", "m--dense--fp32--b1-8-64--w0123ab"),
            ("pretrained weights", "random weights", "weights w0123ab"),
        ),
        (
            "ort-1-cpu",
            (
                "a--dense--fp32--b1-8-64--uint8--random",
                "b--dense--fp32--b1-8-64--uint8",
                "a--dense--fp32--b1-1-8--random",
            ),
            (
                "a, batch 1:8:64, uint8 input, random weights",
                "b, batch 1:8:64, uint8 input, pretrained weights",
                "a, batch 1:1:8, float32 input, random weights",
            ),
        ),
        ("ort-1-cpu ort-1-cuda-nvidia-h200-sm90", ("m--dense--fp32--b1-8-64",) * 2, ("cpu", "cuda-nvidia-h200-sm90")),
    ],
)
def test_engines_that_differ_have_names_that_differ(machines, engines, told):
    machines = (machines.split() * len(engines))[: len(engines)]
    roles = [f"{machine}/{engine}" for machine, engine in zip(machines, engines, strict=True)]
    assert list(engine_names(roles).values()) == [f"ort 1 dense fp32, {words}" for words in told]
    other = "ov-2-cpu/c--dense--fp32--b1-2-4--random"  # what is known apart says no more
    assert engine_names([*roles, other]) == {**engine_names(roles), other: "ov 2 dense fp32"}


def test_engines_that_only_their_place_tells_apart_are_called_by_it():
    ends = [f"{place}/ort-1-cpu/m--dense--fp32--b1-8-64" for place in ("a", "b")]
    assert engine_names(ends) == {end: end for end in ends}
    assert engine_names([ends[0], "a/ort-1-cpu/m--dense--int8--b1-8-64"]) == {
        ends[0]: "ort 1 dense fp32",
        "a/ort-1-cpu/m--dense--int8--b1-8-64": "ort 1 dense int8",
    }
    own = ["dense", "engines/mine", "x/m--dense--fp32--b1-8-64", "m--dense--fp32--b1-8-64"]
    assert engine_names(own) == {end: end for end in own}
