"""Latency: engines interleaved in one process, raw samples kept, paired ratios with bootstrap intervals.

An engine is not equally fast each time it is opened, and of equal engines the one opened first was found up to a tenth
slower than the one opened last. So engines are opened anew in several sittings, each of them as often first as last, and
intervals resample sittings first, rounds within them second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ztp_deploy import environment
from ztp_deploy.backends import Engine, find_engine, load_engine
from ztp_deploy.backends.base import Session
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart
from ztp_deploy.manifest import BatchRange, manifest_sha256

LATENCY_FILE = "latency.json"
LEAST_SITTINGS = 5
WARM_UP_SECONDS = 0.4
SETTLING_SECONDS = 0.05
"""Of untimed runs before each timed one: a processor's caches take several."""
MIN_ROUNDS, MAX_ROUNDS = 4, 1000
"""Rounds of one sitting. The most there can be keeps reports of very fast engines small."""
DEFAULT_SECONDS = 20.0
BOOTSTRAP_RESAMPLES = 2000
CONFIDENCE = 0.95
P99_SAMPLES = 100
MAX_RELATIVE_WIDTH = 0.06
MAX_DRIFT = 0.10
MAX_BUSY = 0.10

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a call to its end and says how many seconds it took."""


class Runnable(Protocol):
    """What can be timed."""

    def run(self, images: Any) -> object:
        """One run."""


class Samples(EvidencePart):
    """Wall times of one engine at one batch, in milliseconds per batch, one list a sitting.

    `p99` only from 100 samples on.
    """

    engine: str
    role: str
    manifest_sha256: str
    batch: int
    milliseconds: list[list[float]]
    runs: int
    median: float
    p90: float
    p95: float
    p99: float | None
    drift: float
    images_per_second: float


class Ratio(EvidencePart):
    """How many times faster `engine` is than `reference`: the median of per-round ratios, with its interval.

    `verdict` is "inconclusive" where the interval is wide or the machine drifted while measuring.
    """

    engine: str
    reference: str
    batch: int
    rounds: int
    speedup: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    verdict: Literal["measured", "inconclusive"]
    reason: str | None

    @property
    def behind(self) -> tuple[float, float, float]:
        """By what share the reference has fewer images a second: median and interval, negative if it has more."""
        return 1 - 1 / self.speedup, 1 - 1 / self.low, 1 - 1 / self.high


class LatencyReport(EvidenceFile):
    """One interleaved run (`evidence/latency.json`)."""

    schema_: Literal["ztp.latency/1"] = Field(default="ztp.latency/1", alias="schema")
    command: str
    started: str
    samples: list[Samples]
    ratios: list[Ratio]
    environment: dict[str, Any]
    gpu: str
    notes: list[str]

    def ratio(self, engine: str, reference: str, batch: int) -> Ratio:
        """The ratio of two roles at a batch; KeyError where it was not measured."""
        for ratio in self.ratios:
            if (ratio.engine, ratio.reference, ratio.batch) == (engine, reference, batch):
                return ratio
        raise KeyError(f"{engine} over {reference} at batch {batch}")

    def sample(self, role: str, batch: int) -> Samples:
        """The samples of a role at a batch; KeyError where there are none."""
        for sample in self.samples:
            if (sample.role, sample.batch) == (role, batch):
                return sample
        raise KeyError(f"{role} at batch {batch}")


def usual_batches(spans: Sequence[BatchRange]) -> list[int]:
    """1 and 8, as far as all ranges hold them; where they hold neither, what they hold nearest to the first's optimum.

    Raises BadRequest where they have no batch in common.
    """
    low, high = max(span.min for span in spans), min(span.max for span in spans)
    if low > high:
        raise BadRequest(
            f"No batch is within the ranges of all engines: one begins at {low}, another ends at {high}.",
            "Build them with ranges that overlap.",
        )
    return [batch for batch in (1, 8) if low <= batch <= high] or [min(max(spans[0].opt, low), high)]


def asked_batches(spans: Mapping[str, BatchRange], asked: Sequence[int] | None) -> list[int]:
    """What to measure engines of these batch ranges at: what was asked for, by default `usual_batches`.

    Raises BadRequest for none, and for a batch that one of the engines, by name, does not take.
    """
    if asked is None:
        return usual_batches(list(spans.values()))
    if not asked:
        raise BadRequest("No batch size was given.", "Give at least one, such as 1.")
    for index, batch in enumerate(asked):
        if batch in asked[:index]:
            raise BadRequest(f"Batch {batch} was asked for twice.", "Give each batch size once.")
        for name, span in spans.items():
            if not span.min <= batch <= span.max:
                raise BadRequest(
                    f"Batch {batch} was asked for, but {name} takes {span.min} to {span.max}.",
                    "Measure other batches, or build it with a range that holds this one.",
                )
    return list(asked)


def measure_latency(
    engines: Mapping[str, Engine | Path | str] | Sequence[Engine | Path | str],
    batches: Sequence[int] | None = None,
    *,
    seconds: float = DEFAULT_SECONDS,
    command: str = "ztp_deploy.measure_latency",
    progress: Callable[[float], None] | None = None,
) -> LatencyReport:
    """Times `session.run` of several engines against each other.

    `engines` by role (`{"dense": …, "pruned": …, "slice": …}`) or a sequence, which takes as roles the ends of the
    paths, as long as tells them apart; the first is the reference of all ratios, and every later pair is compared too. Engines are opened
    anew in each of several sittings (`orders_of_opening`). In each round of a sitting every engine has one turn, in a
    random order, so that a drifting machine hits all alike; a turn is 0.05 s of untimed runs, so that caches are the
    engine's own, and a timed one. `seconds` is the time spent a batch, warm-up aside, less where 1000 rounds a sitting
    take less; `batches` are by default `usual_batches`. Raises BadRequest for batches outside an engine's range, and for
    one engine twice.
    """
    named = engines_by_role(engines)
    batches = asked_batches({role: engine.manifest.batch for role, engine in named.items()}, batches)
    check_seconds(seconds)
    about = circumstances(command)
    samples: list[Samples] = []
    ratios: list[Ratio] = []
    advance = progress or (lambda share: None)
    roles = list(named)
    order = np.random.default_rng(0)
    openings = orders_of_opening(roles)
    part = 1 / len(openings)
    for batch in batches:
        times: dict[str, list[list[float]]] = {role: [] for role in roles}
        for opening in openings:
            with opened(named, opening, batch) as (sessions, images):
                sitting = interleave(sessions, images, seconds * part, order, lambda share: advance(share * part))
            for role in roles:
                times[role].append(sitting[role])
        samples += [_summary(role, named[role], batch, times[role]) for role in roles]
        ratios += [
            paired_ratio(faster, reference, batch, times)
            for index, reference in enumerate(roles)
            for faster in roles[index + 1 :]
        ]
    return LatencyReport(samples=samples, ratios=ratios, **about)


def circumstances(command: str) -> dict[str, Any]:
    """What a report says of a measurement that begins now: when, on what, and in `notes` if the machine is busy."""
    about: dict[str, Any] = {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment.snapshot(),
        "gpu": environment.gpu_line(),
        "notes": [],
    }
    if (busy := environment.busy_share()) > MAX_BUSY:
        about["notes"] = [f"The machine was busy with other work when this began ({busy:.0%} of its processor time)."]
    return about


@contextmanager
def opened(
    named: Mapping[str, Engine], opening: Sequence[str], batch: int
) -> Iterator[tuple[dict[str, Session], dict[str, NDArray[Any]]]]:
    """Sessions of engines opened in this order, and the noise that each is to run, by role."""
    with ExitStack() as stack:
        sessions = {role: stack.enter_context(load_engine(named[role].directory)) for role in opening}
        yield sessions, {role: noise(session, batch) for role, session in sessions.items()}


def orders_of_opening(roles: Sequence[str]) -> list[list[str]]:
    """One order a sitting, at least 5, in which every role has every place equally often."""
    orders: list[list[str]] = []
    while len(orders) < LEAST_SITTINGS:
        line = list(roles)[:: -1 if len(orders) // len(roles) % 2 else 1]
        orders += [line[start:] + line[:start] for start in range(len(line))]
    return orders


def check_seconds(seconds: float, unit: str = "seconds") -> None:
    """Raises BadRequest unless `seconds`, or what is given in another `unit`, is a positive, finite number."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadRequest(f"{unit}={seconds} is not a time to measure.", f"Give a positive number of {unit}.")


