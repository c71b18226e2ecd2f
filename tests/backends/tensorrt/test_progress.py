"""Progress from TensorRT's nested phases, and the end by Ctrl-C."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ztp_deploy.backends.tensorrt.progress import Progress, interruptible


def test_shares_follow_the_nested_phases_and_add_up():
    told: list[float] = []
    progress = Progress(told.append, 0.5)
    progress.start("build", None, 2)
    progress.start("parse", "build", 4)
    assert progress.step("parse", 1)
    assert sum(told) == pytest.approx(0.5 * (2 / 4) / 2)
    progress.finish("parse")
    assert progress.step("build", 0)
    assert sum(told) == pytest.approx(0.25)
    progress.start("tune", "build", 10)
    for number in range(10):
        progress.step("tune", number)
    progress.step("build", 1)
    progress.finish("build")
    progress.complete()
    assert sum(told) == pytest.approx(0.5)
    assert all(share > 0 for share in told)


def test_ctrl_c_while_the_thread_starts_cancels_the_build_too(monkeypatch):
    progress = Progress(lambda share: None, 1.0)
    submit = ThreadPoolExecutor.submit

    def interrupted(pool, work):
        submit(pool, work)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: progress.cancelled.wait(10), progress)
    assert progress.cancelled.is_set()


def test_ctrl_c_cancels_the_build_and_comes_back():
    progress = Progress(lambda share: None, 1.0)
    progress.start("build", None, 1000)
    steps = []

    def build() -> str:
        for number in range(10**6):
            steps.append(number)
            if number == 3:
                import _thread

                _thread.interrupt_main()
            if not progress.step("build", number % 1000):
                return "cancelled"
            threading.Event().wait(0.001)
        return "never"

    with pytest.raises(KeyboardInterrupt):
        interruptible(build, progress)
    assert progress.cancelled.is_set()
    assert 3 < len(steps) < 10**4


def test_a_fault_in_the_listener_ends_the_build_and_is_raised():
    def broken(share: float) -> None:
        raise ZeroDivisionError

    progress = Progress(broken, 1.0)
    progress.start("build", None, 2)
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: progress.step("build", 0), progress)
    assert progress.cancelled.is_set()


def test_what_the_work_returns_comes_back():
    assert interruptible(lambda: 7, Progress(lambda share: None, 1.0)) == 7
