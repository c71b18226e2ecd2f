"""Load: throughput and latency with several clients at once; raw latencies kept, engines in turns in one process.

Closed loop: each client asks again as soon as it is answered. Open loop: requests are due at a given rate, whatever the
engine does, and wait where no thread is free; latency counts from when a request was due, so that an engine which falls
behind cannot hide it. Clients are Python threads of one process: engines compute outside the interpreter's lock, but what
Python does between two runs, a few dozen microseconds, is done by one thread at a time.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ztp_deploy import environment
from ztp_deploy.backends import Engine, load_engine
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import latency
from ztp_deploy.evidence.latency import (
    DEFAULT_SECONDS,
    MAX_ROUNDS,
    P99_SAMPLES,
    Ratio,
    Runnable,
    bootstrap_median,
    busy_notes,
    check_seconds,
    doubt,
    engines_by_role,
    noise,
    orders_of_opening,
    paired_ratio,
    usual_batches,
)
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart
from ztp_deploy.manifest import manifest_sha256

LOAD_FILE = "load.json"
MAX_CLIENTS = 256
MAX_RATE = 1e5
TURN_SECONDS = 1.0
"""Of an engine's turn in the closed loop. At a rate it has one turn a sitting: a queue needs time to show."""
LEAST_TURN_SECONDS = 0.02
LEAST_RUNS = 3
"""Requests that each client finishes in a turn of the closed loop, about: turns of slow engines are longer."""
LEAST_ARRIVALS = 8
P95_REQUESTS = 20
GROWING, UNSURE = 0.05, 0.01
"""Seconds by which waiting grows a second: from 5 % on the rate is not sustained, from 1 % on it is not known."""
PATIENCE = 0.25
"""A turn is given up where a request waited for this share of it."""
PATIENCE_RUNS = 10
"""… and for this many requests' time."""