def engines_by_role(
    engines: Mapping[str, Engine | Path | str] | Sequence[Engine | Path | str],
) -> dict[str, Engine]:
    """The engines with every file verified, by role; a sequence's roles are the ends of the paths.

    Raises BadRequest for none and for one folder twice in a sequence, and what `find_engine` raises.
    """

    def found(engine: Engine | Path | str) -> Engine:
        return engine if isinstance(engine, Engine) else find_engine(engine)

    if isinstance(engines, Mapping):
        named = {role: found(engine) for role, engine in engines.items()}
    else:
        listed = [found(engine) for engine in engines]
        named = dict(zip(path_ends([engine.directory for engine in listed]), listed, strict=True))
    if not named:
        raise BadRequest("No engine was given.", "Give at least one engine folder.")
    return named


def path_ends(folders: Sequence[Path], least: int = 1) -> list[str]:
    """The last parts of each path, `least` or as many as tell all apart. Raises BadRequest for one folder twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise BadRequest(f"{twice} was given twice.", "Give each engine folder once.")
    length = least
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return [str(Path(*path.parts[-length:])) for path in paths]


def noise(session: Session, batch: int) -> NDArray[Any]:
    """Images [batch, 3, H, W] of noise: kernels do not look at the pixels, and selection is as hard on noise as on photographs."""
    size, dtype = session.manifest.input.size, session.manifest.input.dtype
    generator = np.random.default_rng(0)
    if dtype == "uint8":
        return generator.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
    return generator.standard_normal((batch, 3, size, size), dtype=np.float32)


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    sessions: Mapping[str, Runnable],
    images: Mapping[str, Any],
    seconds: float,
    order: np.random.Generator,
    advance: Callable[[float], None],
    stopwatch: Stopwatch = wall_clock,
    settling: float | None = None,
) -> dict[str, list[float]]:
    """Seconds a run by `stopwatch`, by role; the i-th samples of all roles belong to one round.

    Before each timed run come untimed ones, at least one and for at least `settling` seconds (SETTLING_SECONDS).
    """
    settling = SETTLING_SECONDS if settling is None else settling
    roles = list(sessions)

    def turn(role: str) -> float:
        return stopwatch(lambda: sessions[role].run(images[role]))

    for role in roles:
        deadline = time.perf_counter() + WARM_UP_SECONDS
        for _ in range(2):
            turn(role)
        while time.perf_counter() < deadline:
            turn(role)
    times: dict[str, list[float]] = {role: [] for role in roles}
    begin = time.perf_counter()
    done = 0.0
    # A random order each round, and untimed runs first in a turn: whoever ran before leaves its mark on caches and
    # clocks, which in service, where one engine runs again and again, is the engine's own.
    for number in range(1, MAX_ROUNDS + 1):
        for role in order.permutation(roles).tolist():
            settled = time.perf_counter() + settling
            turn(role)
            while time.perf_counter() < settled:
                turn(role)
            times[role].append(turn(role))
        share = max((time.perf_counter() - begin) / seconds, number / MAX_ROUNDS)
        share = min(1.0, share, number / MIN_ROUNDS)
        advance(share - done)
        done = share
        if share >= 1:
            break
    return times


def _summary(role: str, engine: Engine, batch: int, seconds: Sequence[Sequence[float]]) -> Samples:
    milliseconds = np.concatenate([np.array(sitting) for sitting in seconds]) * 1e3
    p90, p95, p99 = np.percentile(milliseconds, [90, 95, 99])
    return Samples(
        engine=engine.directory.name,
        role=role,
        manifest_sha256=manifest_sha256(engine.directory),
        batch=batch,
        milliseconds=[[round(value * 1e3, 4) for value in sitting] for sitting in seconds],
        runs=len(milliseconds),
        median=float(np.median(milliseconds)),
        p90=float(p90),
        p95=float(p95),
        p99=float(p99) if len(milliseconds) >= P99_SAMPLES else None,
        drift=_drift(milliseconds),
        images_per_second=batch / float(np.median(milliseconds)) * 1e3,
    )


def _drift(values: NDArray[Any]) -> float:
    """Median of the last third over that of the first third, minus 1."""
    third = max(1, len(values) // 3)
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1)


def paired_ratio(engine: str, reference: str, batch: int, times: Mapping[str, Sequence[Sequence[float]]]) -> Ratio:
    """The ratio of two roles from their seconds by role, one list a sitting."""
    sittings = [np.array(slow) / np.array(fast) for slow, fast in zip(times[reference], times[engine], strict=True)]
    paired = np.concatenate(sittings)
    low, high = bootstrap_median(sittings)
    reason = doubt(paired, low, high, "the ratio")
    return Ratio(
        engine=engine,
        reference=reference,
        batch=batch,
        rounds=len(paired),
        speedup=float(np.median(paired)),
        low=low,
        high=high,
        verdict="inconclusive" if reason else "measured",
        reason=reason,
    )


def doubt(values: NDArray[Any], low: float, high: float, what: str) -> str | None:
    """Why the median of `values`, in the order they were measured in, is inconclusive; None where it is not.

    `low` and `high` are the ends of its interval, `what` names the values.
    """
    drift = _drift(values)
    if (high - low) / float(np.median(values)) > MAX_RELATIVE_WIDTH:
        return f"the {CONFIDENCE:.0%} interval is wider than {MAX_RELATIVE_WIDTH:.0%}; measure longer, with nothing else running"
    if abs(drift) > MAX_DRIFT:
        return f"{what} drifted by {drift:+.0%} while measuring; measure again on a quiet machine"
    return None


def bootstrap_median(sittings: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Percentile bootstrap interval of the median over all rounds: sittings are resampled, then rounds in them."""
    generator = np.random.default_rng(0)
    medians = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        chosen = generator.integers(0, len(sittings), len(sittings))
        medians.append(
            np.median(np.concatenate([generator.choice(sittings[index], len(sittings[index])) for index in chosen]))
        )
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)
