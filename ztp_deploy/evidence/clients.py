"""Clients: threads that ask an engine at once, back to back or when requests are due, and how long each request took.

Closed loop: each client asks again as soon as it is answered. Open loop: requests are due at a given rate, whatever the
engine does, and wait where no thread is free; latency counts from when a request was due, so that an engine which falls
behind cannot hide it. Clients are Python threads of one process: engines compute outside the interpreter's lock, but what
Python does between two runs, a few dozen microseconds, is done by one thread at a time.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.evidence import latency
from ztp_deploy.evidence.latency import MAX_ROUNDS, Runnable
from ztp_deploy.evidence.schema import EvidencePart


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
