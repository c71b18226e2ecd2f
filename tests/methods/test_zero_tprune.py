"""Zero-TPrune against the golden cases, and its pure functions one by one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import golden
from tests.golden import weights as formula
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods import parse_options
from ztp_deploy.methods import zero_tprune as zt
from ztp_deploy.methods.base import top_k_margin
from ztp_deploy.methods.similarity import staying
from ztp_deploy.models import load_model
from ztp_deploy.plan import Stage
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.pruning.tokens import top_k
from ztp_deploy.pruning.trace import trace_tokens
from ztp_deploy.source import ModelSize

ORACLE = [name for name in golden.CASES if name.startswith("zt_")]
PROTOTYPE = [name for name in golden.CASES if name.startswith("ztprune_proto")]


def oracle_stage(name):
    """Inputs [1, H, N, …], the stage and options of an oracle case."""
    case = golden.CASES[name]
    inputs = {key: value for key, value in case["inputs"].items() if key != "generator"}
    attention, keys = formula.zt_inputs(**inputs)
    check = case["input_check"]
    assert (attention**2).sum() == pytest.approx(check["sum_A_sq"])
    assert (keys**2).sum() == pytest.approx(check["sum_K_sq"])
    arguments = case["arguments"]
    stage = Stage(
        block=1,
        place="after_block",
        tokens_in=inputs["N"] - 1,
        tokens_out=arguments["k"],
        static={"similar": arguments["r"], "rounds": arguments["iters"]},
    )
    start = "class" if arguments["boost"] else "uniform"
    options = zt.Options(start=start, variance_bounds=tuple(arguments["vhf"]), renormalise=True)
    to_tensor = lambda array: torch.from_numpy(array).unsqueeze(0)  # noqa: E731
    return to_tensor(attention), to_tensor(keys), stage, options


def mean_over_heads(score, spread, participants, options):
    """Root-mean-square scores from those of a stage, which leave out the number of heads that count."""
    return score / zt.head_weights(spread, options.variance_bounds, participants).square().sum(1).sqrt()


def select(attention, keys, stage, options):
    """One stage of a model with a class token."""
    starts = zt.Starts.of(stage, 1, 0, options)
    return zt.select(attention, keys, stage, starts, special_tokens=1, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ORACLE)
def test_oracle(name, dtype):
    attention, keys, stage, options = oracle_stage(name)
    truth = golden.arrays(name)
    chosen = select(attention.to(dtype), keys.to(dtype), stage, options)
    everyone = attention.shape[-1]
    taking_part = everyone - stage.static["similar"]
    for name, spread, count in (("pre_score", "pre_spread", everyone), ("score", "spread", taking_part)):
        chosen.scores[name] = mean_over_heads(chosen.scores[name], chosen.scores[spread], count, options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    scores = {key: value[0].double().numpy() for key, value in chosen.scores.items()}
    np.testing.assert_allclose(scores["pre_score"], truth["pre_score"][1:], **tolerance)
    np.testing.assert_allclose(scores["pre_spread"][:, 0] ** 2 / everyone, truth["pre_var"], **tolerance)
    np.testing.assert_allclose(scores["similarity"], truth["a_best_sim"], **tolerance)
    np.testing.assert_allclose(scores["spread"][:, 0] ** 2 / taking_part, truth["final_var"], **tolerance)
    np.testing.assert_allclose(scores["score"][truth["s_kept"]], truth["final_score"][1:], **tolerance)
    order = top_k(chosen.scores["pre_score"], stage.tokens_in)[0].tolist()
    half = staying(stage.tokens_in, "importance")
    assert order[:half] == truth["group_b"].tolist()
    assert order[half:] == truth["group_a"].tolist()
    assert sorted(np.flatnonzero(scores["score"] < 0)) == sorted(truth["s_dropped"])
    assert sorted(chosen.kept[0].tolist()) == truth["kept"].tolist()
    used = zt.head_weights(chosen.scores["pre_spread"], options.variance_bounds, everyone)[0]
    assert used[:, 0].round().tolist() == truth["pre_mask"].tolist()


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("mistake", ["transposed", "no_class_start", "no_vhf"])
def test_oracle_notices_mistakes(name, mistake):
    """The cases can fail: each misreading moves the scores well beyond the tolerance."""
    attention, keys, stage, options = oracle_stage(name)
    if mistake == "transposed":
        attention = attention.transpose(-1, -2)
    elif mistake == "no_class_start":
        options = options.model_copy(update={"start": "uniform" if options.start == "class" else "class"})
    else:
        options = options.model_copy(update={"variance_bounds": None, "heads": "mean"})
    chosen = select(attention, keys, stage, options)
    found = mean_over_heads(chosen.scores["pre_score"], chosen.scores["pre_spread"], attention.shape[-1], options)
    gap = np.abs(found[0].numpy() - golden.arrays(name)["pre_score"][1:]).max()
    assert gap > 1e-3


@pytest.mark.parametrize("name", PROTOTYPE)
def test_authors_prototype(name):
    """The authors' early I-stage: no S-stage, no VHF, plain start, temperature; after blocks 3, 6, 9."""
    case, truth = golden.CASES[name], golden.arrays(name)
    arguments = case["arguments"]
    state = formula.fill({key: tuple(shape) for key, shape in case["state_dict"].items()}, case["seed"])
    size = ModelSize(embed_dim=96, num_heads=3, num_classes=100)
    model = load_model("deit_t", weights=state, overrides=size)
    rounds = 1 if "ave_em" in name else 5
    plan = make_plan(
        model,
        keep=arguments["retain_rate_list"],
        sites=[site + 1 for site in arguments["prune_list"]],
        options={
            "similar": 0.0,
            "start": "uniform",
            "variance_bounds": None,
            "rounds": rounds,
            "temperature": arguments["tau_imp"],
        },
    )
    pruned = prune(model, plan)
    images = torch.from_numpy(formula.make_input(tuple(case["input_shape"]), case["input_seed"]))
    with torch.inference_mode():
        outputs = pruned.run(images)
    tolerance = case["tolerance"]["logits"]
    np.testing.assert_allclose(outputs.logits.numpy(), truth["logits"], **tolerance)
    assert [1 + n for n in plan.counts] == sorted(set(truth["token_count"].tolist()) - {197}, reverse=True)
    entering = torch.arange(196).expand(2, -1)
    for index, trace in enumerate(trace_tokens(pruned, images)):
        assert trace.kept.tolist() == truth[f"keep_patch_{index}"].tolist()
        # The official importance sums to 1 over all tokens, ours averages 1; theirs is in raster order.
        heads = outputs.scores[index]["spread"].shape[1]
        ours = outputs.scores[index]["score"].gather(1, entering.argsort(1)).numpy() / heads**0.5
        bound = case["tolerance"][f"importance_{index}"]
        np.testing.assert_allclose(ours / (entering.shape[1] + 1), truth[f"importance_{index}"], **bound)
        entering = outputs.kept[index].long()