class Timer:
    """The clock and the threads that clients go by."""

    def now(self) -> float:
        """Seconds since whenever."""
        return time.perf_counter()

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Comes back after so many seconds, or when it is told to stop."""
        stop.wait(seconds)

    def thread(self, target: Callable[[], None]) -> threading.Thread:
        """A thread that is not started."""
        return threading.Thread(target=target)

    def barrier(self, count: int, action: Callable[[], None]) -> threading.Barrier:
        """Where `count` threads wait for each other; the last one does `action`."""
        return threading.Barrier(count, action)


class Load(EvidencePart):
    """What is asked of engines: so many clients back to back, or `rate` requests a second served by so many threads."""

    clients: int
    rate: float | None = None


class Turn(EvidencePart):
    """One engine's turn: milliseconds a request, in the order of their beginning.

    At a rate, they count from when a request was due, `growth` says by how many seconds a second the time that requests
    wait for a thread grew, and `left` how many were never begun because the turn was given up.
    """

    sitting: int
    seconds: float
    images_per_second: float
    milliseconds: list[float]
    growth: float | None = None
    left: int = 0


class Level(Load):
    """One engine under one load, in milliseconds a request; `low` and `high` are of the images a second.

    At a rate these have no interval, and where it was not sustained there are no latencies: they would say how long was
    measured. `p95` from 20 requests on, `p99` from 100.
    """

    engine: str
    role: str
    backend: str
    precision: str
    manifest_sha256: str
    batch: int
    requests: int
    images_per_second: float
    low: float | None
    high: float | None
    median: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    maximum: float | None
    verdict: Literal["measured", "inconclusive", "not sustained"]
    reason: str | None
    turns: list[Turn]


class LoadRatio(Ratio):
    """A `Ratio` at one load: of images a second, at a rate of the median latency; its rounds are turns."""

    clients: int
    rate: float | None


class LoadReport(EvidenceFile):
    """Engines under load, all of one kind: clients back to back, or rates (`evidence/load.json`)."""

    schema_: Literal["ztp.load/1"] = Field(default="ztp.load/1", alias="schema")
    command: str
    started: str
    levels: list[Level]
    ratios: list[LoadRatio]
    environment: dict[str, Any]
    gpu: str
    notes: list[str]

    @property
    def at_a_rate(self) -> bool:
        """Whether requests came at a rate."""
        return self.levels[0].rate is not None

    def ratio(self, engine: str, reference: str, batch: int, load: Load) -> LoadRatio | None:
        """The ratio of two roles at a batch and a load; None where there is none, as at a rate that was not sustained."""
        wanted = (engine, reference, batch, load.clients, load.rate)
        found = (one for one in self.ratios if (one.engine, one.reference, one.batch, one.clients, one.rate) == wanted)
        return next(found, None)


def asked_loads(clients: Sequence[int] | None, rates: Sequence[float] | None) -> list[Load]:
    """The loads that numbers of clients, or rates and at most one number of threads, ask for.

    Threads are by default as many as there are cores. Raises BadRequest for what is none.
    """
    for number in clients or ():
        if not 1 <= number <= MAX_CLIENTS:
            raise BadRequest(
                f"{number} clients were asked for.", f"Give numbers from 1 to {MAX_CLIENTS}, such as 1,2,4."
            )
    for rate in rates or ():
        if not 0 < rate <= MAX_RATE:  # nan neither
            raise BadRequest(
                f"{rate:g} requests a second were asked for.",
                f"Give numbers above 0 and up to {MAX_RATE:g}, such as 20.",
            )
    for name, values in (("clients", clients or ()), ("rate", rates or ())):
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise BadRequest(f"--{name} has {twice[0]:g} twice.", "Give each number once.")
    if rates and clients and len(clients) > 1:
        raise BadRequest(
            f"Clients {','.join(map(str, clients))} were given beside a rate, where they are the threads that serve.",
            "Give one number of them, or leave either out.",
        )
    if rates:
        threads = clients[0] if clients else min(environment.usable_cores(), MAX_CLIENTS)
        return [Load(clients=threads, rate=float(rate)) for rate in rates]
    if not clients:
        raise BadRequest("Neither clients nor a rate was given.", "Give numbers of clients, such as 1,2,4.")
    return [Load(clients=number) for number in clients]


def measure_load(
    engines: Mapping[str, Engine | Path | str] | Sequence[Engine | Path | str],
    clients: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    batches: Sequence[int] | None = None,
    *,
    seconds: float = DEFAULT_SECONDS,
    command: str = "ztp_deploy.measure_load",
    progress: Callable[[float], None] | None = None,
) -> LoadReport:
    """`session.run` of several engines with many clients at once, or with requests that come at a rate.

    `engines`, `batches` and sittings are as in `measure_latency`. `clients`: how many ask back to back, one level each.
    `rates`: requests a second, due at random (a Poisson process, the same for every engine), served by one number of
    `clients`, by default one a core. All send the same images. A turn begins with untimed runs of every client; `seconds`
    are those of one level at one batch size, warm-up aside, more where an engine is so slow that its clients would
    hardly be answered. Raises BadRequest as `measure_latency` and `asked_loads` do; what an engine raises in a client
    stops the others.
    """
    loads = asked_loads(clients, rates)
    named = engines_by_role(engines)
    if batches is None:
        batches = usual_batches([engine.manifest.batch for engine in named.values()])
    if not batches:
        raise BadRequest("No batch size was given.", "Give at least one, such as 1.")
    check_seconds(seconds)
    openings = orders_of_opening(list(named))
    _check_rates(loads, seconds, len(openings) * len(named))
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before, busy = environment.snapshot(), environment.busy_share()
    order = np.random.default_rng(0)
    levels: list[Level] = []
    ratios: list[LoadRatio] = []
    advance = progress or (lambda share: None)
    for batch in batches:
        turns: list[dict[str, list[Turn]]] = [{role: [] for role in named} for _ in loads]
        for sitting, opening in enumerate(openings):
            with ExitStack() as stack:
                sessions = {role: stack.enter_context(load_engine(named[role].directory)) for role in opening}
                images = {role: noise(session, batch) for role, session in sessions.items()}
                for load, found in zip(loads, turns, strict=True):
                    for role, turn in take_turns(sessions, images, load, seconds / len(openings), sitting, order):
                        found[role].append(turn)
                    advance(1 / len(openings))
        for load, found in zip(loads, turns, strict=True):
            now = [level_of(role, named[role], batch, load, found[role]) for role in named]
            levels += now
            ratios += ratios_of(now)
    return LoadReport(
        command=command,
        started=started,
        levels=levels,
        ratios=ratios,
        environment=before,
        gpu=environment.gpu_line(),
        notes=[*busy_notes(busy), *serial_notes(named)],
    )


def _check_rates(loads: Sequence[Load], seconds: float, turns: int) -> None:
    """Raises BadRequest where a turn is too short for so few requests a second to say anything."""
    rate = min((load.rate for load in loads if load.rate is not None), default=math.inf)
    if rate * seconds / turns < LEAST_ARRIVALS - 0.5:
        least = math.ceil(LEAST_ARRIVALS * turns / rate)
        raise BadRequest(
            f"At {rate:g} requests a second, {seconds:g} seconds in {turns} turns hold fewer than {LEAST_ARRIVALS} requests each.",
            f"Give --seconds {least} or more, or a higher rate.",
        )


def serial_notes(engines: Mapping[str, Engine]) -> list[str]:
    """What a report says of engines that cannot run several requests side by side."""
    return [
        f"{role} replays CUDA graphs, and answers one request at a time."
        for role, engine in engines.items()
        if engine.manifest.settings.get("cuda_graph")
    ]


# --- turns -------------------------------------------------------------------------------------


def take_turns(
    engines: Mapping[str, Runnable],
    images: Mapping[str, NDArray[Any]],
    load: Load,
    seconds: float,
    sitting: int,
    order: np.random.Generator,
    timer: Timer | None = None,
) -> list[tuple[str, Turn]]:
    """Turns of all engines, by role, in about so many seconds; those of one round follow each other in a random order."""
    timer = timer or Timer()
    roles = list(engines)
    # How long a request takes under this load decides how long a turn is.
    warm = {
        role: closed_loop(engines[role], images[role], load.clients, latency.WARM_UP_SECONDS, sitting, timer)
        for role in roles
    }
    request = {role: statistics.median(turn.milliseconds) / 1e3 for role, turn in warm.items()}
    turns: list[tuple[str, Turn]] = []
    if load.rate is not None:
        part = seconds / len(roles)
        due = arrivals(load.rate, part, sitting)
        for role in order.permutation(roles).tolist():
            patience = max(PATIENCE * due[-1], PATIENCE_RUNS * request[role])
            turns.append((role, open_loop(engines[role], images[role], load.clients, due, patience, sitting, timer)))
        return turns
    rounds = max(1, round(seconds / len(roles) / TURN_SECONDS))
    part = seconds / len(roles) / rounds
    for _ in range(rounds):
        for role in order.permutation(roles).tolist():
            most = MAX_ROUNDS / rounds / load.clients * request[role]
            length = max(min(part, most), LEAST_RUNS * request[role], LEAST_TURN_SECONDS)
            turns.append((role, closed_loop(engines[role], images[role], load.clients, length, sitting, timer)))
    return turns


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due: a Poisson process whose number is given, so that every turn has the very rate."""
    count = max(1, min(MAX_ROUNDS, round(rate * seconds)))
    due: list[float] = np.sort(np.random.default_rng(seed).uniform(0, count / rate, count)).tolist()
    return due


