"""Load: throughput and latency with several clients at once, or with requests at a rate.

Raw latencies are kept; engines take turns (`clients`) in one process.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ztp_deploy import environment
from ztp_deploy.backends import Engine
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import latency
from ztp_deploy.evidence.clients import Timer, Turn, arrivals, closed_loop, open_loop
from ztp_deploy.evidence.latency import (
    DEFAULT_SECONDS,
    MAX_ROUNDS,
    P99_SAMPLES,
    Ratio,
    Runnable,
    asked_batches,
    bootstrap_median,
    check_seconds,
    circumstances,
    doubt,
    engines_by_role,
    opened,
    orders_of_opening,
    paired_ratio,
)
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart
from ztp_deploy.manifest import manifest_sha256

LOAD_FILE, RATE_FILE = "load.json", "rate.json"
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


class Load(EvidencePart):
    """What is asked of engines: so many clients back to back, or `rate` requests a second served by so many threads."""

    clients: int
    rate: float | None = None


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
    """Engines under load, all of one kind: clients back to back (`evidence/load.json`), or rates (`evidence/rate.json`)."""

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

    @property
    def file(self) -> str:
        """The name of such evidence in an engine's folder: what the two kinds say does not replace each other."""
        return RATE_FILE if self.at_a_rate else LOAD_FILE

    def ratio(self, engine: str, reference: str, batch: int, load: Load) -> LoadRatio | None:
        """The ratio of two roles at a batch and a load; None where there is none, as at a rate that was not sustained."""
        wanted = (engine, reference, batch, load.clients, load.rate)
        found = (one for one in self.ratios if (one.engine, one.reference, one.batch, one.clients, one.rate) == wanted)
        return next(found, None)


def asked_loads(
    clients: Sequence[int] | None = None, rates: Sequence[float] | None = None, threads: int | None = None
) -> list[Load]:
    """The loads that numbers of clients ask for, or rates and the number of threads that serve them.

    Threads are by default as many as there are cores. Raises BadRequest for what makes no load.
    """
    if bool(clients) == bool(rates):
        which = "Both clients and a rate were" if clients else "Neither clients nor a rate was"
        raise BadRequest(f"{which} given.", "Give numbers of clients, such as 1,2,4, or requests a second, such as 20.")
    if threads is not None and not rates:
        raise BadRequest(
            f"{threads} threads were given without a rate.", "Threads serve a rate: give one, or leave them out."
        )
    for what, counts in (("clients", clients or ()), ("threads", () if threads is None else (threads,))):
        for number in counts:
            if not 1 <= number <= MAX_CLIENTS:
                raise BadRequest(f"{number} {what} were asked for.", f"Give a number from 1 to {MAX_CLIENTS}.")
    for rate in rates or ():
        if not 0 < rate <= MAX_RATE:  # nan neither
            raise BadRequest(
                f"{rate:g} requests a second were asked for.",
                f"Give numbers above 0 and up to {MAX_RATE:g}, such as 20.",
            )
    for name, values in (("clients", clients or ()), ("rate", rates or ())):
        if twice := [value for value in values if list(values).count(value) > 1]:
            raise BadRequest(f"--{name} has {twice[0]:g} twice.", "Give each number once.")
    if rates:
        serving = threads or min(environment.usable_cores(), MAX_CLIENTS)
        return [Load(clients=serving, rate=float(rate)) for rate in rates]
    return [Load(clients=number) for number in clients or ()]


def measure_load(
    engines: Mapping[str, Engine | Path | str] | Sequence[Engine | Path | str],
    clients: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    batches: Sequence[int] | None = None,
    *,
    threads: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    command: str = "ztp_deploy.measure_load",
    progress: Callable[[float], None] | None = None,
) -> LoadReport:
    """`session.run` of several engines with many clients at once, or with requests that come at a rate.

    `engines`, `batches` and sittings are as in `measure_latency`. `clients`: how many ask back to back, one level each.
    `rates`: requests a second, due at random (a Poisson process, the same for every engine), served by so many `threads`,
    by default one a core. All send the same images. A turn begins with untimed runs of every client; `seconds`
    are those of one level at one batch size, warm-up aside, more where an engine is so slow that its clients would
    hardly be answered. Raises BadRequest as `measure_latency` and `asked_loads` do; what an engine raises in a client
    stops the others.
    """
    loads = asked_loads(clients, rates, threads)
    return put_under(loads, engines_by_role(engines), batches, seconds, command, progress or (lambda share: None))


def put_under(
    loads: Sequence[Load],
    named: Mapping[str, Engine],
    batches: Sequence[int] | None,
    seconds: float,
    command: str,
    advance: Callable[[float], None],
) -> LoadReport:
    """`measure_load` for loads of one kind and engines by role. Raises BadRequest as it does."""
    batches = asked_batches({role: engine.manifest.batch for role, engine in named.items()}, batches)
    check_seconds(seconds)
    openings = orders_of_opening(list(named))
    _check_rates(loads, seconds, len(openings) * len(named))
    about = circumstances(command)
    about["notes"] += serial_notes(named)
    order = np.random.default_rng(0)
    levels: list[Level] = []
    ratios: list[LoadRatio] = []
    for batch in batches:
        turns: list[dict[str, list[Turn]]] = [{role: [] for role in named} for _ in loads]
        for sitting, opening in enumerate(openings):
            with opened(named, opening, batch) as (sessions, images):
                for load, found in zip(loads, turns, strict=True):
                    for role, turn in take_turns(sessions, images, load, seconds / len(openings), sitting, order):
                        found[role].append(turn)
                    advance(1 / len(openings))
        for load, found in zip(loads, turns, strict=True):
            now = [level_of(role, named[role], batch, load, found[role]) for role in named]
            levels += now
            ratios += ratios_of(now)
    return LoadReport(levels=levels, ratios=ratios, **about)


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
