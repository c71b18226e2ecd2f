"""The clock: what is shown, once, and what is timed."""

from __future__ import annotations

from ztp_deploy.workflow.progress import Clock, Silent


class Listening(Silent):
    """A monitor that remembers warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def test_what_holds_for_every_engine_of_a_run_is_said_once():
    monitor = Listening()
    clock = Clock(monitor)
    for text in ("int8 is calibrated.", "Random weights.", "int8 is calibrated."):
        clock.warn(text)
    assert monitor.said == ["int8 is calibrated.", "Random weights."]
    Clock(monitor).warn("Random weights.")  # another run says it again
    assert len(monitor.said) == 3


def test_steps_are_timed_in_order():
    clock = Clock(Silent())
    for title in ("export", "build"):
        with clock.step(title, 1.0) as advance:
            advance(1.0)
    assert [step.step for step in clock.steps] == ["export", "build"]