@dataclass
class _Served:
    """One answered request: when it was due, begun and answered, in seconds."""

    due: float
    begin: float
    end: float


def closed_loop(
    engine: Runnable, images: NDArray[Any], clients: int, seconds: float, sitting: int = 0, timer: Timer | None = None
) -> Turn:
    """So many clients, each asking again as soon as it is answered, for so many seconds after untimed runs.

    Latencies are those of the requests that each client begins within the time. A request counts among the images a
    second with the share of it that lies in the time: no client rests before the last of these requests is answered.
    """
    timer = timer or Timer()
    crew = _Crew(clients, timer)
    served: list[_Served] = []

    def client() -> None:
        crew.settle(lambda: engine.run(images))
        end, over = crew.begun + seconds, False
        while not crew.stop.is_set() and crew.over < clients:
            begin = timer.now()
            engine.run(images)
            answered = timer.now()
            if not over:
                served.append(_Served(begin, begin, answered))
            if answered >= end and not over:
                over = True
                crew.has_done()

    crew.work(client)
    begin, end = crew.begun, crew.begun + max(seconds, 1e-9)
    inside = sorted(served, key=lambda one: one.begin)
    done = sum(_share(one, begin, end) for one in inside)
    return Turn(
        sitting=sitting,
        seconds=end - begin,
        images_per_second=len(images) * done / (end - begin),
        milliseconds=[_milliseconds(one.end - one.begin) for one in inside],
    )


