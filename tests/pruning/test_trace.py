"""Token traces: ascending kept positions and a consistent assignment."""

from __future__ import annotations

import copy

import torch

import ztp_deploy as ztp
from tests import tiny


def test_trace_agrees_with_the_run(pruned):
    images = torch.from_numpy(tiny.images(3))
    with torch.inference_mode():
        kept = pruned.run(images).kept
    traces = ztp.trace_tokens(pruned, images)
    assert [trace.block for trace in traces] == [1, 2, 3]
    for trace, positions in zip(traces, kept, strict=True):
        assert torch.equal(trace.kept, positions.sort(1).values)
        assert trace.assignment.shape == (3, 36)
        for image in range(3):
            carried = trace.assignment[image]
            assert (carried >= 0).sum() == positions.shape[1]
            for position in range(36):
                slot = int(carried[position])
                expected = position if slot >= 0 else -1
                assert (int(trace.kept[image, slot]) if slot >= 0 else -1) == expected


def test_images_follow_the_module_to_its_device(pruned, monkeypatch):
    """torch's meta device stands in for a GPU."""
    images = torch.from_numpy(tiny.images(2))
    elsewhere, devices = copy.deepcopy(pruned).to("meta"), []

    def run(moved):
        devices.append(moved.device.type)
        return pruned.run(images)

    monkeypatch.setattr(elsewhere, "run", run)
    assert [trace.block for trace in ztp.trace_tokens(elsewhere, images)] == [1, 2, 3]
    assert devices == ["meta"]
