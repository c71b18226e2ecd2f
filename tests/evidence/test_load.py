"""Load: percentiles, throughput and waiting in simulated time, verdicts, errors in clients; no real figure is asserted."""

from __future__ import annotations

import _thread
import heapq
import itertools
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import ztp_deploy as ztp
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import load
from ztp_deploy.evidence.load import Load, LoadReport, Turn, asked_loads, closed_loop, judge, measure_load, open_loop

IMAGES = np.zeros((2, 3, 4, 4), dtype=np.float32)


class Simulated(load.Timer):
    """Time that moves on, to whoever sleeps shortest, when every thread sleeps: real threads in simulated seconds."""

    def __init__(self):
        self.moment = 0.0
        self.running = 0
        self.sleeping = []
        self.woken = set()
        self.numbers = itertools.count()
        self.changed = threading.Condition()

    def now(self):
        return self.moment

    def wait(self, stop, seconds):
        self.sleep(seconds)

    def sleep(self, seconds):
        with self.changed:
            ticket = next(self.numbers)
            heapq.heappush(self.sleeping, (self.moment + seconds, ticket))
            self.rest()
            assert self.changed.wait_for(lambda: ticket in self.woken, 20)

    def rest(self, leaving=1):
        """A running thread no longer is; the last one wakes the next sleeper."""
        self.running -= leaving
        if not self.running and self.sleeping:
            self.moment, ticket = heapq.heappop(self.sleeping)
            self.woken.add(ticket)
            self.running += 1
            self.changed.notify_all()

    def thread(self, target):
        self.running += 1

        def whole():
            target()
            with self.changed:
                self.rest()

        return threading.Thread(target=whole, daemon=True)

    def barrier(self, count, action):
        return SimulatedBarrier(self, count, action)


class SimulatedBarrier:
    def __init__(self, timer, count, action):
        self.timer, self.count, self.action = timer, count, action
        self.there = 0
        self.open = self.broken = False

    def wait(self):
        with self.timer.changed:
            if self.broken:
                raise threading.BrokenBarrierError
            self.there += 1
            if self.there == self.count:
                self.action()
                self.open = True
                self.timer.running += self.count - 1
                self.timer.changed.notify_all()
                return
            self.timer.rest()
            assert self.timer.changed.wait_for(lambda: self.open or self.broken, 20)
            if not self.open:
                raise threading.BrokenBarrierError

    def abort(self):
        with self.timer.changed:
            if not self.open and not self.broken:
                self.timer.running += self.there
            self.broken = True
            self.timer.changed.notify_all()


class Engine:
    """Takes so many simulated seconds a run: one number for all, or one a run after the first `untimed`."""

    def __init__(self, timer, seconds, untimed=0, serial=False):
        self.timer = timer
        self.seconds = itertools.chain([0.0] * untimed, [seconds] * 100000 if np.isscalar(seconds) else seconds)
        self.serial = serial
        self.free = 0.0
        self.runs = 0

    def run(self, images):
        assert images is IMAGES
        self.runs += 1
        begin = max(self.timer.now(), self.free) if self.serial else self.timer.now()
        self.free = begin + next(self.seconds)
        self.timer.sleep(self.free - self.timer.now())


# --- closed loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 0.25, 0.33])
def test_clients_that_do_not_hinder_each_other(seconds):
    """Three clients, 0.125 s a run of two images: 48 images a second, however the turn cuts through the last runs."""
    timer = Simulated()
    turn = closed_loop(Engine(timer, 0.125), IMAGES, 3, seconds, sitting=4, timer=timer)
    assert turn.images_per_second == pytest.approx(48)
    assert turn.milliseconds == [125.0] * 3 * int(np.ceil(seconds * 8))
    assert (turn.sitting, turn.seconds, turn.growth, turn.left) == (4, pytest.approx(seconds), None, 0)


def test_clients_that_wait_for_each_other():
    """An engine that runs one request at a time gives three clients the throughput of one, and three times its latency."""
    timer = Simulated()
    turn = closed_loop(Engine(timer, 0.1, serial=True), IMAGES, 3, 3.0, timer=timer)
    assert turn.images_per_second == pytest.approx(20, rel=0.04)
    assert turn.milliseconds[5:] == pytest.approx([300.0] * len(turn.milliseconds[5:]))
    timer = Simulated()
    alone = closed_loop(Engine(timer, 0.1, serial=True), IMAGES, 1, 3.0, timer=timer)
    assert alone.images_per_second == pytest.approx(20)
    assert set(alone.milliseconds) == {100.0}


def test_untimed_runs_come_first():
    """The first run of a client, which makes what a library keeps for a thread, is in no figure."""
    timer = Simulated()
    engine = Engine(timer, [5.0, 5.0] + [0.1] * 1000)
    turn = closed_loop(engine, IMAGES, 2, 1.0, timer=timer)
    assert max(turn.milliseconds) == 100.0
    assert turn.images_per_second == pytest.approx(40)
    timer = Simulated()
    assert set(open_loop(Engine(timer, [5.0] + [0.1] * 9), IMAGES, 1, [0.2, 0.4], 9, timer=timer).milliseconds) == {100}


