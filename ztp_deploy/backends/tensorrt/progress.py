"""A build's progress, and its end by Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """Shares of one build, from the nested phases that TensorRT reports; stops it when `cancelled` is set."""

    def __init__(self, advance: Callable[[float], None], share: float) -> None:
        self.cancelled = threading.Event()
        self.error: Exception | None = None
        self._advance = advance
        self._share = share
        self._phases: dict[str, _Phase] = {}
        self._told = 0.0
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside one step of its parent."""
        with self._lock:
            self._phases[phase] = _Phase(parent, max(1, steps))

    def step(self, phase: str, number: int) -> bool:
        """Step `number`, counted from 0, is done; answers whether to go on."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = number + 1
            self._tell(self._fraction())
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """The phase is over."""
        with self._lock:
            self._phases.pop(phase, None)

    def complete(self) -> None:
        """Everything is done: the rest of the share."""
        with self._lock:
            self._tell(1.0)

    def _fraction(self) -> float:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return max((self._done(name) for name in roots), default=0.0)

    def _done(self, name: str) -> float:
        phase = self._phases[name]
        inner = sum(self._done(child) for child, other in self._phases.items() if other.parent == name)
        return min(1.0, (phase.done + min(1.0, inner)) / phase.steps)

    def _tell(self, fraction: float) -> None:
        if fraction <= self._told:
            return
        try:
            self._advance((fraction - self._told) * self._share)
        except Exception as error:  # must not travel through the library's C++; raised again by `interruptible`
            self.error = error
            self.cancelled.set()
        self._told = fraction


def monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's face of `progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

    return Monitor()


def interruptible(work: Callable[[], T], progress: Progress) -> T:
    """What `work` returns, run in a thread of its own.

    Python raises Ctrl-C in the main thread, between any two of its instructions: inside a callback it would tear
    through the library. Here it ends the waiting, which cancels the build.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt-build") as pool:
        try:
            future = pool.submit(work)  # here, since Ctrl-C may come while the thread starts
            # In pieces: a signal that another thread received does not wake a thread that waits for good.
            while not wait([future], timeout=0.1).done:
                pass
            result = future.result()
        except BaseException:
            progress.cancelled.set()
            raise
    if progress.error is not None:
        raise progress.error
    return result