def random_attention(batch=2, heads=3, tokens=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64).mul(2).softmax(-1)


def test_restricted_vote_equals_gathered_submatrix():
    attention = random_attention()
    survivors = torch.ones(2, 17, dtype=torch.float64)
    survivors[0, [3, 5, 16]] = 0
    survivors[1, [1, 2, 9]] = 0
    start = zt.start_scores(17, 14, class_token=0).double()
    fast = zt.vote(attention, start, 7, survivors)
    for image in range(2):
        keep = survivors[image].nonzero().squeeze(1)
        small = attention[image][:, keep][:, :, keep]
        small = small / small.sum(-1, keepdim=True)
        score = start[keep].expand(3, 1, -1)
        for _ in range(7):
            score = score @ small
        torch.testing.assert_close(fast[image][:, keep], score.squeeze(1))
        gone = (survivors[image] == 0).nonzero().squeeze(1)
        assert fast[image][:, gone].abs().max() == 0


def test_vote_keeps_the_mean_at_one():
    start = zt.start_scores(17, 17, class_token=0).double()
    assert start[0] / start[1] == pytest.approx(math.sqrt(17))
    scores = zt.vote(random_attention(), start, 30)
    torch.testing.assert_close(scores.mean(-1), torch.ones(2, 3, dtype=torch.float64))