def open_loop(
    engine: Runnable,
    images: NDArray[Any],
    workers: int,
    due: Sequence[float],
    patience: float,
    sitting: int = 0,
    timer: Timer | None = None,
) -> Turn:
    """Requests due at these seconds, each begun by the first of so many threads that is free.

    Where one has waited for more than `patience` seconds, those that are not begun are left.
    """
    timer = timer or Timer()
    crew = _Crew(workers, timer)
    numbers = itertools.count()  # drawn by one thread at a time, as all of Python
    served: list[_Served] = []
    given_up = threading.Event()

    def worker() -> None:
        crew.settle(lambda: engine.run(images))
        while (number := next(numbers)) < len(due):
            wanted = crew.begun + due[number]
            if (early := wanted - timer.now()) > 0:
                timer.wait(crew.stop, early)
            if crew.stop.is_set() or given_up.is_set():
                return
            begin = timer.now()
            if begin - wanted > patience:
                given_up.set()
                return
            engine.run(images)
            served.append(_Served(wanted, begin, timer.now()))

    crew.work(worker)
    served.sort(key=lambda one: one.due)
    taken = max((one.end for one in served), default=crew.begun + patience) - crew.begun
    return Turn(
        sitting=sitting,
        seconds=taken,
        images_per_second=len(images) * len(served) / taken,
        milliseconds=[_milliseconds(one.end - one.due) for one in served],
        growth=growth(served),
        left=len(due) - len(served),
    )


def growth(served: Sequence[_Served]) -> float:
    """By how many seconds a second the wait for a thread grew, from the first third of the requests to the last.

    0 where it grew by less than one request takes.
    """
    third = len(served) // 3
    if not third:
        return 0.0
    first, last = served[:third], served[-third:]
    waited = [statistics.median(one.begin - one.due for one in part) for part in (first, last)]
    when = [statistics.median(one.due for one in part) for part in (first, last)]
    grown = waited[1] - waited[0]
    if grown <= statistics.median(one.end - one.begin for one in served):
        return 0.0
    return grown / (when[1] - when[0])


def _share(one: _Served, begin: float, end: float) -> float:
    """The share of a request's time that lies between two moments."""
    inside = max(0.0, min(one.end, end) - max(one.begin, begin))
    return inside / (one.end - one.begin) if one.end > one.begin else 1.0


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 4)


class _Halted(Exception):
    """Another thread of the crew has failed, or it was interrupted."""


