"""What the tests of methods and of selection parity share: runs as observations, constructed flips, checked engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ztp_deploy as ztp
from tests import golden, tiny
from ztp_deploy.evidence.observe import observe_eager
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.evidence.verdict import ParityReport
from ztp_deploy.exporters import torchscript
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.pruning.prune import Outputs, PrunedModel
from ztp_deploy.source import ModelSize
from ztp_deploy.workflow.progress import Silent


class Listening(Silent):
    """A monitor that keeps the steps and what it is warned of."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warned: list[str] = []

    def step(self, title: str, total: float | None) -> AbstractContextManager[Any]:
        self.steps.append(title)
        return super().step(title, total)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def observe(pruned: PrunedModel, images: np.ndarray, forced: list[np.ndarray] | None = None) -> Observation:
    """An eager run with its scores."""
    return observe_eager(InferenceGraph(pruned, "float32"), images, forced=forced)


def copy_of(observation: Observation) -> Observation:
    """The same run, free to be changed."""
    return Observation(
        observation.logits.copy(),
        [kept.copy() for kept in observation.kept],
        [merged.copy() for merged in observation.merged],
        {name: value.copy() for name, value in observation.scores.items()},
    )


def exchange(observation: Observation, inside: int, outside: int) -> None:
    """Makes the first stage of a one-image run keep position `outside` in place of `inside`."""
    kept = observation.kept[0][0]
    kept[kept == inside] = outside
    if observation.merged:
        slots = observation.merged[0][0]
        slots[[inside, outside]] = slots[[outside, inside]]


def assert_forced_runs_reproduce(pruned: PrunedModel, deciding: str | None = None) -> None:
    """A run made to choose as another did treats every token alike; made to choose as it did itself, it is the same.

    The first stage's score named `deciding` is reported all the same, whatever is forced.
    """
    patches = pruned.plan.patch_tokens
    own, other = (observe(pruned, tiny.images(3, seed=seed)) for seed in (0, 1))
    again = observe(pruned, tiny.images(3), own.forced(patches))
    np.testing.assert_allclose(again.logits, own.logits, rtol=1e-4, atol=1e-5)
    moved = observe(pruned, tiny.images(3), other.forced(patches))
    assert np.abs(moved.logits - own.logits).max() > 1e-3
    if deciding:
        np.testing.assert_array_equal(moved.scores[deciding], own.scores[deciding])
    for index in range(len(pruned.plan.stages)):
        assert (again.destinations(index, patches) == own.destinations(index, patches)).all()
        assert (moved.destinations(index, patches) == other.destinations(index, patches)).all()


def engine_report(pruned: PrunedModel, model: torch.nn.Module, folder: Path) -> ParityReport:
    """The gate's finding for an ONNX Runtime engine; the linter has passed the graph where there is one."""
    artifact = ztp.export(pruned, "onnx", folder / "onnx")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=folder / "engine")
    return ztp.check_parity(engine, model, tiny.images(5))


def assert_engine_agrees(pruned: PrunedModel, model: torch.nn.Module, format: str, backend: str, folder: Path) -> None:
    """The engine of a format passes the gate, and gives the module's own logits and kept tokens at a batch of 3."""
    artifact = ztp.export(pruned, format, folder / "artifact")  # ONNX graphs are linted here
    engine = ztp.build(artifact, backend, device="cpu", directory=folder / "engine")
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
    images = tiny.images(3, seed=2)
    expected = run(pruned, torch.from_numpy(images))
    with ztp.load_engine(engine.directory) as session:
        np.testing.assert_allclose(session.run(images), expected.logits, atol=1e-4)
        assert [kept.tolist() for kept in session.kept()] == [kept.sort(1).values.tolist() for kept in expected.kept]


def assert_traces(pruned: PrunedModel, folder: Path) -> None:
    """The TorchScript trace, made at batch 2, does the same at batch 3."""
    artifact = ztp.export(pruned, "torchscript", folder / "torchscript")
    traced = torch.jit.load(str(artifact.directory / torchscript.GRAPH_FILE))
    images = torch.from_numpy(tiny.images(3))
    with torch.inference_mode():
        for found, expected in zip(traced(images), InferenceGraph(pruned, "float32")(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def golden_model(name: str) -> torch.nn.Module:
    """The backbone of a golden case with its weights."""
    case = golden.CASES[name]
    arguments = case["arguments"]
    size = ModelSize(
        img_size=case["input_shape"][-1],
        embed_dim=arguments["embed_dim"],
        depth=arguments["depth"],
        num_heads=arguments["num_heads"],
        num_classes=arguments["num_classes"],
    )
    return ztp.load_model("deit_t", weights=golden.state_dict(name), overrides=size)


def run(pruned: PrunedModel, images: torch.Tensor, forced: list[torch.Tensor] | None = None) -> Outputs:
    """One pass without gradients."""
    with torch.inference_mode():
        return pruned.run(images, forced)


def observation(kept: list[np.ndarray], scores: Mapping[str, np.ndarray]) -> Observation:
    """A run over one image, made up: positions [k] per stage and scores [n] by name."""
    return Observation(
        np.zeros((1, 10)), [k[None].astype(np.int32) for k in kept], [], {key: v[None] for key, v in scores.items()}
    )


def flip(
    kept: Callable[[np.ndarray], np.ndarray], start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores on the way from `start` to `end` that lie just before and just after a change of the kept set."""

    def at(share: float) -> np.ndarray:
        return (1 - share) * start + share * end

    low, high = 0.0, 1.0
    before = set(kept(start).tolist())
    if before == set(kept(end).tolist()):
        return None
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if set(kept(at(middle)).tolist()) == before else (low, middle)
    return at(low), at(high)
