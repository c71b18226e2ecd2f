"""The S-stage's partitions and metrics, against plain numpy and on the whole method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.contracts.test_registries import HostCopies
from ztp_deploy import methods
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.similarity import PARTITIONS, best_match, raster_order, staying

METRICS = {
    "cosine": lambda x, y: x @ y / (np.linalg.norm(x) * np.linalg.norm(y)),
    "dot": lambda x, y: x @ y,
    "euclidean": lambda x, y: -(np.linalg.norm(x - y) ** 2),
    "manhattan": lambda x, y: -np.abs(x - y).sum(),
    "chebyshev": lambda x, y: -np.abs(x - y).max(),
}


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("metric", METRICS)
def test_likeness_to_the_most_alike(metric, skip):
    features = np.random.default_rng(1).standard_normal((2, skip + 11, 7))
    slots = np.stack([np.random.default_rng(seed).permutation(11) for seed in range(2)])
    less, more = slots[:, :5], slots[:, 5:]
    found = best_match(torch.from_numpy(features), *map(torch.from_numpy, (less, more)), metric, skip)
    expected = [
        [max(METRICS[metric](features[b, skip + x], features[b, skip + y]) for y in more[b]) for x in less[b]]
        for b in range(2)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_token_is_held_against_itself():
    tokens, slots = torch.eye(3).unsqueeze(0), torch.arange(3).unsqueeze(0)
    assert best_match(tokens, slots, slots, apart=False).tolist() == [[0.0, 0.0, 0.0]]
    assert best_match(tokens, slots, slots).tolist() == [[1.0, 1.0, 1.0]]


def test_a_token_without_features_is_like_none():
    tokens = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [4.0, 3.0]]])
    less, more = torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    assert best_match(tokens, less, more)[0].tolist() == pytest.approx([0.0, 0.96])


def test_partitions_go_by_position_not_by_slot():
    positions = torch.tensor([[40, 10, 30, 20, 50]])
    assert raster_order(positions, "sequential").tolist() == [[1, 3, 2, 0, 4]]
    assert raster_order(positions, "alternate").tolist() == [[1, 2, 4, 3, 0]]
    assert sorted(raster_order(positions, "random")[0].tolist()) == [0, 1, 2, 3, 4]
    assert [staying(5, partition) for partition in PARTITIONS] == [3, 3, 3, 3, 0]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("metric, features", [("cosine", "keys"), ("manhattan", "inputs")])
def test_every_variant_replays_its_selection_and_differs(partition, metric, features, model):
    """Its own scores give its own tokens back; and the variants are not all one and the same."""
    options = {"partition": partition, "metric": metric, "features": features}
    plan = ztp.make_plan(model, ratio=0.6, options=options)
    pruned = ztp.prune(model, plan)
    images = torch.from_numpy(tiny.images(2))
    with torch.inference_mode():
        outputs = pruned.run(images)
        default = ztp.prune(model, ztp.make_plan(model, ratio=0.6)).run(images)
    rule, chosen = methods.get("zero_tprune"), methods.parse_options("zero_tprune", plan.options)
    entering = torch.arange(36).expand(2, -1)
    for stage, kept, scores in zip(plan.stages, outputs.kept, outputs.scores, strict=True):
        assert tuple(scores) == rule.score_names(stage)
        replay = rule.replay(stage, scores, pruned.host.geometry, chosen)
        assert entering.gather(1, replay.kept).sort(1).values.tolist() == kept.sort(1).values.tolist()
        entering = kept.long()
    alike = outputs.kept[0].sort(1).values.tolist() == default.kept[0].sort(1).values.tolist()
    assert alike == ((partition, metric) == ("importance", "cosine"))


def test_without_a_partition_any_token_may_go(model):
    with pytest.raises(BadRequest, match="similar from 0 to 18"):
        plan = ztp.make_plan(model, keep=[2], sites=[1], options={"similar": 1.0})
        stage = plan.stages[0].model_copy(update={"static": {"similar": 30, "rounds": 1}})
        ztp.prune(model, plan.model_copy(update={"stages": (stage,)}))
    plan = ztp.make_plan(model, keep=[2], sites=[1], options={"similar": 1.0, "partition": "none"})
    assert plan.stages[0].static["similar"] == 34


@pytest.mark.parametrize("tokens", [5, 36])
def test_every_second_token_in_raster_order(tokens):
    raster = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    positions = torch.empty_like(raster).scatter(1, raster, torch.arange(tokens).expand(2, -1) * 3)
    places = [*range(0, tokens, 2), *range(1, tokens, 2)]
    assert raster_order(positions, "alternate").tolist() == raster[:, places].tolist()
    assert places[: staying(tokens, "alternate")] == list(range(0, tokens, 2))  # those that cannot go are the rest


@pytest.mark.parametrize("partition, copies", [("sequential", 0), ("alternate", 0), ("random", 1)])
def test_what_raster_order_copies_from_the_host(partition, copies):
    """Only the seeded halves are a list, which on a GPU has to come from the host."""
    with HostCopies() as found:
        raster_order(torch.empty(2, 36, device="meta"), partition)
    assert found.found == ["tensor"] * copies


@pytest.mark.parametrize("partition", ["alternate", "random", "none"])
def test_variants_export_and_pass_the_gate(partition, model, tmp_path):
    options = {"partition": partition, "metric": "euclidean", "features": "values", "rounds": 2}
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.6, options=options))
    artifact = ztp.export(pruned, "onnx", tmp_path / "artifact")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