@dataclass
class _Crew:
    """Threads that begin at the same moment, `begun`; the first error in one of them stops all."""

    count: int
    timer: Timer
    begun: float = 0.0
    over: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._errors: list[BaseException] = []
        self._meeting = self.timer.barrier(self.count, self._begin)

    def work(self, task: Callable[[], None]) -> None:
        """Every thread does the task once. Raises what the first that failed raised, and KeyboardInterrupt."""

        def guarded() -> None:
            if self.stop.is_set():  # interrupted while threads were being started
                return
            try:
                task()
            except _Halted:
                pass
            except BaseException as error:  # to be raised where it was asked for
                self._errors.append(error)
                self._halt()

        threads = [self.timer.thread(guarded) for _ in range(self.count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            # An engine must not be closed while a thread is in it.
            self._halt()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
            raise
        if self._errors:
            raise self._errors[0]

    def settle(self, run: Callable[[], object]) -> None:
        """Untimed runs of a thread, at least one: what the library keeps a thread is made, caches are its own."""
        settled = self.timer.now() + latency.SETTLING_SECONDS
        while True:
            run()
            if self.stop.is_set():
                raise _Halted
            if self.timer.now() >= settled:
                break
        try:
            self._meeting.wait()
        except threading.BrokenBarrierError as error:
            raise _Halted from error

    def has_done(self) -> None:
        """Counts a thread that has done its part."""
        with self._lock:
            self.over += 1

    def _begin(self) -> None:
        self.begun = self.timer.now()

    def _halt(self) -> None:
        self.stop.set()
        self._meeting.abort()


# --- what turns say ----------------------------------------------------------------------------


def level_of(role: str, engine: Engine, batch: int, load: Load, turns: Sequence[Turn]) -> Level:
    """An engine's turns under one load, drawn together."""
    milliseconds = np.concatenate([np.array(turn.milliseconds) for turn in turns])
    rates = np.array([turn.images_per_second for turn in turns])
    requests = len(milliseconds)
    figures: dict[str, float | None] = {}
    low = high = None
    images_per_second = float(np.median(rates))
    verdict: Literal["measured", "inconclusive", "not sustained"]
    if load.rate is None:
        low, high = bootstrap_median(_by_sitting(turns, rates))
        reason = doubt(rates, low, high, "the images a second")
        verdict = "inconclusive" if reason else "measured"
    else:
        verdict, reason = judge(turns)
        images_per_second = float(np.average(rates, weights=[turn.seconds for turn in turns]))
    if verdict != "not sustained":
        median, p90, p95, p99 = (float(value) for value in np.percentile(milliseconds, [50, 90, 95, 99]))
        figures = {
            "median": median,
            "p90": p90,
            "p95": p95 if requests >= P95_REQUESTS else None,
            "p99": p99 if requests >= P99_SAMPLES else None,
            "maximum": float(milliseconds.max()),
        }
    return Level(
        clients=load.clients,
        rate=load.rate,
        engine=engine.directory.name,
        role=role,
        backend=f"{engine.manifest.backend} {engine.manifest.backend_version}",
        precision=engine.manifest.precision,
        manifest_sha256=manifest_sha256(engine.directory),
        batch=batch,
        requests=requests,
        images_per_second=images_per_second,
        low=low,
        high=high,
        **{name: figures.get(name) for name in ("median", "p90", "p95", "p99", "maximum")},
        verdict=verdict,
        reason=reason,
        turns=list(turns),
    )


def judge(turns: Sequence[Turn]) -> tuple[Literal["measured", "inconclusive", "not sustained"], str | None]:
    """Whether an engine kept up with the rate in its turns, and why not."""
    behind = [turn for turn in turns if turn.left or (turn.growth or 0) > GROWING]
    usual = statistics.median(turn.growth or 0 for turn in turns)
    if len(behind) * 2 > len(turns):
        return "not sustained", "requests came faster than they were answered, and the queue grew"
    if behind:
        return (
            "inconclusive",
            f"in {len(behind)} of {len(turns)} turns the queue grew; measure longer, or at a lower rate",
        )
    if usual > UNSURE:
        return "inconclusive", f"waiting grew by {usual:.0%} of the time; measure longer, or at a lower rate"
    return "measured", None


def ratios_of(levels: Sequence[Level]) -> list[LoadRatio]:
    """Every later engine over every earlier one, at one batch and load: images a second, at a rate median latencies.

    Turns of one round are paired; who did not sustain the rate has no part.
    """
    found = []
    kept = [
        level for level in levels if level.verdict != "not sustained" and all(turn.milliseconds for turn in level.turns)
    ]
    for reference, engine in itertools.combinations(kept, 2):
        slowness = {
            level.role: [part.tolist() for part in _by_sitting(level.turns, _slowness(level.turns, level.rate))]
            for level in (reference, engine)
        }
        ratio = paired_ratio(engine.role, reference.role, engine.batch, slowness)
        found.append(LoadRatio(**ratio.model_dump(), clients=engine.clients, rate=engine.rate))
    return found


def _slowness(turns: Sequence[Turn], rate: float | None) -> NDArray[Any]:
    """By turn, what is the smaller, the faster an engine is."""
    if rate is None:
        return 1 / np.array([turn.images_per_second for turn in turns])
    return np.array([statistics.median(turn.milliseconds) for turn in turns])


def _by_sitting(turns: Sequence[Turn], values: NDArray[Any]) -> list[NDArray[Any]]:
    sittings = np.array([turn.sitting for turn in turns])
    return [values[sittings == number] for number in dict.fromkeys(sittings.tolist())]