def test_one_slow_request_counts_once():
    timer = Simulated()
    engine = Engine(timer, [0.1, 0.1, 0.1, 0.6] + [0.1] * 100)
    turn = closed_loop(engine, IMAGES, 1, 1.0, timer=timer)
    assert turn.milliseconds == [100.0, 100.0, 600.0, 100.0, 100.0]
    assert turn.images_per_second == pytest.approx(2 * 5)


# --- open loop ---------------------------------------------------------------------------------


def arrivals(gap, count):
    return [gap * number for number in range(1, count + 1)]


def test_latency_counts_from_when_a_request_was_due():
    """One request of 0.5 s holds up those behind it, and each of them says so: a closed loop would have hidden them."""
    timer = Simulated()
    engine = Engine(timer, [0.05, 0.05, 0.5] + [0.05] * 20)
    turn = open_loop(engine, IMAGES, 1, arrivals(0.1, 15), 10.0, timer=timer)
    assert turn.milliseconds == pytest.approx([50, 500, 450, 400, 350, 300, 250, 200, 150, 100] + [50] * 5)
    assert turn.left == 0
    assert turn.images_per_second == pytest.approx(2 * 15 / 1.55)


def test_free_threads_take_what_one_cannot():
    for workers, growth in ((1, 0.5), (2, 0.0)):
        timer = Simulated()
        turn = open_loop(Engine(timer, 0.15), IMAGES, workers, arrivals(0.1, 30), 99.0, timer=timer)
        assert turn.growth == pytest.approx(growth)
        expected = [150.0] * 30 if workers == 2 else [150 + 50 * number for number in range(30)]
        assert turn.milliseconds == pytest.approx(expected)


def test_a_turn_in_which_requests_wait_too_long_is_given_up():
    timer = Simulated()
    engine = Engine(timer, 1.0, untimed=2)
    turn = open_loop(engine, IMAGES, 2, arrivals(0.1, 1000), 5.0, timer=timer)
    # Request i is begun at about i / 2 seconds and was due at i / 10: the wait passes 5 s at the 13th or so.
    assert 10 < len(turn.milliseconds) < 16
    assert turn.left == 1000 - len(turn.milliseconds)
    assert turn.images_per_second == pytest.approx(2 * 2, rel=0.15)
    assert engine.runs == len(turn.milliseconds) + 2


def test_waiting_that_does_not_grow_is_no_growth():
    served = [load._Served(due, due + 0.3, due + 0.4) for due in arrivals(0.1, 30)]
    assert load.growth(served) == 0
    assert load.growth(served[:2]) == 0
    # It grows by less than one request takes: a queue that is now longer, now shorter.
    assert load.growth([load._Served(d, d + 0.02 * d, d + 0.02 * d + 0.1) for d in arrivals(0.1, 30)]) == 0
    assert load.growth([load._Served(d, d + 0.2 * d, d + 0.2 * d + 0.1) for d in arrivals(0.1, 30)]) == pytest.approx(
        0.2
    )


def test_requests_are_due_at_random_and_at_the_very_rate():
    due = np.array(load.arrivals(100.0, 10.0, seed=3))
    assert len(due) == 1000
    assert due[0] >= 0
    assert 9.9 < due[-1] < 10.0
    assert (np.diff(due) >= 0).all()
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)  # as of exponential gaps; 0 were they even
    assert due.tolist() == load.arrivals(100.0, 10.0, seed=3)
    assert due.tolist() != load.arrivals(100.0, 10.0, seed=4)


def test_a_rate_too_low_for_the_time_is_refused_before_anything_runs(shared_engine, monkeypatch):
    monkeypatch.setattr(load, "load_engine", lambda directory: pytest.fail("opened"))
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


# --- what stops --------------------------------------------------------------------------------


class Failing:
    """Fails in its n-th run, and counts runs after that."""

    def __init__(self, at, error):
        self.at, self.error = at, error
        self.lock = threading.Lock()
        self.runs = 0

    def run(self, images):
        with self.lock:
            self.runs += 1
            number = self.runs
        if number == self.at:
            raise self.error


@pytest.mark.parametrize("at", [1, 3, 500])
@pytest.mark.parametrize("loop", ["closed", "open"])
def test_an_error_in_a_client_reaches_the_caller_and_stops_the_others(at, loop):
    engine = Failing(at, BadRequest("The session is closed."))
    before = threading.active_count()
    with pytest.raises(BadRequest, match="session is closed"):
        if loop == "closed":
            closed_loop(engine, IMAGES, 3, 3600.0)
        else:
            open_loop(engine, IMAGES, 3, [0.0] * 10**6, 3600.0)
    assert threading.active_count() == before
    assert at <= engine.runs < 10**6


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_ctrl_c_stops_all_clients(loop):
    """It comes to the main thread, while clients run or wait for a request that is due in an hour."""
    pressed = threading.Event()

    def run(images):
        if not pressed.is_set():
            pressed.set()
            _thread.interrupt_main()

    engine = SimpleNamespace(run=run)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        if loop == "closed":
            closed_loop(engine, IMAGES, 3, 3600.0)
        else:
            open_loop(engine, IMAGES, 3, [3600.0] * 5, 3600.0)
    # One that was being started when it came still has to notice.
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


