"""`prune`: a new module that runs the backbone with the plan's stages in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from ztp_deploy import methods, models
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import StageModule, StageOutput
from ztp_deploy.plan import Geometry, Plan, Stage, count_flops
from ztp_deploy.pruning.tokens import TokenState, initial_state, take_special
from ztp_deploy.source import Source


@dataclass(frozen=True)
class Outputs:
    """Everything one pass can say.

    `logits` [B, classes]; per stage, `kept` [B, k] int32 original patch positions in slot order, `scores`, the named
    tensors behind the selection, and, of methods that merge, `merged` [B, n] int32, the slot that each entering
    slot went into (-1: dropped).
    """

    logits: Tensor
    kept: list[Tensor]
    scores: list[dict[str, Tensor]]
    merged: list[Tensor]


class PrunedModel(nn.Module):
    """A backbone with pruning stages: images [B, 3, H, W] → logits [B, classes].

    Every count is a constant of `plan`; the batch is dynamic. `source` says what the backbone is.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.source: Source = models.source_of(model)
        self.plan = plan
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self.host = models.host_of(self.model)
        _check_fit(plan, self)
        own = models.method_weights_of(model, plan.method)
        device = next(self.model.parameters()).device
        self.stages = nn.ModuleDict(build_stages(plan, self.host.geometry, own)).to(device)
        self._stage_at = {stage.block: (stage, _key(stage)) for stage in plan.stages}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → logits [B, classes]."""
        return self.run(images).logits

    def run(self, images: Tensor, forced: Sequence[Tensor] | None = None) -> Outputs:
        """The same pass with what each stage kept and why.

        `forced`, per stage what `StageModule.forward` takes, decides in the selection's place; the scores are still
        those the stages would have gone by.
        """
        host = self.host
        tokens = host.embed(images)
        state = initial_state(images, self.plan.patch_tokens)
        outputs = Outputs(tokens, [], [], [])
        for number, block in enumerate(host.blocks, start=1):
            if number not in self._stage_at:
                tokens = host.transform(block, host.mix(block, tokens, state))
                continue
            stage, key = self._stage_at[number]
            instead = None if forced is None else forced[len(outputs.kept)]
            out = self._run_stage(block, stage, self.stages[key], tokens, state, instead)
            tokens, state = out.tokens, out.state
            outputs.kept.append(state.positions)
            outputs.scores.append(out.scores)
            if out.merged is not None:
                outputs.merged.append(out.merged)
        return replace(outputs, logits=host.read_out(tokens, state))

    def _run_stage(
        self,
        block: nn.Module,
        stage: Stage,
        module: nn.Module,
        tokens: Tensor,
        state: TokenState,
        forced: Tensor | None,
    ) -> StageOutput:
        """A block with its stage. Only blocks whose stage asks for attention compute it openly.

        What a stage after the block decides rests on attention alone and the MLP half acts token by token, so the
        tokens are dropped before it: the same result, without an MLP over tokens that are about to go.
        """
        assert isinstance(module, StageModule)
        host = self.host
        if stage.place == "before_block":
            out: StageOutput = module(tokens, state, None, forced)
            return replace(out, tokens=host.transform(block, host.mix(block, out.tokens, out.state)))
        if stage.place == "read_out":
            tokens = host.transform(block, host.mix(block, tokens, state))
            return cast(StageOutput, module(tokens, state, None, forced))
        if stage.place == "attention_rows":
            attention = host.attention(block, tokens, state)
            out = module(tokens, state, attention, forced)
            assert out.rows is not None
            special = self.host.geometry.special_tokens
            rows = take_special(attention.probabilities.transpose(1, 2), out.rows, special).transpose(1, 2)
            mixed = host.finish(block, out.tokens, rows @ attention.values)
            return replace(out, tokens=host.transform(block, mixed))
        if module.needs_attention:
            attention = module.attend(host.attention(block, tokens, state))
            tokens = host.finish(block, tokens, attention.mixed)
            out = module(tokens, state, attention, forced)
        else:
            out = module(host.mix(block, tokens, state), state, None, forced)
        return replace(out, tokens=host.transform(block, out.tokens))


def prune(model: nn.Module, plan: Plan) -> PrunedModel:
    """A new pruned module; the caller's model is left as it is.

    Raises BadRequest, with the reason, where the plan does not fit the model.
    """
    if not isinstance(model, nn.Module) or not isinstance(plan, Plan):
        raise BadRequest(
            f"prune takes a module and a Plan; got {type(model).__name__} and {type(plan).__name__}.",
            "Call ztp.load_model and ztp.make_plan first.",
        )
    return PrunedModel(model, plan)


def build_stages(plan: Plan, geometry: Geometry, weights: Mapping[str, Tensor]) -> dict[str, StageModule]:
    """The plan's stages by block; `weights` are the method's own. Raises BadRequest where a stage cannot be built."""
    if not plan.stages:
        return {}
    method, options = methods.get(plan.method), methods.parse_options(plan.method, plan.options)
    return {_key(stage): method.build_stage(stage, geometry, options, weights) for stage in plan.stages}


def _key(stage: Stage) -> str:
    return f"block{stage.block}"


def _check_fit(plan: Plan, pruned: PrunedModel) -> None:
    geometry = pruned.host.geometry
    wanted = {
        "image size": (plan.image_size, geometry.image_size),
        "patch tokens": (plan.patch_tokens, geometry.patch_tokens),
        "special tokens": (plan.special_tokens, geometry.special_tokens),
        "dense multiply-accumulates": (plan.flops.dense, count_flops(geometry, ()).dense),
    }
    wrong = [
        f"{what}: {asked} in the plan, {found} in the model"
        for what, (asked, found) in wanted.items()
        if asked != found
    ]
    beyond = [stage.block for stage in plan.stages if stage.block > geometry.depth]
    if beyond:
        wrong.append(f"stages at blocks {beyond}, but the model has {geometry.depth}")
    if wrong:
        raise BadRequest(
            f"The plan for {plan.model} does not fit {pruned.source.name}: {'; '.join(wrong)}.",
            f"Make one for it: ztp plan --model {pruned.source.name}.",
        )
    if plan.stages:
        places = {stage.place for stage in plan.stages}
        carried = set(methods.get(plan.method).PLACES)
        if not places <= carried:
            raise BadRequest(
                f"Method {plan.method} acts at {', '.join(sorted(carried))}, the plan says {', '.join(sorted(places))}.",
                "Make the plan anew with `ztp plan`.",
            )
