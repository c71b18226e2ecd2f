"""How far a command is: the monitor that shows it, the clock that remembers it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel


class Monitor(Protocol):
    """Where the workflow tells how far it is; the command line draws bars from it."""

    def step(self, title: str, total: float | None) -> AbstractContextManager[Any]:
        """A step with `total` units of work (None: unknown); yields `advance(units)`."""

    def warn(self, text: str) -> None:
        """Something the user must not miss."""


class Silent:
    """A monitor that shows nothing."""

    def step(self, title: str, total: float | None) -> AbstractContextManager[Any]:
        """Yields an `advance` that nobody hears."""
        return nullcontext(lambda units: None)

    def warn(self, text: str) -> None:
        """Nothing."""


class StepTime(BaseModel):
    """Wall time of one step."""

    step: str
    seconds: float


@dataclass
class Clock:
    """Times the steps of a run and remembers its largest memory use."""

    monitor: Monitor
    steps: list[StepTime] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    @contextmanager
    def step(self, title: str, total: float | None = None) -> Iterator[Any]:
        """Times and shows one step."""
        begin = time.perf_counter()
        with self.monitor.step(title, total) as advance:
            yield advance
        self.steps.append(StepTime(step=title, seconds=round(time.perf_counter() - begin, 2)))

    def warn(self, text: str) -> None:
        """Shows something the user must not miss, once: what holds for one engine of a run often holds for the next."""
        if text not in self._said:
            self._said.add(text)
            self.monitor.warn(text)

    @staticmethod
    def peak_gib() -> float:
        """The process's largest resident memory so far, in GiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