# --- what is asked -----------------------------------------------------------------------------


def test_loads_that_can_be_asked_for(monkeypatch):
    assert asked_loads([1, 2, 4], None) == [Load(clients=1), Load(clients=2), Load(clients=4)]
    assert asked_loads([3], [20, 40.5]) == [Load(clients=3, rate=20.0), Load(clients=3, rate=40.5)]
    monkeypatch.setattr("ztp_deploy.environment.usable_cores", lambda: 6)
    assert asked_loads(None, [20]) == [Load(clients=6, rate=20.0)]


@pytest.mark.parametrize(
    "clients, rates, words",
    [
        (None, None, "Neither clients nor a rate"),
        ([], [], "Neither clients nor a rate"),
        ([0, 1], None, "0 clients were asked for. Give numbers from 1 to 256"),
        ([257], None, "257 clients"),
        ([2, 1, 2], None, "clients has 2 twice"),
        (None, [20.0, 20.0], "rate has 20 twice"),
        (None, [0.0], "0 requests a second"),
        (None, [-3.0], "-3 requests a second"),
        (None, [float("nan")], "nan requests a second"),
        (None, [float("inf")], "inf requests a second"),
        ([1, 2], [20.0], "Clients 1,2 were given beside a rate"),
    ],
)
def test_loads_that_cannot(clients, rates, words):
    with pytest.raises(BadRequest, match=words):
        asked_loads(clients, rates)


# --- real engines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several_streams(artifact, tmp_path_factory):
    """An OpenVINO engine as `engines/cpu_throughput.toml` asks for one, with two streams whatever the machine."""
    settings = {"hint": "throughput", "streams": 2}
    folder = tmp_path_factory.mktemp("engines") / "streams"
    return ztp.build(artifact, "openvino", batch=(1, 4, 8), directory=folder, settings=settings)


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
    report = measure_load([several_streams], [2], [400.0], [1], seconds=0.1)
    [found] = report.levels
    assert (found.rate, found.clients, found.low, report.ratios, report.at_a_rate) == (400.0, 2, None, [], True)
    for turn in found.turns:
        assert len(turn.milliseconds) + turn.left == load.LEAST_ARRIVALS
        assert turn.growth is not None


def test_clients_have_infer_requests_of_their_own(several_streams):
    """As many as threads, and as many runs at once as streams: nothing of ours stands between."""
    made = []
    with ztp.load_engine(several_streams) as session:
        runner = session.runner
        compiled = runner._compiled
        assert compiled.get_property("NUM_STREAMS") == 2
        assert compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") == 2
        runner._compiled = SimpleNamespace(
            create_infer_request=lambda: made.append(threading.get_ident()) or compiled.create_infer_request()
        )
        images = load.noise(session, 1)
        closed_loop(session, images, 3, 0.01)
        assert len(made) == len(set(made)) == 3


class Within:
    """A library's object, one of whose calls comes back when two threads are in it at once."""

    def __init__(self, real, call, both):
        self.real, self.call, self.both = real, call, both

    def __getattr__(self, name):
        found = getattr(self.real, name)
        if name == "create_infer_request":
            return lambda: Within(found(), self.call, self.both)
        return (lambda *a, **k: (self.both.wait(20), found(*a, **k))[1]) if name == self.call else found


@pytest.mark.parametrize(
    "name, library, call",
    [
        ("shared_engine", "_session", "run"),
        ("openvino_engine", "_compiled", "infer"),
        ("several_streams", "_compiled", "infer"),
        ("torchscript_engine", "_module", "forward"),
    ],
)
def test_two_threads_are_in_the_library_at_once(name, library, call, request):
    """Nothing of ours keeps one request waiting for another: the call itself is where they meet."""
    with ztp.load_engine(request.getfixturevalue(name)) as session:
        images = load.noise(session, 1)
        alone = session.run(images)
        both = threading.Barrier(2)
        setattr(session.runner, library, Within(getattr(session.runner, library), call, both))
        session.runner._requests = threading.local()
        answers = []

        def run():
            try:
                answers.append(session.run(images))
            except threading.BrokenBarrierError:
                answers.append(None)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 2
    for answer in answers:
        np.testing.assert_allclose(answer, alone, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(BadRequest, match="outside this engine's range"):
        measure_load([shared_engine], [1], batches=(9,), seconds=0.1)
    with pytest.raises(BadRequest, match="seconds"):
        measure_load([shared_engine], [1], seconds=0)
    with pytest.raises(BadRequest, match="No engine"):
        measure_load({}, [1])
    with pytest.raises(BadRequest, match="Neither"):
        measure_load([shared_engine])
