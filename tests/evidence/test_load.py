"""Load: what is asked, turns in simulated time, percentiles, verdicts, ratios; no real figure is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evidence.simulated import IMAGES, Engine, Simulated
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import latency, load
from ztp_deploy.evidence.clients import Turn
from ztp_deploy.evidence.load import Load, LoadReport, asked_loads, judge, measure_load


def test_a_rate_too_low_for_the_time_is_refused_before_anything_runs(shared_engine, monkeypatch):
    monkeypatch.setattr(latency, "load_engine", lambda directory: pytest.fail("opened"))
    with pytest.raises(
        BadRequest, match=r"At 0\.01 requests a second, 60 seconds in 5 turns .* Give --seconds 4000 or"
    ):
        measure_load({"one": shared_engine}, rates=[20.0, 0.01], batches=[1], seconds=60)


# --- verdicts ----------------------------------------------------------------------------------


def turn(sitting=0, milliseconds=(10.0,), rate=100.0, growth=None, left=0):
    return Turn(
        sitting=sitting, seconds=1.0, images_per_second=rate, milliseconds=list(milliseconds), growth=growth, left=left
    )


def level(shared_engine, turns, rate=None, role="pruned"):
    return load.level_of(role, shared_engine, 1, Load(clients=2, rate=rate), turns)


def test_a_rate_is_sustained_or_not():
    assert judge([turn(growth=0.0)] * 6) == ("measured", None)
    verdict, reason = judge([turn(growth=0.2)] * 4 + [turn(growth=0.0)] * 2)
    assert (verdict, "queue grew" in reason) == ("not sustained", True)
    assert judge([turn(growth=0.0, left=3)] * 6)[0] == "not sustained"
    verdict, reason = judge([turn(growth=0.0, left=3)] + [turn(growth=0.0)] * 5)
    assert (verdict, "in 1 of 6 turns" in reason) == ("inconclusive", True)
    verdict, reason = judge([turn(growth=0.03)] * 6)
    assert (verdict, "waiting grew by 3%" in reason) == ("inconclusive", True)


def test_a_rate_that_is_not_sustained_has_no_latency(shared_engine):
    found = level(shared_engine, [turn(n, range(1, 101), growth=0.3, left=9) for n in range(5)], rate=50.0)
    assert found.verdict == "not sustained"
    assert [found.median, found.p90, found.p95, found.p99, found.maximum] == [None] * 5
    assert found.requests == 500
    uneven = [turn(rate=20.0, growth=0.0), turn(rate=50.0, growth=0.0).model_copy(update={"seconds": 2.0})]
    assert level(shared_engine, uneven, rate=50.0).images_per_second == pytest.approx(40.0)  # of all the time
    assert len(found.turns[0].milliseconds) == 100  # kept all the same


def test_percentiles_are_of_all_turns(shared_engine):
    found = level(shared_engine, [turn(n, np.arange(1, 101) + 100 * n) for n in range(5)])
    assert (found.requests, found.median, found.maximum) == (500, 250.5, 500.0)
    assert [found.p90, found.p95, found.p99] == pytest.approx([450.1, 475.05, 495.01])
    assert (found.backend.split()[0], found.precision, found.engine) == ("onnxruntime", "fp32", "engine")


@pytest.mark.parametrize(
    "count, p95, p99", [(19, False, False), (20, True, False), (99, True, False), (100, True, True)]
)
def test_few_requests_have_no_far_percentiles(shared_engine, count, p95, p99):
    found = level(shared_engine, [turn(milliseconds=range(1, count + 1))])
    assert (found.p95 is not None, found.p99 is not None) == (p95, p99)
    assert found.p90 is not None


def test_throughput_that_scatters_or_drifts_is_inconclusive(shared_engine):
    steady = level(shared_engine, [turn(n, rate=100 + n % 2) for n in range(6)])
    assert (steady.verdict, steady.reason) == ("measured", None)
    assert steady.low <= steady.images_per_second <= steady.high
    wide = level(shared_engine, [turn(n, rate=100 + 20 * (n % 2)) for n in range(6)])
    assert (wide.verdict, "wider than 6%" in wide.reason) == ("inconclusive", True)
    drifting = level(shared_engine, [turn(n // 1000, rate=100 + 0.005 * n) for n in range(5000)][::-1])
    assert drifting.verdict == "inconclusive"


def test_ratios_are_paired_turn_by_turn(shared_engine):
    """A machine that doubles its speed half-way leaves the ratio alone, and that of the twin is of latencies at a rate."""
    rates = [100.0, 100.0, 100.0, 200.0, 200.0, 200.0]
    dense = level(shared_engine, [turn(n, rate=rate) for n, rate in enumerate(rates)], role="dense")
    pruned = level(shared_engine, [turn(n, rate=1.5 * rate) for n, rate in enumerate(rates)])
    [ratio] = load.ratios_of([dense, pruned])
    assert (ratio.engine, ratio.reference, ratio.clients, ratio.rate) == ("pruned", "dense", 2, None)
    assert ratio.speedup == ratio.low == ratio.high == pytest.approx(1.5)
    assert (dense.verdict, ratio.verdict) == ("inconclusive", "measured")
    slow = level(shared_engine, [turn(n, [9.0, 30.0, 40.0], growth=0.0) for n in range(5)], rate=9.0, role="dense")
    fast = level(shared_engine, [turn(n, [10.0, 15.0, 99.0], growth=0.0) for n in range(5)], rate=9.0)
    assert load.ratios_of([slow, fast])[0].speedup == pytest.approx(2)
    behind = level(shared_engine, [turn(n, growth=9.0) for n in range(5)], rate=9.0)
    assert load.ratios_of([slow, behind]) == []


# --- turns -------------------------------------------------------------------------------------


def simulated_turns(seconds, runs, load_, sitting=0):
    timer = Simulated()
    engines = {role: Engine(timer, one) for role, one in runs.items()}
    images = dict.fromkeys(engines, IMAGES)
    return load.take_turns(engines, images, load_, seconds, sitting, np.random.default_rng(0), timer)


def test_engines_take_turns_in_a_random_order():
    turns = simulated_turns(12.0, {"a": 0.1, "b": 0.05}, Load(clients=2))
    roles = [role for role, _ in turns]
    assert [sorted(roles[at : at + 2]) for at in range(0, 12, 2)] == [["a", "b"]] * 6
    assert len({tuple(roles[at : at + 2]) for at in range(0, 12, 2)}) == 2
    assert {round(turn.images_per_second) for role, turn in turns if role == "a"} == {40}
    assert {round(turn.images_per_second) for role, turn in turns if role == "b"} == {80}


def test_turns_of_slow_engines_are_longer_and_those_of_fast_ones_shorter():
    [(_, slow)] = simulated_turns(1.0, {"a": 2.0}, Load(clients=1))
    assert (len(slow.milliseconds), slow.seconds) == (3, pytest.approx(6))
    [(_, fast)] = simulated_turns(1.0, {"a": 0.0001}, Load(clients=1))
    assert len(fast.milliseconds) == pytest.approx(load.MAX_ROUNDS, abs=2)


def test_every_engine_has_the_same_arrivals_and_every_sitting_others():
    def first(sitting):
        turns = simulated_turns(20.0, {"a": 0.001, "b": 0.001}, Load(clients=8, rate=50.0), sitting)
        assert sorted(role for role, _ in turns) == ["a", "b"]
        return [turn.seconds for _, turn in turns]

    (one, other), (later, _) = first(0), first(1)
    assert one == pytest.approx(other)
    assert one != pytest.approx(later)
    assert one == pytest.approx(10, rel=0.2)  # 500 arrivals at 50 a second
    [(_, turn)] = simulated_turns(20.0, {"a": 0.001}, Load(clients=8, rate=50.0))
    assert len(turn.milliseconds) == 1000


# --- what is asked -----------------------------------------------------------------------------


def test_loads_that_can_be_asked_for(monkeypatch):
    assert asked_loads([1, 2, 4], None) == [Load(clients=1), Load(clients=2), Load(clients=4)]
    assert asked_loads(None, [20, 40.5], 3) == [Load(clients=3, rate=20.0), Load(clients=3, rate=40.5)]
    monkeypatch.setattr("ztp_deploy.environment.usable_cores", lambda: 6)
    assert asked_loads(None, [20]) == [Load(clients=6, rate=20.0)]


@pytest.mark.parametrize(
    "clients, rates, threads, words",
    [
        (None, None, None, "Neither clients nor a rate"),
        ([], [], None, "Neither clients nor a rate"),
        ([2], [20.0], None, "Both clients and a rate"),
        ([0, 1], None, None, "0 clients were asked for. Give a number from 1 to 256"),
        ([257], None, None, "257 clients"),
        ([2, 1, 2], None, None, "clients has 2 twice"),
        ([2], None, 3, "3 threads were given without a rate"),
        (None, [20.0], 0, "0 threads were asked for"),
        (None, [20.0], 257, "257 threads"),
        (None, [20.0, 20.0], None, "rate has 20 twice"),
        (None, [0.0], None, "0 requests a second"),
        (None, [-3.0], None, "-3 requests a second"),
        (None, [float("nan")], None, "nan requests a second"),
        (None, [float("inf")], None, "inf requests a second"),
    ],
)
def test_loads_that_cannot(clients, rates, threads, words):
    with pytest.raises(BadRequest, match=words):
        asked_loads(clients, rates, threads)


# --- real engines ------------------------------------------------------------------------------


def test_two_engines_with_clients(shared_engine, several_streams):
    steps = []
    engines = {"dense": shared_engine, "pruned": several_streams}
    report = measure_load(engines, [1, 3], batches=[2], seconds=0.2, progress=steps.append)
    assert sum(steps) == pytest.approx(2)
    assert [(one.role, one.clients, one.rate, one.batch) for one in report.levels] == [
        ("dense", 1, None, 2), ("pruned", 1, None, 2), ("dense", 3, None, 2), ("pruned", 3, None, 2)
    ]  # fmt: skip
    for one in report.levels:
        assert {turn.sitting for turn in one.turns} == set(range(6))
        assert one.requests == sum(len(turn.milliseconds) for turn in one.turns) >= 6 * one.clients
        assert 0 < one.median <= one.p90 <= one.maximum
        assert one.images_per_second > 0
    assert [(ratio.clients, ratio.rounds) for ratio in report.ratios] == [(1, 6), (3, 6)]
    assert report.ratio("pruned", "dense", 2, Load(clients=3)) == report.ratios[1]
    assert report.ratio("pruned", "dense", 2, Load(clients=2)) is None
    assert not report.at_a_rate
    assert json.loads(report.to_json())["schema"] == "ztp.load/1"
    assert LoadReport.model_validate_json(report.to_json()) == report


def test_an_engine_at_a_rate(several_streams):
    report = measure_load([several_streams], None, [400.0], [1], threads=2, seconds=0.1)
    [found] = report.levels
    assert (found.rate, found.clients, found.low, report.ratios, report.at_a_rate) == (400.0, 2, None, [], True)
    for turn in found.turns:
        assert len(turn.milliseconds) + turn.left == load.LEAST_ARRIVALS
        assert turn.growth is not None


def test_engines_that_answer_one_by_one_are_named(shared_engine):
    """Recorded CUDA graphs have one set of buffers: more clients add to the latency alone."""
    manifest = shared_engine.manifest
    recorded = manifest.model_copy(update={"settings": {**manifest.settings, "cuda_graph": True}})
    engines = {"dense": shared_engine, "pruned": load.Engine(shared_engine.directory, recorded)}
    [note] = load.serial_notes(engines)
    assert note == "pruned replays CUDA graphs, and answers one request at a time."


def test_refusals(shared_engine):
    with pytest.raises(BadRequest, match="No batch size"):
        measure_load([shared_engine], [1], batches=())
    with pytest.raises(BadRequest, match="Batch 9 was asked for, but engine takes 1 to 8"):
        measure_load([shared_engine], [1], batches=(1, 9), seconds=0.1)
    with pytest.raises(BadRequest, match="seconds"):
        measure_load([shared_engine], [1], seconds=0)
    with pytest.raises(BadRequest, match="No engine"):
        measure_load({}, [1])
    with pytest.raises(BadRequest, match="Neither"):
        measure_load([shared_engine])
