"""Recording and replaying, over a stand-in for CUDA graphs: a graph that repeats on its buffers what was recorded."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from ztp_deploy.backends.cuda_graph import Recorder, capture


class Graph:
    """Writes to the recorded outputs what they become for the recorded input as it is now."""

    recording = None

    def replay(self):
        self.outputs.copy_(self.images * 2)


@pytest.fixture
def calls(monkeypatch):
    """CUDA as far as recording needs it; lists the batch of every plain run."""
    made = []

    @contextmanager
    def graph(one, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert not Graph.recording, "two recordings at once"
        Graph.recording = one
        yield
        Graph.recording = None

    stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cpu"), name="side")
    streams = SimpleNamespace(current=stream)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: streams.current,
        "stream": lambda one: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def compute(images):
        made.append(len(images))
        outputs = images * 2
        if Graph.recording:
            Graph.recording.images, Graph.recording.outputs = images, outputs
        return outputs

    return SimpleNamespace(made=made, compute=compute, streams=streams)


def test_a_shape_is_recorded_once_and_replayed_on_what_comes(calls):
    replay = Recorder(calls.compute)
    assert replay(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    recorded = len(calls.made)
    outputs = replay(torch.tensor([5.0, 6.0]))
    assert outputs.tolist() == [10.0, 12.0]
    assert len(calls.made) == recorded  # nothing was run but the graph
    assert replay(torch.tensor([7.0, 8.0])) is outputs  # the recording's own buffer


def test_every_shape_has_a_recording_of_its_own(calls):
    replay = Recorder(calls.compute)
    two = replay(torch.ones(2))
    assert replay(torch.full((3,), 4.0)).tolist() == [8.0] * 3
    assert calls.made == [2] * 4 + [3] * 4  # three warm-ups and the recording
    assert two.tolist() == [2.0, 2.0]
    replay(torch.full((2,), 3.0))
    assert calls.made == [2] * 4 + [3] * 4


def test_the_callers_images_are_not_what_is_recorded(calls):
    replay = Recorder(calls.compute)
    mine = torch.ones(2)
    replay(mine)
    mine.fill_(100.0)
    assert replay(torch.full((2,), 3.0)).tolist() == [6.0, 6.0]
    assert mine.tolist() == [100.0, 100.0]


def test_another_stream_waits_for_the_one_before(calls):
    """It would write to the buffers while what the other was given still reads them."""
    waits = []

    def stream(name):
        return SimpleNamespace(wait_stream=lambda other: waits.append((name, other.name)), name=name)

    replay = Recorder(calls.compute)
    one, two = stream("one"), stream("two")
    for calls.streams.current in (one, one, two, two, one):
        replay(torch.ones(2))
    assert waits == [("one", "side"), ("two", "one"), ("one", "two")]


def test_recordings_come_one_at_a_time_in_the_process(calls):
    stream = SimpleNamespace(device=torch.device("cpu"))
    first, second = threading.Event(), threading.Event()

    def record():
        first.wait(10)
        with capture(stream):
            second.set()

    other = threading.Thread(target=record)
    other.start()
    with capture(stream):
        first.set()
        assert not second.wait(0.2)
    other.join(10)
    assert second.is_set()
