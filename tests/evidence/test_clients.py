"""Clients: throughput, latency and waiting in simulated time, errors and Ctrl-C in threads; no real figure is asserted."""

from __future__ import annotations

import _thread
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import ztp_deploy as ztp
from tests.evidence.simulated import IMAGES, Engine, Simulated
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import clients
from ztp_deploy.evidence.clients import closed_loop, open_loop
from ztp_deploy.evidence.latency import noise

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
    served = [clients._Served(due, due + 0.3, due + 0.4) for due in arrivals(0.1, 30)]
    assert clients.growth(served) == 0
    assert clients.growth(served[:2]) == 0
    # It grows by less than one request takes: a queue that is now longer, now shorter.
    assert clients.growth([clients._Served(d, d + 0.02 * d, d + 0.02 * d + 0.1) for d in arrivals(0.1, 30)]) == 0
    assert clients.growth(
        [clients._Served(d, d + 0.2 * d, d + 0.2 * d + 0.1) for d in arrivals(0.1, 30)]
    ) == pytest.approx(0.2)


def test_requests_are_due_at_random_and_at_the_very_rate():
    due = np.array(clients.arrivals(100.0, 10.0, seed=3))
    assert len(due) == 1000
    assert due[0] >= 0
    assert 9.9 < due[-1] < 10.0
    assert (np.diff(due) >= 0).all()
    gaps = np.diff(due)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.1)  # as of exponential gaps; 0 were they even
    assert due.tolist() == clients.arrivals(100.0, 10.0, seed=3)
    assert due.tolist() != clients.arrivals(100.0, 10.0, seed=4)


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


# --- real engines ------------------------------------------------------------------------------


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
        images = noise(session, 1)
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
        images = noise(session, 1)
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