def test_vote_survives_a_row_that_attends_to_dropped_tokens_only():
    attention = torch.eye(4).roll(1, 0).reshape(1, 1, 4, 4).clone()
    survivors = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert torch.isfinite(zt.vote(attention, torch.ones(4), 3, survivors)).all()


def test_votes_of_dropped_tokens_are_lost_without_renormalising():
    """The submatrix as it is, scores scaled back to mean 1 over the survivors; without survivors nothing changes."""
    attention = random_attention()
    survivors = torch.ones(2, 17, dtype=torch.float64)
    survivors[:, [3, 8, 14]] = 0
    start = zt.start_scores(17, 14, class_token=0).double()
    lost = zt.vote(attention, start, 7, survivors, participants=14)
    keep = survivors[0].nonzero().squeeze(1)
    score = start[keep].expand(2, 3, 1, -1)
    for _ in range(7):
        score = score @ attention[:, :, keep][..., keep]
    torch.testing.assert_close(lost[..., keep], (score / score.mean(-1, keepdim=True)).squeeze(2))
    assert lost[..., [3, 8, 14]].abs().max() == 0
    assert (lost - zt.vote(attention, start, 7, survivors)).abs().max() > 1e-3
    start = zt.start_scores(17, 17, class_token=0).double()
    whole = zt.vote(attention, start, 7, torch.ones(2, 17), participants=17)
    torch.testing.assert_close(whole, zt.vote(attention, start, 7))


def test_hundreds_of_rounds_do_not_underflow_without_renormalising():
    survivors = torch.zeros(2, 17)
    survivors[:, :5] = 1
    scores = zt.vote(random_attention().float(), torch.ones(17), 500, survivors, participants=5)
    torch.testing.assert_close(scores.sum(-1), torch.full((2, 3), 5.0))


def test_features_of_heads_are_joined():
    features = torch.randn(2, 3, 17, 4, generator=torch.Generator().manual_seed(0))
    side_by_side = zt.join_heads(features, "concatenated")
    assert torch.equal(side_by_side[1, 5], torch.cat([features[1, head, 5] for head in range(3)]))
    torch.testing.assert_close(zt.join_heads(features, "averaged"), features.mean(1))
    # Heads of equal length: their cosines count equally.
    one, other = zt.join_heads(features, "normalised")[0, :2]
    by_head = torch.nn.functional.cosine_similarity(features[0, :, 0], features[0, :, 1], dim=-1)
    assert (one @ other / one.norm() / other.norm()).item() == pytest.approx(by_head.mean().item(), abs=1e-6)
    assert torch.isfinite(zt.join_heads(torch.zeros(1, 1, 2, 3), "normalised")).all()


def test_heads_out_of_bounds_are_left_out_and_all_count_when_none_qualifies():
    variance = torch.tensor([[0.0099, 0.0101, 0.699, 0.701], [0.0, 0.001, 5.0, 9.0]]).unsqueeze(-1)
    spread = (variance * 197).sqrt()
    weights = zt.head_weights(spread, (0.01, 0.7), 197)
    # Each head tells in a digit of its own who was counted.
    scores = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1).expand(2, 4, 1)
    assert weights[0].flatten().tolist() == pytest.approx([1e-12, 1, 1, 1e-12])
    assert weights[1].unique().numel() == 1
    assert zt.combine_heads(scores, weights, "mean").flatten().tolist() == pytest.approx([110, 1111e-12], rel=1e-6)
    squares = zt.combine_heads(scores, weights).square().flatten().tolist()
    assert squares == pytest.approx([10100, 1010101e-24], rel=1e-6)
    assert zt.head_weights(spread, None, 197).flatten(1).tolist() == [[1] * 4] * 2


def test_heads_that_count_are_combined_by_their_squares():
    """To the same factor for all tokens: the root of 2 over the root mean square, and 2 over the mean."""
    scores = torch.tensor([[[3.0, 1.0], [4.0, 1.0], [100.0, 1.0]]])
    weights = torch.tensor([[[1.0], [1.0], [0.0]]])
    assert zt.combine_heads(scores, weights).flatten().tolist() == pytest.approx([5, math.sqrt(2)])
    assert zt.combine_heads(scores, weights, "mean").flatten().tolist() == pytest.approx([7, 2])


@pytest.mark.parametrize("how", ["rms", "mean"])
def test_an_image_none_of_whose_heads_counts_is_ranked_by_all_of_them(how):
    """Weights of 1e-12 leave float32 digits enough, and a dropped token stays behind."""
    attention, keys, stage, _ = oracle_stage("zt_n17")
    stage = stage.model_copy(update={"static": {**stage.static, "rounds": 1}})
    chosen, expected = (
        select(attention.float(), keys.float(), stage, zt.Options(heads=how, variance_bounds=bounds))
        for bounds in ((50.0, 60.0), None)
    )
    assert chosen.kept.tolist() == expected.kept.tolist()
    assert chosen.scores["score"].max() < 1e-10


def test_ties_go_to_the_lower_index():
    uniform = torch.full((1, 2, 9, 9), 1 / 9)
    keys = torch.ones(1, 2, 9, 4)
    stage = Stage(block=1, place="after_block", tokens_in=8, tokens_out=4, static={"similar": 2, "rounds": 3})
    chosen = select(uniform, keys, stage, zt.Options())
    # All alike: slots 4 and 5 lead the less important half and go; the first four of the rest stay.
    assert chosen.kept.tolist() == [[0, 1, 2, 3]]
    assert (chosen.scores["score"] < 0).nonzero()[:, 1].tolist() == [4, 5]


@pytest.mark.parametrize("block, depth, rounds", [(1, 12, 30), (3, 12, 30), (4, 12, 8), (9, 12, 8), (10, 12, 1)])
def test_published_voting_rounds_go_by_depth(block, depth, rounds):
    assert zt.published_rounds(block, depth) == rounds


def test_published_rounds_are_an_option():
    plan = make_plan("deit_s", ratio=0.7, options={"rounds": "published"})
    assert [stage.static["rounds"] for stage in plan.stages] == [30, 8, 8]
    assert plan.options["rounds"] == "published"


def test_replay_recomputes_the_selection_from_scores_alone():
    attention, keys, stage, options = oracle_stage("zt_n197_boost")
    chosen = select(attention, keys, stage, options)
    replay = zt.replay(stage, chosen.scores, SimpleNamespace(special_tokens=1), options)
    assert replay.kept.tolist() == chosen.kept.tolist()
    margins = {d.name: d.margin.abs().min().item() for d in replay.decisions}
    assert set(margins) == {
        "pre_heads_above", "pre_heads_below", "split", "similarity", "heads_above", "heads_below", "importance"
    }  # fmt: skip
    assert min(margins.values()) > 1e-4


def test_margin_is_signed_and_relative():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    torch.testing.assert_close(top_k_margin(scores, 2), torch.tensor([[0.6, -0.6, 0.2, -0.2]]))
    assert torch.isinf(top_k_margin(scores, 4)).all()
    assert top_k_margin(scores.double(), 4).dtype == torch.float64  # ToMe writes it beside others, in replays


@pytest.mark.parametrize(
    "options, word",
    [
        ({"rounds": 0}, "rounds"),
        ({"rounds": None}, "rounds=None"),
        ({"rounds": "many"}, "integer.*or.*list.*or.*'published'"),
        ({"tau": 1}, "tau"),
        ({"similar": 2}, "similar"),
        ({"heads": "max"}, "heads"),
    ],
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(BadRequest, match=word):
        parse_options("zero_tprune", options)


def test_rounds_per_stage_must_match_the_stages():
    with pytest.raises(BadRequest, match="2 entries for 3 stages"):
        make_plan("deit_t", ratio=0.7, options={"rounds": [1, 2]})
